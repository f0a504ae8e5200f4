"""Rows end to end have the scores of padded rows: whatever lies beside them, in parts or halved."""

import functools
import logging
import threading

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from selectmoe.config.engine import EngineConfig
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ModelError
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample, ScoredSample, TokenizedSample, UnscoredSample
from selectmoe.scoring.engine import TOKENIZED_TOGETHER, ScoringEngine
from selectmoe.scoring.formulas import SCORE_FORMULAS
from selectmoe.scoring.packed import fit_token_budget
from tests.tiny_select_moe import LOUD, tiny_model

TOLERANCE = 1e-5  # float32 sums in another order; looser would hide a row that sees another
padded_engine = functools.partial(ScoringEngine.from_pretrained, device="cpu")
packed_engine = functools.partial(padded_engine, row_layout="packed")


@pytest.fixture(scope="module")
def samples():
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return rows[::12]


@pytest.fixture(scope="module")
def engine():
    return packed_engine()


@pytest.fixture(scope="module")
def expected(samples):
    return scores(padded_engine(), samples)


def scores(engine, samples):
    return np.array([scored.score for scored in engine.score(samples)])


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("formula", SCORE_FORMULAS)
def test_packed_rows_have_the_scores_of_padded_rows(formula, samples):
    padded, packed = (
        make(formula=formula).score(samples) for make in (padded_engine, packed_engine)
    )
    for ours, theirs in zip(packed, padded, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=TOLERANCE)
        # Layers by margin are not squashed into (0, 1): up to 6, in 24 bits of mantissa.
        np.testing.assert_allclose(ours.layer_scores, theirs.layer_scores, rtol=0, atol=1e-4)
        assert (ours.sample_id, ours.num_tokens) == (theirs.sample_id, theirs.num_tokens)


SMALL_MODELS = {
    "loud gates": {},
    "clipped projections": {"clip_qkv": 0.5},
    "fewer key heads": {"num_key_value_heads": 2},
    "routing weights as they are": {"norm_topk_prob": False},
    "routing weights that sum to 1": {"norm_topk_prob": True},
    "biased projections": {"attention_bias": True},
    "noise for trash": {"trash_expert_mode": "noise", "trash_noise_at_evaluation": True},
    "a vector for trash": {"trash_expert_mode": "custom"},
    "gates forced open": {"quality_gate_forced_open": True},
    "one layer": {"num_hidden_layers": 1},
    "every expert": {"num_experts_per_tok": 4},
    "another activation": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("settings", SMALL_MODELS.values(), ids=SMALL_MODELS.keys())
def test_each_setting_of_a_model_gives_the_scores_of_its_own_forward_pass(settings):
    settings = {**LOUD, "num_hidden_layers": 3, **settings}
    rows = random_rows([5, 40, 1, 17, 17, 38, 2])
    padded, packed = (
        [row.score for row in small_engine(settings, row_layout=layout).score_tokenized(rows)]
        for layout in ("padded", "packed")
    )
    assert np.ptp(padded) > 0.01  # rows that score alike would prove nothing
    assert_same(packed, padded)


def small_engine(settings, *, row_layout):
    model = tiny_model(SelectMoeModel, **settings)
    for layer in model.layers:  # a vector starts at zero, which is another mode
        for parameter in layer.mlp.trash_expert.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    return ScoringEngine(model, tokenizer, EngineConfig(row_layout=row_layout))


def random_rows(lengths):
    generator = np.random.default_rng(0)
    return [
        TokenizedSample(
            str(length),
            generator.integers(1, 64, length).astype(np.int32),
            np.arange(length) >= length // 2,
            truncated=False,
        )
        for length in lengths
    ]


def test_a_score_does_not_depend_on_what_lies_beside_it(engine, samples, expected):
    alone = np.concatenate([scores(engine, [sample]) for sample in samples[:12]])
    backwards = scores(engine, samples[::-1])[::-1]
    assert_same(alone, expected[:12])
    assert_same(backwards, expected)


@pytest.mark.parametrize("budget", [1, 700, 50_000])
def test_a_score_does_not_depend_on_the_budget(budget, samples, expected):
    assert_same(scores(packed_engine(max_tokens_per_batch=budget), samples), expected)


def test_two_runs_give_the_same_bits(engine, samples):
    np.testing.assert_array_equal(scores(engine, samples), scores(engine, samples))


def test_tokenizing_in_parts_on_a_thread_changes_no_bit(engine, samples):
    many = (samples * 7)[: TOKENIZED_TOGETHER + 60]
    by_hand = engine.score_tokenized(engine.tokenizer.tokenize(many))
    np.testing.assert_array_equal(scores(engine, many), [scored.score for scored in by_hand])


def test_the_next_batch_is_made_while_one_is_scored(samples):
    engine = packed_engine(max_tokens_per_batch=300)
    makers = set()
    tokenize_each = engine.tokenizer.tokenize_each

    def noted(rows):
        makers.add(threading.current_thread().name)
        return tokenize_each(rows)

    engine.tokenizer.tokenize_each = noted
    engine.score(samples[:4])
    assert makers == {"batches_0"}


def test_what_goes_wrong_on_the_thread_is_raised(samples):
    engine = packed_engine(max_tokens_per_batch=300)
    broken = Sample("d", "1", None)  # a bug of ours, not a template's refusal
    with pytest.raises(TypeError):
        engine.score([*samples[:2], broken])
    assert [thread for thread in threading.enumerate() if "batches" in thread.name] == []


def test_a_sample_that_the_template_refuses_leaves_its_neighbours_alone(samples, expected):
    engine = packed_engine()
    engine.tokenizer.template = (
        "{% if messages[0]['content'] is defined and messages | length == 1 %}"
        "{{ raise_exception('one turn') }}{% endif %}" + engine.tokenizer.template
    )
    lonely = Sample("d", "lonely", (Message("assistant", "Hello there."),))
    first, refused, second = engine.score([samples[0], lonely, samples[1]])
    assert isinstance(refused, UnscoredSample)
    assert refused.reason == "chat_template"
    assert_same([first.score, second.score], expected[:2])
    assert engine.score([]) == []


def test_scores_of_tokens_are_those_of_padded_rows(engine, samples):
    rows = engine.tokenizer.tokenize(samples[:6])
    for ours, theirs in zip(
        engine.score_each_token(rows), padded_engine().score_each_token(rows), strict=True
    ):
        assert_same(ours.token_scores, theirs.token_scores)
        assert ours.sample.score == pytest.approx(theirs.sample.score, abs=TOLERANCE)


def test_a_row_without_an_answer_is_scored_on_all_its_tokens_and_one_of_nothing_not_at_all(engine):
    [row] = random_rows([30])
    silent = TokenizedSample("silent", row.token_ids, np.zeros(30, dtype=bool), truncated=True)
    empty = TokenizedSample("empty", row.token_ids[:0], row.answer_mask[:0], truncated=False)
    scored, unscored, again = engine.score_tokenized([silent, empty, silent])
    [expected] = padded_engine().score_tokenized([silent])
    assert_same([scored.score, again.score], [expected.score] * 2)
    assert isinstance(unscored, UnscoredSample)


def limit_memory(engine, num_tokens):
    """A real error at a real place, for want of a full GPU: no more than `num_tokens` a pass.

    Returns the sizes of the passes that were tried.
    """
    tried = []

    def embed(module, arguments, output):
        tried.append(len(output))
        if len(output) > num_tokens:
            raise torch.OutOfMemoryError("Out of memory. Tried to allocate 1 GiB.")

    engine.model.embed_tokens.register_forward_hook(embed)
    return tried


def test_a_batch_that_does_not_fit_is_cut_in_two_and_so_are_those_that_follow(
    samples, expected, caplog
):
    engine = packed_engine(max_tokens_per_batch=2_000)
    tried = limit_memory(engine, 1_100)
    with caplog.at_level(logging.WARNING):
        found = scores(engine, samples)
    assert_same(found, expected)
    assert len([size for size in tried if size > 1_100]) == 1
    [line] = caplog.messages
    assert "do not fit in the memory of cpu: batches have at most" in line
    budget = engine.packed.max_tokens_per_batch
    assert budget < 1_100
    assert f"set max_tokens_per_batch={budget} to" in line
    del tried[:]
    scores(engine, samples)
    assert max(tried) <= budget


def test_the_budget_is_a_power_of_two_that_fits_in_four_fifths_of_the_memory():
    assert fit_token_budget(10_000_000, 1_000) == 4_096  # 8,000 would fit
    assert fit_token_budget(10_240_000, 1_000) == 8_192
    assert fit_token_budget(10**12, 1_000) == 65_536  # more is of no use
    assert fit_token_budget(10, 1_000) == 1


def test_a_row_that_does_not_fit_alone_is_named_with_the_setting_to_lower(samples):
    engine = packed_engine(max_tokens_per_batch=2_000)
    longest = max(len(row.token_ids) for row in engine.tokenizer.tokenize(samples))
    limit_memory(engine, longest - 1)
    with pytest.raises(
        ModelError,
        match=rf"a sample of {longest:,} tokens does not fit .*; max_sequence_length must be "
        r"lower: Out of memory",
    ):
        engine.score(samples)


def test_a_number_that_is_not_finite_is_no_score(samples):
    model = SelectMoeModel.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    with torch.no_grad():
        model.layers[0].mlp.quality_gate.bias.fill_(float("nan"))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    engine = ScoringEngine(model, tokenizer, EngineConfig(row_layout="packed"))
    [outcome] = engine.score(samples[:1])
    assert isinstance(outcome, UnscoredSample)


def test_bfloat16_keeps_the_order(samples, expected):
    half = packed_engine(dtype="bfloat16").score(samples)
    assert all(isinstance(scored, ScoredSample) for scored in half)
    ranks = [np.argsort(np.argsort(s)) for s in (expected, [scored.score for scored in half])]
    # 8 bits of mantissa leave ranks of close scores to chance; .95 is far from chance.
    assert np.corrcoef(*ranks)[0, 1] > 0.95
