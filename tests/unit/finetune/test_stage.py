"""Finetuning of tiny real models: what is learned, what a checkpoint holds, what stops a run."""

import dataclasses
import math
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from selectmoe.config.lora import LoraSettings
from selectmoe.errors import (
    ModelError,
    NotEnoughMemoryError,
    ResumeError,
    TrainingStoppedError,
    list_names,
)
from selectmoe.finetune.stage import (
    load_target,
    num_optimizer_steps,
    require_vocabulary,
)
from selectmoe.finetune.supervised_data import StepOrder, SupervisedRows
from selectmoe.model.quiet_loading import register_select_moe
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.training.worker import TrainingWorker
from tests.finetune_run import LORA, NUM_ROWS, Run, assert_same, spoiled
from tests.tiny_olmoe import save_tiny_olmoe
from tests.tiny_target import conversation, save_tiny_llama, write_rows


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("target") / "llama")


def test_the_answers_are_learned_and_every_step_is_in_the_metrics(llama, tmp_path):
    run = Run(tmp_path, llama, num_epochs=6)
    report = run.train()
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == list(range(1, 31))
    assert all(math.isfinite(line[key]) for line in metrics for key in ("loss", "grad_norm"))
    assert all(line["tokens_per_second"] > 0 for line in metrics)
    # 5.94 at first, about log(320) and less only by learning; 4.2 after these steps.
    assert report.loss < 0.8 * metrics[0]["loss"]
    assert (report.checkpoint, report.num_steps) == ("checkpoint-30", 30)
    # 2 layers with 4 projections: 32 x 32, 16 x 32 twice for grouped keys and values, 32 x 32.
    assert report.num_trained_parameters == 2 * 4 * (64 + 48 + 48 + 64)
    assert list((run.output / "tensorboard").glob("events.*"))


def test_the_schedule_warms_up_linearly_and_ends_at_zero(llama, tmp_path):
    run = Run(tmp_path, llama, warmup_ratio=0.2)
    run.train()
    rates = [line["learning_rate"] for line in run.metrics()]
    expected = [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]  # the next would be 0
    assert rates == pytest.approx([1e-2 * share for share in expected])


@pytest.mark.parametrize("save_steps", [3, None])
def test_a_resumed_run_ends_with_the_same_adapter_to_the_last_bit(llama, tmp_path, save_steps):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                raise KeyboardInterrupt

    whole = Run(tmp_path / "whole", llama, save_steps=save_steps)
    interrupted = Run(tmp_path / "interrupted", llama, save_steps=save_steps)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(callbacks=[Interrupt()])
    # Checkpoint 6 lies within the second epoch, 5 between the two.
    interrupted.train(resume_from=f"checkpoint-{6 if save_steps else 5}")
    assert_same(whole.adapter("checkpoint-10"), interrupted.adapter("checkpoint-10"))
    later = {line["step"]: line["loss"] for line in interrupted.metrics()}
    assert later == {line["step"]: line["loss"] for line in whole.metrics()}


def test_a_finished_run_resumes_to_the_same_report(llama, tmp_path):
    run = Run(tmp_path, llama, num_epochs=1)
    report, before = run.train(), run.metrics()
    again = run.train(resume_from=report.checkpoint)
    assert (again.loss, again.num_steps) == (report.loss, report.num_steps)
    assert run.metrics() == before


@pytest.fixture(params=["llama", "olmoe", "embedded"])
def target(request, tmp_path):
    """A folder, and None for the selector in the package."""
    if request.param == "embedded":
        return None
    return {"llama": save_tiny_llama, "olmoe": save_tiny_olmoe}[request.param](tmp_path / "target")


# peft asks transformers by a name that is deprecated there.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_checkpoint_that_computes_what_was_trained(target, tmp_path):
    trained = []

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **_):
            trained.append(model)

    run = Run(tmp_path, target, num_epochs=1)
    report = run.train(callbacks=[Keep()])
    register_select_moe()
    forced_open = {} if target else {"quality_gate_forced_open": True}
    base = AutoModelForCausalLM.from_pretrained(
        target or EMBEDDED_SELECTOR, dtype=torch.float32, **forced_open
    )
    before = base(torch.arange(4, 30)[None]).logits
    adapted = PeftModel.from_pretrained(base, run.output / report.checkpoint).eval()
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        expected = trained[0].eval()(ids).logits
        # float32 sums in the same order; only a lost or misplaced tensor would show.
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3  # the adapter does something
    tokenizer = AutoTokenizer.from_pretrained(run.output / report.checkpoint)
    assert tokenizer.chat_template


def test_a_step_does_not_depend_on_how_its_rows_are_batched(llama, tmp_path):
    """Neighbours in a batch, its padding, and the split into batches leave no trace."""
    lora = dataclasses.replace(LORA, lora_dropout=0.0)
    adapters = []
    for batch_size in (1, 4):
        run = Run(tmp_path / str(batch_size), llama, batch_size=batch_size, lora=lora)
        adapters.append(run.adapter(run.train().checkpoint))
    # Weights move by up to 1e-2 a step; float32 sums in another order differ by about 1e-6, which
    # AdamW can enlarge where a gradient is near zero. A leak would move them by whole steps.
    assert_same(*adapters, atol=2e-4)


def test_a_long_gradient_is_shortened(llama, tmp_path):
    adapters = []
    for name, norm in (("clipped", 1e-3), ("whole", 1e3)):
        run = Run(tmp_path / name, llama, max_grad_norm=norm, num_epochs=1)
        adapters.append(run.adapter(run.train().checkpoint))
        assert run.metrics()[0]["grad_norm"] > 1e-2  # as it was before
    # AdamW cares little for a gradient's size, but does for sizes that differ from step to step.
    assert any((adapters[0][name] != adapters[1][name]).any() for name in adapters[0])


def test_gradient_checkpointing_changes_nothing_but_memory(llama, tmp_path):
    adapters = []
    for name, checkpointing in (("with", True), ("without", False)):
        run = Run(tmp_path / name, llama, gradient_checkpointing=checkpointing, num_epochs=1)
        adapters.append(run.adapter(run.train().checkpoint))
    assert_same(*adapters)


def test_the_adapter_is_float32_whatever_the_targets_numbers_are(llama, tmp_path):
    run = Run(tmp_path, llama, dtype="bfloat16", num_epochs=1)
    adapter = run.adapter(run.train().checkpoint)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    worker = TrainingWorker(output=tmp_path, scratch=tmp_path)
    assert load_target(run.config, str(llama), worker).dtype == torch.bfloat16


def test_experts_take_an_adapter_of_their_own(tmp_path):
    olmoe = save_tiny_olmoe(tmp_path / "olmoe")
    lora = LoraSettings(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules=("q_proj", "experts.down_proj")
    )
    run = Run(tmp_path, olmoe, num_epochs=1, lora=lora)
    names = run.adapter(run.train().checkpoint)
    assert any("mlp.experts" in name for name in names)
    assert any("q_proj" in name for name in names)


def test_the_embedded_target_has_its_gates_forced_open_and_no_loss_but_the_tokens(tmp_path):
    run = Run(tmp_path, None)
    worker = TrainingWorker(output=tmp_path, scratch=tmp_path)
    target = load_target(run.config, str(EMBEDDED_SELECTOR), worker)
    assert target.config.quality_gate_forced_open
    for layer in target.model.layers:
        assert layer.mlp.forced_open
    lora = dataclasses.replace(LORA, lora_dropout=0.0)
    training = dataclasses.replace(run.config.training, lora=lora, num_epochs=1)
    run.config = dataclasses.replace(run.config, training=training)
    run.train()
    rows = SupervisedRows(run.output)
    first_step = list(StepOrder(rows.lengths, rows_per_step=4, seed=0))[:4]
    batch = rows.batch(first_step)
    with torch.no_grad():
        logits = target(input_ids=batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    # A new adapter changes nothing, so the first step's loss is the target's own.
    assert run.metrics()[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(llama, tmp_path):
    run = Run(tmp_path, spoiled(llama, tmp_path), batch_size=1)
    with pytest.raises(TrainingStoppedError, match=r"step \d: the loss .* rows 'row-7';"):
        run.train()
    assert not (run.output / "checkpoint-10").exists()


def test_a_gradient_that_is_no_number_stops_the_run_too(llama, tmp_path):
    # A new adapter adds 0 whatever its scale, but its gradient has a square beyond float32.
    lora = LoraSettings(r=1, lora_alpha=3 * 10**38, lora_dropout=0.1)
    run = Run(tmp_path, llama, lora=lora)
    with pytest.raises(TrainingStoppedError, match=r"step 1: the gradient .*('row-\d+'(, |;)){4}"):
        run.train()


def test_a_checkpoint_of_another_configuration_is_refused(llama, tmp_path):
    run = Run(tmp_path, llama)
    run.train()
    other = Run(tmp_path, llama, lora=dataclasses.replace(LORA, r=8))
    with pytest.raises(ResumeError, match=r"training\.lora\.r is 4 there and 8 here"):
        other.train(resume_from="checkpoint-5")
    write_rows(run.rows_file, [conversation(n + 1) for n in range(NUM_ROWS)])
    shutil.rmtree(run.output / "tokenized")
    with pytest.raises(ResumeError, match="another configuration: rows_sha256 is"):
        run.train(resume_from="checkpoint-5")
    (run.output / "checkpoint-5" / "finetune.json").unlink()
    with pytest.raises(ResumeError, match="not a complete checkpoint"):
        run.train(resume_from="checkpoint-5")


def test_too_little_memory_is_found_before_a_weight_is_read(llama, tmp_path):
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    shutil.copy(llama / "config.json", weightless)
    run = Run(tmp_path, weightless, effective_batch_size=10**9, batch_size=10**9)
    with pytest.raises(NotEnoughMemoryError, match=r"needs at least .* lower training\.batch_size"):
        run.train()
    with pytest.raises(ModelError, match="cannot be loaded"):  # now the weights are missed
        Run(tmp_path, weightless).train()


def test_a_tokenizer_of_another_model_is_refused(llama, tmp_path):
    small = save_tiny_llama(tmp_path / "small", vocab_size=40)
    run = Run(tmp_path, small)
    with pytest.raises(ModelError, match=r"token ids up to \d+, .* vocab_size of 40"):
        run.train()
    run = Run(tmp_path, llama)
    run.train()
    model = AutoModelForCausalLM.from_pretrained(llama)
    require_vocabulary(model, SupervisedRows(run.output), "llama")


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_workers", "num_batches", "expected"),
    [(20, 2, 1, 2, 5), (21, 2, 1, 2, 6), (20, 2, 2, 1, 5), (21, 2, 2, 1, 6), (3, 4, 1, 8, 1)],
)
def test_the_last_step_of_an_epoch_may_have_fewer_rows(
    num_rows, batch_size, num_workers, num_batches, expected
):
    steps = num_optimizer_steps(
        num_rows,
        batch_size=batch_size,
        num_workers=num_workers,
        num_batches_per_step=num_batches,
    )
    assert steps == expected


def test_of_many_rows_a_few_are_named():
    assert list_names([str(n) for n in range(3)]) == "'0', '1', '2'"
    assert list_names([str(n) for n in range(10)]).endswith("'7' and 2 more")
