"""Rows end to end on a GPU: the CPU's scores, no waiting, and what happens when memory is short."""

import copy

import numpy as np
import pytest
import torch

from selectmoe.data.packing import collate_packed
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ModelError
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.model.packed_attention import PackedRows, padded_attention, varlen_attention
from selectmoe.model.packed_forward import PackedForward
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Sample
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.scoring.packed import MOST_TOKENS, choose_token_budget
from tests.tiny_select_moe import LOUD, tiny_model

pytestmark = pytest.mark.gpu

FLOAT32 = 1e-4  # sums in another order, by other kernels
# Scores in (0, 1) of gates whose logits have 8 bits of mantissa; a router's choice may flip, too.
BFLOAT16 = 0.1


@pytest.fixture(scope="module")
def samples():
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return rows[::4]


@pytest.fixture(scope="module")
def expected(samples):
    return scores(ScoringEngine.from_pretrained(device="cpu"), samples)


@pytest.fixture(scope="module")
def engine():
    return ScoringEngine.from_pretrained(device="cuda")


def scores(engine, samples):
    return np.array([scored.score for scored in engine.score(samples)])


def test_packed_float32_has_the_scores_of_the_cpu(samples, expected):
    engine = ScoringEngine.from_pretrained(device="cuda", dtype="float32")
    assert engine.packed is not None
    assert engine.packed.forward.attention is padded_attention
    np.testing.assert_allclose(scores(engine, samples), expected, rtol=0, atol=FLOAT32)


def test_packed_bfloat16_has_the_scores_of_the_cpu_to_8_bits_and_their_order(
    engine, samples, expected
):
    assert engine.packed.forward.attention is varlen_attention
    found = scores(engine, samples)
    np.testing.assert_allclose(found, expected, rtol=0, atol=BFLOAT16)
    ranks = [np.argsort(np.argsort(values)) for values in (expected, found)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95  # chance decides ranks of close scores only


def test_two_runs_give_the_same_bits(engine, samples):
    np.testing.assert_array_equal(scores(engine, samples), scores(engine, samples))


def test_both_attentions_agree_in_bfloat16():
    model = tiny_model(SelectMoeModel, **LOUD, num_key_value_heads=2, num_hidden_layers=1)
    model = model.to("cuda")
    half = copy.deepcopy(model).to(torch.bfloat16)
    # `to` rounds rotary frequencies as well, which loading in bfloat16 does not.
    half.rotary_emb = copy.deepcopy(model.rotary_emb)
    rows = packed_rows((5, 40, 1, 33))
    varlen, rectangular = (
        PackedForward(half, attention=attention).quality_logits(rows)
        for attention in (varlen_attention, padded_attention)
    )
    # Logits up to 3 in 8 bits of mantissa, a few times over.
    torch.testing.assert_close(varlen, rectangular, rtol=0, atol=BFLOAT16)


def packed_rows(lengths):
    """On the device, of ids that the tiny model knows."""
    generator = torch.Generator().manual_seed(0)
    ids_N = torch.randint(1, 64, (sum(lengths),), generator=generator)
    position_ids_N = torch.cat([torch.arange(length) for length in lengths])
    edges_R1 = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return PackedRows(*(t.to("cuda") for t in (ids_N, position_ids_N, edges_R1)), lengths)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_batch_never_waits_for_the_device(engine, samples):
    rows = engine.tokenizer.tokenize(samples[:40])
    engine.packed._pass(collate_packed(rows))  # the first pass loads kernels, which waits
    try:
        torch.cuda.set_sync_debug_mode("error")
        engine.packed._pass(collate_packed(rows))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_budget_is_what_memory_takes_and_no_more_than_is_of_use(engine):
    budget = choose_token_budget(engine.model)
    assert budget & (budget - 1) == 0
    assert 1_024 <= budget <= MOST_TOKENS


def test_a_batch_that_does_not_fit_is_cut_and_scored_all_the_same(samples, caplog):
    engine = ScoringEngine.from_pretrained(device="cuda", max_tokens_per_batch=65_536)
    whole = scores(engine, samples)
    many = samples * 4
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    engine.score(many)
    needed = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    # Half of what the pass took; blocks of two megabytes are the allocator's own grain.
    torch.cuda.set_per_process_memory_fraction((held + needed / 2 + 2**22) / total)
    try:
        found = scores(engine, many)
    except ModelError:
        pytest.fail("a single row must fit in what is left")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found, np.tile(whole, 4), rtol=0, atol=BFLOAT16)
    assert "batches have at most" in caplog.text
    assert engine.packed.max_tokens_per_batch < 65_536


def test_padded_rows_are_still_to_be_had(samples, expected):
    engine = ScoringEngine.from_pretrained(device="cuda", experts_implementation="grouped_mm")
    assert engine.packed is None
    np.testing.assert_allclose(scores(engine, samples), expected, rtol=0, atol=BFLOAT16)
    packed = ScoringEngine.from_pretrained(device="cuda", row_layout="packed")
    np.testing.assert_allclose(scores(packed, samples), expected, rtol=0, atol=BFLOAT16)
