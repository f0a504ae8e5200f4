"""Signals against plain forward passes, one row at a time; alone as in a batch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from selectmoe.config.engine import EngineConfig
from selectmoe.errors import ConfigError, ModelError
from selectmoe.model.attached_gates import attach_gates
from selectmoe.model.decoder_layers import decoder_layers
from selectmoe.model.language_model_head import LanguageModelHead
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample
from selectmoe.scoring.answer_nll import answer_nll
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.scoring.vectors import projection, row_vectors
from tests.made_gates import gates_for, save_selector
from tests.tiny_bases import save_tiny_base, tiny_base
from tests.tiny_olmoe import tiny_tokenizer
from tests.tiny_select_moe import LOUD, SMALL, tiny_model

TOLERANCE = 1e-5
SIGNALS = ("nll", "pmi", "vector")
WIDE = {"vocab_size": 320, "max_position_embeddings": 256}


TEXTS = (
    ("Why is the sky blue?", "Air scatters blue light more than red."),
    ("gate?", "the gate is open and the other one is not"),
    ("Which one of the two gates is open, and since when?", "One."),
    ("What is 12 * 12? Explain it.", "144: ten twelves are 120, and two more are 24."),
)


@pytest.fixture(scope="module")
def samples():
    return [
        Sample("made", str(number), (Message("user", question), Message("assistant", answer)))
        for number, (question, answer) in enumerate(TEXTS)
    ]


def engine_of(kind, signals=SIGNALS, **settings):
    """An engine on a tiny model in memory, and that model."""
    if kind == "select_moe":
        model = tiny_model(**LOUD, **WIDE)
        selector = model
    else:
        model = tiny_base(kind)
        selector = attach_gates(model, gates_for(model))
    config = EngineConfig(signals=tuple(signals), length="raw", **settings)
    return ScoringEngine(selector, tiny_tokenizer(), config), model


KINDS = ("select_moe", "llama", "qwen3_moe", "gemma3", "olmo2")


def plain_nll(model, tokenized):
    """The loss of transformers on the answer tokens of one row, summed in float64."""
    ids = torch.from_numpy(tokenized.token_ids).long()[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return float(losses[torch.from_numpy(tokenized.answer_mask[1:])].mean())


def emptied(sample):
    turns = [m if m.role == "assistant" else Message(m.role, "") for m in sample.messages]
    return Sample(sample.dataset, sample.sample_id, tuple(turns))


@pytest.mark.parametrize("kind", KINDS)
def test_nll_and_pmi_are_the_loss_of_plain_passes(kind, samples):
    engine, model = engine_of(kind)
    rows = engine.tokenizer.tokenize(samples)
    alone = engine.tokenizer.tokenize([emptied(sample) for sample in samples])
    for scored, row, row_alone in zip(engine.score(samples), rows, alone, strict=True):
        nll = plain_nll(model, row)
        assert scored.signals.nll == pytest.approx(nll, abs=TOLERANCE)
        pmi = plain_nll(model, row_alone) - nll
        assert scored.signals.pmi == pytest.approx(pmi, abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_the_weighted_mean_of_what_the_last_gate_reads(kind, samples):
    engine, model = engine_of(kind, ("vector", "nll"))
    layers = decoder_layers(model)
    read = []
    last = len(layers) - 1 if kind == "select_moe" else 2
    layers.feed_forward(last).register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    for sample, scored in zip(samples, engine.score(samples), strict=True):
        [row] = engine.tokenizer.tokenize([sample])
        engine.score([sample])
        hidden_TH = read[-1].double().numpy()
        positions_T = np.arange(1, len(row.token_ids) + 1)
        expected = (hidden_TH * positions_T[:, None]).sum(0) / positions_T.sum()
        expected /= np.linalg.norm(expected)
        vector = scored.signals.vector
        assert vector.dtype == np.float16
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-3)  # float16


@pytest.mark.parametrize("kind", KINDS)
def test_signals_do_not_depend_on_batch_mates_and_leave_the_scores_as_they_are(kind, samples):
    engine, _ = engine_of(kind)
    plain, _ = engine_of(kind, ())
    together = engine.score(samples)
    for sample, scored in zip(samples, together, strict=True):
        [alone] = engine.score([sample])
        for name in ("nll", "pmi"):
            one, other = getattr(alone.signals, name), getattr(scored.signals, name)
            assert one == pytest.approx(other, abs=TOLERANCE)
        np.testing.assert_allclose(alone.signals.vector, scored.signals.vector, rtol=0, atol=1e-3)
    assert [row.score for row in together] == [row.score for row in plain.score(samples)]


def test_a_vector_is_the_same_of_a_base_that_is_cut_and_of_a_whole_one(samples):
    cut, _ = engine_of("llama", ("vector",))
    whole, _ = engine_of("llama", ("vector", "nll"))
    assert [len(engine.selector.attached.layers) for engine in (cut, whole)] == [3, 4]
    for one, other in zip(cut.score(samples), whole.score(samples), strict=True):
        np.testing.assert_array_equal(one.signals.vector, other.signals.vector)
        assert one.signals.nll is None
        assert other.signals.nll is not None


def test_router_entropy_is_that_of_the_routers_below_the_last_gate(samples):
    # The whole base; its layer 0 has no experts.
    engine, model = engine_of("qwen3_moe", ("router_entropy", "nll"))
    logits = []
    router = decoder_layers(model).feed_forward(1).gate
    router.register_forward_hook(lambda _, __, output: logits.append(output[0]))
    for sample in samples:
        [scored] = engine.score([sample])
        [row] = engine.tokenizer.tokenize([sample])
        probabilities = logits[-1].double().softmax(-1).numpy()
        entropy_T = -(probabilities * np.log(probabilities)).sum(-1)
        expected = entropy_T[row.answer_mask].mean()
        assert scored.signals.router_entropy == pytest.approx(expected, abs=TOLERANCE)
        assert 0 < expected < math.log(4)


def test_chunks_of_the_head_change_nothing(samples):
    model = tiny_base("llama")
    head = LanguageModelHead(model.lm_head, model.config)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 40, 32, generator=generator)
    ids = torch.randint(320, (3, 40), generator=generator)
    mask = torch.rand(3, 40, generator=generator) > 0.5
    mask[2] = False
    whole = answer_nll(head, hidden, ids, mask, max_logits=10**9)
    chunked = answer_nll(head, hidden, ids, mask, max_logits=7 * 320)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=TOLERANCE, equal_nan=True)
    assert whole[2].isnan()


def test_a_head_scales_and_bounds_its_logits_as_its_model_does():
    model = tiny_base("gemma3", final_logit_softcapping=5.0)
    ids = torch.arange(12)[None] + 7
    with torch.inference_mode():
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = LanguageModelHead(model.lm_head, model.config)(hidden)
        torch.testing.assert_close(logits, model(input_ids=ids).logits)
    assert logits.abs().max() <= 5


def test_a_long_vector_is_projected_and_keeps_its_cosines():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 1, 4_096, generator=generator)
    hidden[1] = hidden[0] + 0.5 * hidden[1]
    mask = torch.ones(2, 1, dtype=torch.bool)
    vectors = row_vectors(hidden, mask)
    assert vectors.shape == (2, 512)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    cosine = torch.nn.functional.cosine_similarity(hidden[0, 0], hidden[1, 0], dim=0)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(float(cosine), abs=0.1)
    # Fixed for ever: stored vectors of another version must stay comparable.
    assert projection(576).shape == (576, 512)
    assert (projection(576)[0, :8] > 0).tolist() == (projection(2_048)[0, :8] > 0).tolist()


def test_a_row_without_a_prompt_has_no_pmi(samples):
    engine, _ = engine_of("llama")
    text = Sample("texts", "1", (Message("assistant", "the gate is open"),))
    [scored, other] = engine.score([text, samples[0]])
    assert scored.signals.nll is not None
    assert scored.signals.pmi is None
    assert other.signals.pmi is not None


def test_pmi_compares_the_same_tokens_of_a_truncated_answer(samples):
    engine, model = engine_of("llama", ("nll", "pmi"), max_sequence_length=30)
    sample = Sample(
        "a", "1", (Message("user", "which one?"), Message("assistant", "the gate " * 20))
    )
    [row] = engine.tokenizer.tokenize([sample])
    [scored] = engine.score([sample])
    assert scored.truncated
    [alone] = engine.tokenizer.tokenize([emptied(sample)])
    end = np.flatnonzero(alone.answer_mask)[row.answer_mask.sum() - 1] + 1
    short = replace(alone, token_ids=alone.token_ids[:end], answer_mask=alone.answer_mask[:end])
    expected = plain_nll(model, short) - plain_nll(model, row)
    assert scored.signals.pmi == pytest.approx(expected, abs=TOLERANCE)


def test_pmi_of_the_last_turn_is_that_of_the_last_answer_after_the_others(samples):
    engine, model = engine_of("llama", ("nll", "pmi"), turns="last")
    turns = (
        Message("user", "which one?"),
        Message("assistant", "the gate"),
        Message("user", "open?"),
        Message("assistant", "it is open"),
    )
    [scored] = engine.score([Sample("a", "1", turns)])
    [row] = engine.tokenizer.tokenize([Sample("a", "1", turns)])
    last = Sample("a", "1", (Message("user", ""), turns[-1]))
    [alone] = engine.tokenizer.tokenize([last])
    expected = plain_nll(model, alone) - plain_nll(model, row)
    assert scored.signals.pmi == pytest.approx(expected, abs=TOLERANCE)


def test_a_signal_that_is_not_finite_is_none_and_the_row_keeps_its_score(samples):
    engine, model = engine_of("olmo2")  # its head shares no weights with its embeddings
    with torch.no_grad():
        model.lm_head.weight[5:] = math.nan
    [scored] = engine.score(samples[:1])
    assert math.isfinite(scored.score)
    assert scored.signals.nll is None
    assert scored.signals.pmi is None
    assert np.isfinite(scored.signals.vector.astype(float)).all()


def test_what_cannot_be_given_is_refused():
    with pytest.raises(ConfigError, match=r"signals must be some of nll, .*, got 'taste'"):
        engine_of("llama", ("taste",))
    with pytest.raises(ConfigError, match="signals must be different names"):
        engine_of("llama", ("nll", "nll"))
    with pytest.raises(ConfigError, match=r"signals must be .* with row_layout=packed"):
        engine_of("select_moe", ("nll",), row_layout="packed")
    with pytest.raises(ConfigError, match="router_entropy needs a base with experts"):
        engine_of("llama", ("router_entropy",))
    model = tiny_model(**{**SMALL, **WIDE}).model
    with pytest.raises(ModelError, match="nll and pmi need a model with its language-model head"):
        ScoringEngine(model, tiny_tokenizer(), engine_of("llama", ("nll",))[0].config)


def test_selectors_of_both_kinds_are_loaded_with_their_heads(samples, tmp_path):
    base = save_tiny_base(tmp_path / "base")
    selector = save_selector(tmp_path / "gates", base)
    for folder in (selector, EMBEDDED_SELECTOR):
        engine = ScoringEngine.from_pretrained(folder, device="cpu", signals=SIGNALS)
        plain = ScoringEngine.from_pretrained(folder, device="cpu")
        scored = engine.score(samples)
        assert engine.signal_sizes == {"nll": 1, "pmi": 1, "vector": len(scored[0].signals.vector)}
        assert plain.signal_sizes == {}
        assert [row.score for row in scored] == [row.score for row in plain.score(samples)]
        assert all(row.signals.pmi is not None for row in scored)
