"""A transformers.Trainer for the gates: batches of any size, small checkpoints, NaN checks."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selectmoe.errors import TrainingStoppedError, list_names
from selectmoe.model.gate_weights import load_gate_weights, save_gate_weights
from selectmoe.training.sharding import ShardableTrainer, average_gradients
from selectmoe.warmup.gate_objectives import Objective
from selectmoe.warmup.gate_statistics import CollapseWatch, GateStatistics
from selectmoe.warmup.step_batches import MicroBatch, StepBatches


class GateTrainer(ShardableTrainer):
    """Trains with an Objective on StepBatches.

    keeps_gates_alone: a checkpoint holds the gates instead of the whole frozen model; False for an
    adapter, which saves itself. is_sharded: `shard_frozen` has sharded the model.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        objective: Objective,
        keeps_gates_alone: bool,
        is_sharded: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, is_sharded=is_sharded, **kwargs)
        self.objective: Objective = objective
        self.keeps_gates_alone = keeps_gates_alone
        self.collapse_watch = CollapseWatch()
        self._start_statistics()

    def get_train_dataloader(self) -> DataLoader[list[MicroBatch]]:
        """The batches of StepBatches as they are: each worker has its share already, and a resumed
        run skips none, since `first_step` says where it continues."""
        assert isinstance(self.train_dataset, StepBatches)
        return DataLoader(self.train_dataset, batch_size=None)

    def training_step(
        self,
        model: nn.Module,
        inputs: Sequence[MicroBatch],  # type: ignore[override]
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Computes the gradients of one optimizer step. The mean of the returned losses over all
        workers is the loss of the step."""
        model.train()
        num_workers = self.accelerator.num_processes
        losses: list[Tensor] = []
        batches = self._same_number_on_all(inputs)
        for number, on_host in enumerate(batches, start=1):
            batch = on_host.to(self.args.device)
            # DDP averages the gradients over workers once per step, with the last batch.
            is_last = number == len(batches)
            syncs = is_last or self.is_sharded
            syncing = contextlib.nullcontext() if syncs else self.accelerator.no_sync(model)
            with syncing:
                loss = self.objective(model, batch)
                self.accelerator.backward(num_workers * loss.loss)
            if batch.share_of_step:
                self.statistics.add(loss, batch, num_tokens=on_host.num_tokens)
            losses.append(loss.loss.detach())
        if self.is_sharded:
            average_gradients(model)
        losses_of_step = torch.stack(losses)
        self._require_finite(model, losses_of_step, batches)
        self.statistics.num_steps += 1
        step_loss: Tensor = num_workers * losses_of_step.sum()
        return step_loss

    def _same_number_on_all(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The same number of batches on every worker: FSDP gathers its shards once per batch, on
        all workers together. A worker with fewer batches repeats its last one with weight 0."""
        if not self.is_sharded:
            return list(batches)
        most = torch.tensor([len(batches)], device=self.args.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        idle = dataclasses.replace(batches[-1], share_of_step=0.0)
        return [*batches, *[idle] * (int(most.item()) - len(batches))]

    def _require_finite(
        self, model: nn.Module, losses: Tensor, batches: Sequence[MicroBatch]
    ) -> None:
        """Raises TrainingStoppedError, on all workers, where one of them has a bad batch.

        Checked before Trainer's clipping, which turns a gradient of infinite norm into 0.
        """
        is_bad = ~losses.isfinite()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        num_bad = is_bad.sum() + ~norm.isfinite()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(num_bad)
        if not num_bad.item():
            return
        bad = [batch for batch, flag in zip(batches, is_bad.tolist(), strict=True) if flag]
        ids = gather_object([sample_id for batch in bad for sample_id in batch.sample_ids])
        what = "loss" if ids else "gradient"
        ids = ids or gather_object([sample_id for b in batches for sample_id in b.sample_ids])
        raise TrainingStoppedError(
            f"the {what} of step {self.state.global_step + 1} is not a finite number, in the batch "
            f"of the samples {list_names(ids)}; the gates are not saved"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the statistics of the gates since the last log."""
        if self.statistics.num_steps and "loss" in logs:
            seconds = time.perf_counter() - self._last_log
            num_workers = self.accelerator.num_processes
            logs |= self.statistics.to_logs(num_workers=num_workers, seconds=seconds)
            self._start_statistics()
        super().log(logs, start_time)
        if "loss" in logs:
            self.collapse_watch.check(logs)

    def _start_statistics(self) -> None:
        model: Any = self.model
        num_gates = getattr(model, "num_gates", None) or model.config.num_hidden_layers
        self.statistics = GateStatistics(num_gates, self.args.device)
        self._last_log = time.perf_counter()

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ANN401
        """Not counted: Trainer's implementation expects a dictionary."""
        return 0

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.keeps_gates_alone:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            gates: Any = self.model
            save_gate_weights(gates, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.keeps_gates_alone:
            gates: Any = self.model
            load_gate_weights(gates, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
