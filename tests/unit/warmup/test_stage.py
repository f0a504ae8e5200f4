"""Warm-up on the embedded selector, by the same function that a worker of the job runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback

from selectmoe.config.warmup import TrainingConfig, WarmupConfig, WarmupDatasetConfig
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ConfigError, ModelError, NotEnoughMemoryError, TrainingStoppedError
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Sample
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.gate_model import (
    load_gated_model,
    prepare_trainee,
    renew_gates,
    require_memory,
)
from selectmoe.warmup.gate_objectives import row_margins
from selectmoe.warmup.step_batches import StepBatches, StepSettings, TrainingRows
from tests.warmup_run import warm_up

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """48 clean rows of the demo corpus."""
    lines = DEMO_CORPUS.read_text("utf-8").splitlines()
    clean = [line for line in lines if json.loads(line)["dataset"] == "demo"][:48]
    file = tmp_path_factory.mktemp("corpus") / "clean.jsonl"
    file.write_text("\n".join(clean) + "\n", "utf-8")
    return file


@pytest.fixture
def samples(corpus):
    return [row for row in read_corpus(str(corpus)) if isinstance(row, Sample)]


def settings_of(corpus: Path, *, model: Path | None = None, seed: int = 0, **training):
    defaults = {
        "num_steps": 4, "effective_batch_size": 4, "max_tokens_per_batch": 256, "logging_steps": 2,
        "save_steps": 100, "quality_gate_init_bias": 4.0,
    }  # fmt: skip
    return WarmupConfig(
        model=str(model) if model else None,
        dataset=WarmupDatasetConfig(paths=(str(corpus),), subset_ratio=1.0, max_sequence_length=96),
        training=TrainingConfig(**{**defaults, **training}),
        seed=seed,
        max_rejected=1.0,  # at so few tokens some rows end before their answer
    )


def worker_at(folder: Path, **settings) -> TrainingWorker:
    return TrainingWorker(output=folder, scratch=folder / "scratch", **settings)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stored_model() -> dict[str, torch.Tensor]:
    model = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    return {name.removeprefix("model."): t for name, t in model.state_dict().items()}


class StopAt(TrainerCallback):
    """Ends a run at a step, as a kill would, with that step's checkpoint written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = (
            control.should_training_stop or state.global_step == self.step
        )


def fresh_decoder() -> SelectMoeModel:
    """The embedded selector with gates as they start: it has unlearned everything."""
    model = SelectMoeModel.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    renew_gates(model, seed=0)
    return model


def test_backward_reaches_every_gate_and_keeps_no_activation_of_the_frozen_model(samples):
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR), max_sequence_length=64)
    settings = StepSettings(
        effective_batch_size=4, max_tokens_per_batch=1_024, kinds=("truncated",),
        full_sequence_prediction=False, seed=0,
    )  # fmt: skip
    [batch] = StepBatches(TrainingRows(samples, chat.tokenize(samples)), chat, settings).step(0)
    fresh = fresh_decoder()
    trainee = prepare_trainee(fresh, TrainingConfig(), name="m", seed=0)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        trainee.objective(trainee.model, batch).loss.backward()
    gates = [layer.mlp.quality_gate.weight for layer in fresh.layers]
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)
    hidden_sized = [shape for shape in saved if shape and shape[-1] == fresh.config.hidden_size]
    # What a gate needs for its own gradient: its input. The attention and experts save nothing.
    assert len(hidden_sized) <= 2 * len(gates)


def test_a_resumed_run_ends_with_the_gates_of_an_uninterrupted_one(corpus, tmp_path):
    config = settings_of(corpus, num_steps=20, save_steps=10, logging_steps=5, learning_rate=2e-2)
    whole, stopped, resumed = (tmp_path / name for name in ("whole", "stopped", "resumed"))
    warm_up(config, worker_at(whole))
    warm_up(config, worker_at(stopped, callbacks=(StopAt(10),)))
    checkpoint = stopped / "scratch" / "checkpoint-10"
    assert sorted(file.name for file in checkpoint.glob("*.safetensors")) == [
        "full_rank_weights.safetensors"
    ]
    warm_up(config, worker_at(resumed, resume_from=str(checkpoint)))
    gates, again = (load_file(f / "full_rank_weights.safetensors") for f in (whole, resumed))
    at_ten = load_file(checkpoint / "full_rank_weights.safetensors")
    name = "layers.0.mlp.quality_gate.weight"
    assert (gates[name] - at_ten[name]).abs().max() > 1e-3  # the second half did something
    for name, tensor in gates.items():
        # The same sums in the same order: only the weights' way through a file lies between.
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)
    assert [row["step"] for row in metrics(resumed)] == [15, 20]
    for ours, theirs in zip(metrics(resumed), metrics(whole)[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_lines_of_steps_that_are_done_again_are_dropped_from_the_metrics(corpus, tmp_path):
    config = settings_of(corpus, num_steps=8, save_steps=4)
    warm_up(config, worker_at(tmp_path, callbacks=(StopAt(6),)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a kill in the middle of a line
    checkpoint = str(tmp_path / "scratch" / "checkpoint-4")
    warm_up(config, worker_at(tmp_path, resume_from=checkpoint))
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4, 6, 8]


def test_a_finished_run_is_not_trained_further(corpus, tmp_path):
    config = settings_of(corpus, num_steps=4, save_steps=4)
    warm_up(config, worker_at(tmp_path / "first"))
    checkpoint = tmp_path / "first" / "scratch" / "checkpoint-4"
    warm_up(config, worker_at(tmp_path / "second", resume_from=str(checkpoint)))
    first, second = (
        (tmp_path / run / "full_rank_weights.safetensors").read_bytes()
        for run in ("first", "second")
    )
    assert first == second


def test_two_shares_of_a_step_have_the_gradient_of_the_whole_step(samples):
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR), max_sequence_length=64)
    rows = TrainingRows(samples, chat.tokenize(samples))

    def gradient(training: TrainingConfig, num_workers: int) -> torch.Tensor:
        model = load_gated_model(EMBEDDED_SELECTOR, training, uses_gpu=False, seed=0)
        trainee = prepare_trainee(model, training, name="m", seed=0)
        for rank in range(num_workers):
            settings = StepSettings(
                effective_batch_size=5, max_tokens_per_batch=256, kinds=("repeated",), seed=3,
                rank=rank, full_sequence_prediction=False, num_workers=num_workers,
            )  # fmt: skip
            for batch in StepBatches(rows, chat, settings).step(7):
                trainee.objective(trainee.model, batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in trainee.model.parameters() if p.requires_grad])

    for training in (TrainingConfig(), TrainingConfig(train_moe_gates=True)):
        # Relative to the largest entry: float32 sums in another order, and no more.
        alone, shared = gradient(training, 1), gradient(training, 2)
        assert (alone - shared).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize(
    "loss",
    [
        "sigmoid", "linear", "mse", "beta_moment_matching", "mean_variance_regularization",
        "contrastive",
    ],
)  # fmt: skip
def test_every_loss_trains_the_gates_and_logs_its_parts(corpus, tmp_path, loss):
    config = settings_of(corpus, quality_loss_type=loss, learning_rate=1e-2)
    report = warm_up(config, worker_at(tmp_path))
    first, last = metrics(tmp_path)
    parts = {"label_loss", "ranking_loss"} if loss == "contrastive" else {"lm_loss", "quality_loss"}
    layers = {f"good_probability_layer_{n:02d}" for n in range(NUM_LAYERS)}
    assert parts | layers | {"grad_norm", "tokens_per_second", "good_probability"} <= set(last)
    assert first["good_probability"] == pytest.approx(0.98, abs=0.02)  # sigmoid(4), as gates start
    before, after = stored_model(), load_file(report.weights)
    assert all(not torch.equal(after[name], before[name]) for name in after if "quality" in name)
    assert all(torch.equal(after[name], before[name]) for name in after if ".mlp.gate." in name)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_parts_of_the_loss_add_up_to_it(corpus, tmp_path):
    warm_up(
        settings_of(corpus, quality_loss_weight=0.7, train_moe_gates=True, label_weight=0.25,
                    enable_load_balancing=True),
        worker_at(tmp_path),
    )  # fmt: skip
    for row in metrics(tmp_path):
        contrast = 0.25 * row["label_loss"] + 0.75 * row["ranking_loss"]
        total = row["lm_loss"] + 0.01 * row["aux_loss"] + 0.7 * contrast
        assert row["loss"] == pytest.approx(total, rel=1e-5)  # float32 sums of a few numbers


@pytest.mark.parametrize(
    ("training", "moving"),
    [
        ({"train_moe_gates": True}, (".mlp.gate.", "quality_gate")),
        ({"train_moe_gates": True, "train_quality_gates": False}, (".mlp.gate.",)),
        ({"trash_expert_mode": "custom"}, (".trash_expert.", "quality_gate")),
    ],
)
def test_the_groups_that_are_switched_on_move_and_no_other(corpus, tmp_path, training, moving):
    if training.get("trash_expert_mode"):
        training = {**training, "quality_loss_type": "sigmoid"}  # its loss reaches the vector
    report = warm_up(settings_of(corpus, **training), worker_at(tmp_path))
    before, after = stored_model(), load_file(report.weights)
    unchanged = run_unchanged_gates(corpus, tmp_path)
    for name, tensor in after.items():
        start = before.get(name, torch.zeros_like(tensor))
        if "quality_gate" in name:
            start = unchanged[name]
        assert torch.equal(tensor, start) is not any(part in f".{name}" for part in moving), name


def run_unchanged_gates(corpus: Path, folder: Path) -> dict[str, torch.Tensor]:
    """New gates as `settings_of` asks for them, before any step counts."""
    config = settings_of(corpus, num_steps=1, learning_rate=1e-30)
    return load_file(warm_up(config, worker_at(folder / "unchanged")).weights)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_an_adapter_holds_the_gates_and_computes_what_was_trained(corpus, tmp_path):
    from peft import PeftModel

    config = settings_of(corpus, peft_mode="lora", train_moe_gates=True, learning_rate=1e-2)
    report = warm_up(config, worker_at(tmp_path))
    stored = load_file(Path(report.weights) / "adapter_model.safetensors")
    for part in ("lora_A", "lora_B", "quality_gate.weight", "quality_gate.bias", "mlp.gate.weight"):
        assert sum(part in name for name in stored) >= NUM_LAYERS, part
    base = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, report.weights)
        loaded = adapted(ids)
    assert (loaded.logits - before).abs().max() > 1e-3
    assert len(loaded.router_logits) == NUM_LAYERS
    logits = loaded.router_logits[0]["quality_logits"]
    gate = adapted.base_model.model.model.layers[0].mlp.quality_gate
    assert torch.equal(gate.modules_to_save["default"].weight, stored[
        "base_model.model.model.layers.0.mlp.quality_gate.weight"
    ])  # fmt: skip
    assert logits.shape == (1, 38, 2)


def test_an_adapter_run_is_resumed_to_the_same_adapter(corpus, tmp_path):
    config = settings_of(corpus, num_steps=6, save_steps=3, peft_mode="lora", learning_rate=1e-2)
    whole = warm_up(config, worker_at(tmp_path / "whole"))
    warm_up(config, worker_at(tmp_path / "stopped", callbacks=(StopAt(3),)))
    checkpoint = str(tmp_path / "stopped" / "scratch" / "checkpoint-3")
    again = warm_up(config, worker_at(tmp_path / "resumed", resume_from=checkpoint))
    first, second = (
        load_file(Path(r.weights) / "adapter_model.safetensors") for r in (whole, again)
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)  # as for the gates


def test_gates_of_a_bfloat16_model_are_trained_in_float32(corpus, tmp_path):
    report = warm_up(settings_of(corpus, dtype="bfloat16"), worker_at(tmp_path))
    gates = load_file(report.weights)
    assert {t.dtype for n, t in gates.items() if "quality_gate" in n} == {torch.float32}
    assert {t.dtype for n, t in gates.items() if ".mlp.gate." in n} == {torch.bfloat16}
    assert metrics(tmp_path)[-1]["grad_norm"] > 0


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(corpus, tmp_path):
    broken = tmp_path / "broken"
    model = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR)
    model.model.layers[1].post_attention_layernorm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR).save_pretrained(broken)
    config = settings_of(corpus, model=broken, quality_gate_init_bias=None)
    with pytest.raises(TrainingStoppedError) as stopped:
        warm_up(config, worker_at(tmp_path / "run"))
    message = str(stopped.value)
    assert "the loss of step 1 is not a finite number, in the batch of the samples" in message
    ids = {json.loads(line)["id"] for line in corpus.read_text("utf-8").splitlines()}
    assert sum(sample_id in message for sample_id in ids) >= 4
    assert not (tmp_path / "run" / "full_rank_weights.safetensors").exists()


def test_a_gradient_that_is_no_number_stops_the_run_too(corpus, tmp_path):
    # The loss is a float32 still; the squares of its gradient, which its length sums, are not.
    config = settings_of(corpus, quality_loss_weight=1e30)
    with pytest.raises(TrainingStoppedError, match=r"the gradient of step 1 .*('demo-.*){4}"):
        warm_up(config, worker_at(tmp_path))
    assert not (tmp_path / "full_rank_weights.safetensors").exists()


def test_gates_that_call_everything_good_stop_the_run(corpus, tmp_path):
    config = settings_of(
        corpus, quality_loss_type="linear", quality_gate_init_bias=12.0, learning_rate=1e-6,
        num_steps=20, logging_steps=1,
    )  # fmt: skip
    with pytest.raises(TrainingStoppedError, match="every layer keeps everything"):
        warm_up(config, worker_at(tmp_path))
    assert len(metrics(tmp_path)) == 3


def test_new_gates_follow_from_their_settings_and_the_seed(corpus, tmp_path):
    def gates(seed: int) -> dict[str, torch.Tensor]:
        config = settings_of(
            corpus, num_steps=1, learning_rate=1e-30, quality_gate_init_mean=0.5,
            quality_gate_init_std=0.1, quality_gate_init_bias=3.0, seed=seed,
        )  # fmt: skip
        return load_file(warm_up(config, worker_at(tmp_path / str(seed))).weights)

    first, other = gates(1), gates(2)
    name = "layers.3.mlp.quality_gate"
    assert first[f"{name}.bias"].tolist() == [1.5, -1.5]
    weights = torch.cat([first[n].flatten() for n in first if n.endswith("quality_gate.weight")])
    # Four standard errors of a thousand draws.
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.013)
    assert float(weights.std()) == pytest.approx(0.1, abs=0.009)
    assert not torch.equal(first[f"{name}.weight"], other[f"{name}.weight"])


def test_the_share_of_pairs_in_order_is_that_of_the_margins(samples):
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR), max_sequence_length=64)
    settings = StepSettings(
        effective_batch_size=4, max_tokens_per_batch=1_024, kinds=("truncated",),
        full_sequence_prediction=False, seed=0,
    )  # fmt: skip
    [batch] = StepBatches(TrainingRows(samples, chat.tokenize(samples)), chat, settings).step(0)
    model = SelectMoeModel.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    trainee = prepare_trainee(model, TrainingConfig(), name="m", seed=0)
    with torch.no_grad():
        loss = trainee.objective(trainee.model, batch)
        decoded = model(input_ids=batch.token_ids_BT, output_quality_logits=True)
    margins = row_margins(loss.margins_LBT, batch)
    first = batch.answer_mask_BT[0].nonzero().flatten().tolist()
    by_hand = sum(
        float(logits[0, t, 0] - logits[0, t, 1])
        for logits in decoded["quality_logits"] for t in first
    ) / (len(first) * NUM_LAYERS)  # fmt: skip
    assert float(margins[0]) == pytest.approx(by_hand, abs=1e-5)  # float32 means


def test_an_unknown_kind_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.corruptions must be among .*, got 'sarcasm'"):
        warm_up(settings_of(corpus, corruptions=("sarcasm",)), worker_at(tmp_path))


def test_weights_of_another_model_are_no_checkpoint_of_this_one(corpus, tmp_path):
    config = settings_of(corpus, num_steps=4, save_steps=2)
    warm_up(config, worker_at(tmp_path, callbacks=(StopAt(2),)))
    checkpoint = tmp_path / "scratch" / "checkpoint-2"
    file = checkpoint / "full_rank_weights.safetensors"
    save_file({"layers.99.mlp.quality_gate.weight": torch.zeros(2, 4)}, file)
    with pytest.raises(ModelError, match="the model has no tensor"):
        warm_up(config, worker_at(tmp_path / "next", resume_from=str(checkpoint)))


def test_a_model_that_cannot_fit_is_refused_with_numbers_before_its_weights_are_read():
    config = SelectMoeConfig(
        num_hidden_layers=1, num_experts=64, hidden_size=65_536, intermediate_size=65_536
    )
    with pytest.raises(NotEnoughMemoryError) as refused:
        require_memory(config, torch.float32, uses_gpu=False)
    assert re.search(r"at least [\d.]+ GB of memory for \d+\.\d\d billion", str(refused.value))
