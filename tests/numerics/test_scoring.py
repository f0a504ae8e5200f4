"""A sample has one score: alone, in any batch, at any place, by the slow way and the fast one."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from selectmoe.data.packing import collate_padded, pad_samples_closely
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ConfigError, ModelError
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample, ScoredSample, UnscoredSample
from selectmoe.scoring.calibration import save_calibration
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.scoring.formulas import SCORE_FORMULAS, good_margins, layer_scores, sample_scores
from tests.calibrations import raw_calibration

TOLERANCE = 1e-5  # float32; looser would hide a mask that leaks


@pytest.fixture(scope="module")
def engine():
    return ScoringEngine.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def samples():
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return rows[::12]


def scores(engine, samples):
    return np.array([scored.score for scored in engine.score(samples)])


def test_score_does_not_depend_on_batch_mates_or_place(engine, samples):
    together = scores(engine, samples)
    alone = np.concatenate([scores(engine, [sample]) for sample in samples])
    backwards = scores(engine, samples[::-1])[::-1]
    np.testing.assert_allclose(alone, together, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(backwards, together, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("budget", [64, 1_000, 50_000])
def test_score_does_not_depend_on_the_token_budget(engine, samples, budget):
    other = ScoringEngine.from_pretrained(device="cpu", max_tokens_per_batch=budget)
    np.testing.assert_allclose(
        scores(other, samples), scores(engine, samples), rtol=0, atol=TOLERANCE
    )


def test_score_does_not_depend_on_the_packer(engine, samples):
    rows = engine.tokenizer.tokenize(samples)
    closely = [row.score for row in engine.score_tokenized(rows, packer=pad_samples_closely)]
    np.testing.assert_allclose(closely, scores(engine, samples), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("formula", ["original", "answer_probability"])
def test_scores_of_tokens_average_to_the_score_of_the_sample(samples, formula):
    # Those of margins do as well, where a margin is not so large that its score is exactly 1:
    # tests/unit/test_gate_scores.py.
    engine = ScoringEngine.from_pretrained(device="cpu", formula=formula)
    tokenized = engine.tokenizer.tokenize(samples[:6])
    for sample, found in zip(tokenized, engine.score_each_token(tokenized), strict=True):
        [alone] = engine.score_tokenized([sample])
        assert found.sample.score == pytest.approx(alone.score, abs=TOLERANCE)
        assert len(found.token_scores) == len(sample.token_ids)
        counts = sample.answer_mask if engine.formula.tokens == "answer" else slice(None)
        assert found.token_scores[counts].mean() == pytest.approx(alone.score, abs=TOLERANCE)


@pytest.mark.parametrize("formula", SCORE_FORMULAS)
def test_engine_equals_the_whole_causal_model_with_a_mask_and_left_padding(samples, formula):
    engine = ScoringEngine.from_pretrained(device="cpu", formula=formula, length="raw")
    model = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32).eval()
    rows = engine.tokenizer.tokenize(samples[:4])
    batch = collate_padded(rows, np.arange(len(rows)))
    shift = [int((~mask).sum()) for mask in batch.attention_mask]
    ids, attention, answers = (
        torch.from_numpy(np.stack([np.roll(row, n) for row, n in zip(array, shift, strict=True)]))
        for array in (batch.token_ids, batch.attention_mask, batch.answer_mask)
    )
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=attention.long(), output_router_logits=True)
    logits_LBT2 = torch.stack([layer["quality_logits"] for layer in output.router_logits])
    mask = answers if SCORE_FORMULAS[formula].tokens == "answer" else attention
    by_layer = layer_scores(good_margins(logits_LBT2), mask, SCORE_FORMULAS[formula])
    expected = sample_scores(by_layer, SCORE_FORMULAS[formula]).numpy()
    np.testing.assert_allclose(scores(engine, samples[:4]), expected, rtol=0, atol=TOLERANCE)


def test_last_layers_experts_change_nothing(engine, samples):
    whole = ScoringEngine.from_pretrained(device="cpu")
    whole.model.layers[-1].mlp.gate_only = False
    np.testing.assert_array_equal(scores(whole, samples), scores(engine, samples))


def test_saved_gate_weights_reproduce_the_score(engine, samples, tmp_path):
    trained = ScoringEngine.from_pretrained(device="cpu", length="raw")
    with torch.no_grad():
        for layer in trained.model.layers:
            layer.mlp.quality_gate.weight.mul_(1.5)
    file = save_gate_weights(trained.model, tmp_path)
    assert file.stat().st_size < 100_000
    loaded = ScoringEngine.from_pretrained(device="cpu", model_checkpoint_path=tmp_path)
    np.testing.assert_array_equal(scores(loaded, samples), scores(trained, samples))
    assert not np.array_equal(scores(loaded, samples), scores(engine, samples))


def test_scores_lie_between_0_and_1_and_count_their_tokens(engine, samples):
    for scored in engine.score(samples):
        assert isinstance(scored, ScoredSample)
        assert 0 < scored.score < 1
        assert 0 < scored.num_answer_tokens < scored.num_tokens


def test_a_question_that_fills_the_context_is_refused_as_stage_3_refuses_it():
    engine = ScoringEngine.from_pretrained(device="cpu", max_sequence_length=32)
    cut = Sample("d", "1", (Message("user", "why " * 100), Message("assistant", "So.")))
    answered = Sample("d", "2", (Message("user", "Why?"), Message("assistant", "so " * 100)))
    refused, scored = engine.score([cut, answered])
    assert isinstance(refused, UnscoredSample)
    assert refused.reason == "no_answer_token"
    assert refused.detail.startswith("none of its first 32 tokens is the assistant's")
    assert scored.truncated
    assert 0 < scored.num_answer_tokens < scored.num_tokens == 32


def test_a_number_that_is_not_finite_is_no_score(samples):
    broken = ScoringEngine.from_pretrained(device="cpu")
    with torch.no_grad():
        broken.model.layers[0].mlp.quality_gate.bias.fill_(float("nan"))
    [outcome] = broken.score(samples[:1])
    assert isinstance(outcome, UnscoredSample)
    assert outcome.reason == "score_not_finite"


def test_a_sample_that_the_template_refuses_leaves_its_neighbours_alone(samples):
    engine = ScoringEngine.from_pretrained(device="cpu")
    expected = scores(engine, samples[:2])
    engine.tokenizer.template = (
        "{% if messages[0]['content'] is defined and messages | length == 1 %}"
        "{{ raise_exception('one turn') }}{% endif %}" + engine.tokenizer.template
    )
    lonely = Sample("d", "lonely", (Message("assistant", "Hello there."),))
    first, refused, second = engine.score([samples[0], lonely, samples[1]])
    assert isinstance(refused, UnscoredSample)
    assert refused.reason == "chat_template"
    np.testing.assert_allclose([first.score, second.score], expected, atol=TOLERANCE)


def test_an_unknown_formula_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"answer_margin.*got 'best'"):
        ScoringEngine.from_pretrained(device="cpu", formula="best")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        ScoringEngine.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(ModelError, match=r"convert it with 'python jobs/convert\.py"):
        ScoringEngine.from_pretrained(tmp_path)


def test_bfloat16_keeps_the_order(engine, samples):
    half = ScoringEngine.from_pretrained(device="cpu", dtype="bfloat16")
    ranks = [np.argsort(np.argsort(scores(e, samples))) for e in (engine, half)]
    # 8 bits of mantissa leave ranks of close scores to chance; .95 is far from chance.
    assert np.corrcoef(*ranks)[0, 1] > 0.95


def test_ids_do_not_matter(engine, samples):
    renamed = [dataclasses.replace(sample, sample_id="x") for sample in samples]
    np.testing.assert_array_equal(scores(engine, renamed), scores(engine, samples))


# peft asks for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_stage_1_scores_as_the_model_that_it_is_on(samples, tmp_path):
    model = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["quality_gate"],
            init_lora_weights=False,
        ),
    )  # fmt: skip
    for name, parameter in adapted.named_parameters():
        if "quality_gate.modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = ScoringEngine.from_pretrained(model_checkpoint_path=tmp_path)
    direct = ScoringEngine(adapted.base_model.model.model, merged.tokenizer.tokenizer)
    plain = ScoringEngine.from_pretrained()
    ours, theirs, before = (
        np.array([scored.score for scored in engine.score(samples)])
        for engine in (merged, direct, plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # merged sums round otherwise
    assert np.abs(ours - before).max() > 1e-3


def test_an_adapter_of_another_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["x"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="is not an adapter of this model"):
        ScoringEngine.from_pretrained(model_checkpoint_path=tmp_path)


def stored_calibration(folder, engine, scores_N, **changes):
    """Beside the weights, as stage 1 leaves it."""
    facts = {
        "formula": engine.config.formula,
        "max_sequence_length": engine.tokenizer.max_sequence_length,
        "weights_hash": engine.weights_hash(),
        "corpus": {"demo": len(scores_N)},
    }
    return save_calibration(folder, raw_calibration(scores_N, **facts | changes))


def test_percentiles_of_the_calibrations_own_scores_are_uniform(engine, samples, tmp_path):
    """In the file's folder, whether that is the model's or the one of stage 1's weights."""
    gates = save_gate_weights(engine.model, tmp_path)
    trained = ScoringEngine.from_pretrained(device="cpu", model_checkpoint_path=tmp_path)
    scores_N = scores(trained, samples)
    stored_calibration(tmp_path, trained, scores_N)
    assert trained.calibration is None  # it was loaded before
    loaded = ScoringEngine.from_pretrained(device="cpu", model_checkpoint_path=gates)
    found = np.sort(loaded.calibration.percentiles(scores(loaded, samples)))
    middles = 100 * (np.arange(len(samples)) + 0.5) / len(samples)
    np.testing.assert_allclose(found, middles, rtol=0, atol=0.1)  # between two quantiles


def test_a_calibration_of_other_weights_or_another_formula_gives_no_percentile(
    engine, samples, tmp_path, caplog
):
    save_gate_weights(engine.model, tmp_path)
    load = functools.partial(
        ScoringEngine.from_pretrained, device="cpu", model_checkpoint_path=tmp_path
    )
    scores_N = scores(engine, samples)
    file = stored_calibration(tmp_path, load(), scores_N, weights_hash="0" * 64)
    assert load().calibration is None
    assert "was made for weights with the SHA-256 000000000000…" in caplog.text
    stored_calibration(tmp_path, load(), scores_N)
    assert load().calibration is not None
    assert load(formula="original").calibration is None
    assert "was made for the formula answer_margin, and scores are by original" in caplog.text
    file.write_text("{")
    with pytest.raises(ModelError, match=r"calibration\.json: not valid JSON"):
        load()


def test_the_embedded_selector_has_a_calibration_of_its_own(engine, samples):
    """Made anew with the weights: recipes/train_tiny_selector.py."""
    assert engine.calibration is not None
    found = engine.calibration.percentiles(scores(engine, samples))
    assert np.ptp(found) > 30  # good and bad rows; a table of other scores would lie at an end


def test_real_rows_have_percentiles_from_0_to_100_alike(engine, shared_data):
    """Of the corpus that the embedded selector was calibrated on, other rows among them."""
    rows = read_corpus(str(shared_data / "instructions" / "dolly.jsonl"))
    dolly = [row for row in itertools.islice(rows, 150) if isinstance(row, Sample)]
    scored = [row.score for row in engine.score(dolly) if isinstance(row, ScoredSample)]
    found = engine.calibration.percentiles(scored)
    # One data set of several: its mean is not 50, but a table of other scores would be at an end.
    assert 20 < found.mean() < 80
    assert found.std() > 15  # uniform: 29


def test_a_dictionary_is_scored_as_the_row_of_a_corpus(engine):
    question, answer = "Why is the sky blue?", "Air scatters blue light more than red."
    sample = Sample("d", "1", (Message("user", question), Message("assistant", answer)))
    rows = [
        {"prompt": question, "response": answer, "category": "sky"},
        {"prompt": question},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"instruction": question, "input": "", "output": "\u200b", "id": 7},
    ]
    expected, prompt, broken, talk, empty = engine.score([sample, *rows])
    assert prompt.score == talk.score == expected.score
    assert (broken.sample_id, broken.reason) == ("samples:3", "unknown_layout")
    assert (empty.sample_id, empty.reason) == ("7", "empty_answer")


def test_reasoning_is_scored_and_an_untrained_answer_is_not(engine):
    turns = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Air scatters blue light more than red."},
    ]
    doubt = {"role": "assistant", "content": "Dunno lol."}
    plain, thought, trained, untrained = engine.score(
        [
            {"messages": turns},
            {"messages": [turns[0], turns[1] | {"thinking": "Rayleigh."}]},
            {"messages": [turns[0], doubt, *turns]},
            {"messages": [turns[0], doubt | {"weight": 0}, *turns]},
        ]
    )
    assert thought.num_answer_tokens > plain.num_answer_tokens
    assert thought.score != plain.score
    assert untrained.num_answer_tokens == plain.num_answer_tokens < trained.num_answer_tokens
    assert untrained.num_tokens == trained.num_tokens
