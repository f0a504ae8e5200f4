"""Time and peak memory of a gate warm-up step, relative to inference on the same batch.

    python benchmarks/bench_training.py --data ../shared/data/instructions/dolly.jsonl

The step is the one of `jobs/pretrain.py` (`selectmoe.warmup.stage.train`; full_rank, gates only,
contrastive): forward, loss, backward, gradient clipping, optimizer step, zeroed gradients.
Inference is the forward pass of a ScoringEngine's model in inference mode on the same padded
batches of samples and copies, up to the last gate as in the warm-up; its output is discarded. The
two alternate `--repeats` times for time and as often again for memory, after one untimed turn.
Memory is what is allocated permanently (weights, optimizer states) plus the peak above it. Exits
non-zero if the median time ratio or the largest memory ratio is above its limit. The default of
--data is the demo corpus.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

# Set before torch is imported: its profiler logs every start and stop.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import one_line_errors, report  # noqa: E402
from recipes.held_out_rows import read_samples  # noqa: E402
from selectmoe.config.warmup import TrainingConfig  # noqa: E402
from selectmoe.model.checkpoint import model_folder  # noqa: E402
from selectmoe.model.gate_weights import gate_weights  # noqa: E402
from selectmoe.model.quiet_loading import register_select_moe  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.training.worker import TrainingWorker  # noqa: E402
from selectmoe.warmup.gate_model import Trainee, load_gated_model, prepare_trainee  # noqa: E402
from selectmoe.warmup.stage import step_settings, train  # noqa: E402
from selectmoe.warmup.step_batches import MicroBatch, StepBatches, TrainingRows  # noqa: E402

MAX_TIME_RATIO = 2.2
MAX_MEMORY_RATIO = 1.5
SEED = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Cost of one inference pass and one training step, in the unit of the meter."""

    inference: float
    step: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Measurements on one batch."""

    seconds: tuple[Turn, ...]
    peak_bytes: tuple[Turn, ...]  # above held_bytes
    held_bytes: Turn  # allocated permanently
    num_tokens: int  # without padding
    num_tokens_padded: int
    num_padded_batches: int
    largest_gate_change: float  # over all steps; 0 would mean that nothing was trained

    @property
    def time_ratios(self) -> list[float]:
        return [turn.step / turn.inference for turn in self.seconds]

    @property
    def activation_ratios(self) -> list[float]:
        return [turn.step / turn.inference for turn in self.peak_bytes]

    @property
    def memory_ratios(self) -> list[float]:
        held = self.held_bytes
        return [
            (held.step + turn.step) / (held.inference + turn.inference) for turn in self.peak_bytes
        ]


class Meter(Protocol):
    def start(self) -> None: ...

    def stop(self) -> float: ...


class Clock:
    """Wall time in seconds."""

    def start(self) -> None:
        wait_for_device()
        self.started = time.perf_counter()

    def stop(self) -> float:
        wait_for_device()
        return time.perf_counter() - self.started


class CudaPeak:
    """Peak bytes above those at the start, as counted by the caching allocator."""

    def start(self) -> None:
        wait_for_device()
        torch.cuda.reset_peak_memory_stats()
        self.at_start = torch.cuda.memory_allocated()

    def stop(self) -> float:
        wait_for_device()
        return float(torch.cuda.max_memory_allocated() - self.at_start)


class CpuPeak:
    """Peak bytes above those at the start, from the profiler's events of allocating and freeing.

    The resident size would not work: the process keeps freed memory and reuses it in the next pass.
    """

    def start(self) -> None:
        cpu = torch.profiler.ProfilerActivity.CPU
        self.profiler = torch.profiler.profile(activities=[cpu], profile_memory=True)
        self.profiler.start()

    def stop(self) -> float:
        self.profiler.stop()
        inner: Any = self.profiler.profiler
        events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return float(highest_sum(event.nbytes() for event in events))


def highest_sum(changes: Iterable[int]) -> int:
    """+4, +2, -4, +1 -> 6"""
    highest = total = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class InferenceBeforeStep(TrainerCallback):
    """Runs an inference pass before each step of the trainer, and measures both."""

    infer: Callable[[], None]
    meters: Sequence[Meter]
    turns: list[Turn] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        self.meter = self.meters[len(self.turns)]
        self.meter.start()
        self.infer()
        self.inference = self.meter.stop()
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        self.turns.append(Turn(self.inference, self.meter.stop()))


class RepeatedStep(StepBatches):
    """The batches of the first step, forever."""

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        batches = self.step(0)
        while True:
            yield batches


def measure(
    model: str,
    samples: Sequence[Sample],
    *,
    max_tokens: int | None,
    repeats: int,
    uses_gpu: bool,
) -> Costs:
    """Inference and warm-up steps on all of `samples`, each paired with a corrupted copy."""
    register_select_moe()
    num_turns = 1 + 2 * repeats
    training = TrainingConfig(
        num_steps=num_turns,
        effective_batch_size=len(samples),
        max_tokens_per_batch=max_tokens,
        logging_steps=num_turns,
        save_steps=num_turns + 1,
    )
    engine = ScoringEngine.from_pretrained(model, device="cuda" if uses_gpu else "cpu")
    trainee = load_trainee(model, training, uses_gpu=uses_gpu)
    before = flatten_gates(trainee.model)
    meters: list[Meter] = [Clock() for _ in range(1 + repeats)]
    meters += [CudaPeak() if uses_gpu else CpuPeak() for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        worker = TrainingWorker(output=Path(folder), scratch=Path(folder), uses_gpu=uses_gpu)
        rows = TrainingRows(samples, engine.tokenizer.tokenize(samples))
        batches = RepeatedStep(rows, engine.tokenizer, step_settings(training, worker, seed=SEED))
        step = batches.step(0)
        observer = InferenceBeforeStep(lambda: infer(engine, step), meters)
        trainer = train(trainee, batches, training, worker=replace(worker, callbacks=(observer,)))
    assert trainer.optimizer is not None
    trained_bytes = num_bytes([*list_weights(trainee.model), *optimizer_states(trainer.optimizer)])
    return Costs(
        seconds=tuple(observer.turns[1 : 1 + repeats]),
        peak_bytes=tuple(observer.turns[1 + repeats :]),
        held_bytes=Turn(num_bytes(list_weights(engine.model)), trained_bytes),
        num_tokens=sum(batch.num_tokens for batch in step),
        num_tokens_padded=sum(batch.token_ids_BT.numel() for batch in step),
        num_padded_batches=len(step),
        largest_gate_change=float((flatten_gates(trainee.model) - before).abs().max()),
    )


def load_trainee(model: str, training: TrainingConfig, *, uses_gpu: bool) -> Trainee:
    gated = load_gated_model(model_folder(model), training, uses_gpu=uses_gpu, seed=SEED)
    gated.model.skip_last_experts()
    return prepare_trainee(gated, training, name=model, seed=SEED)


@torch.inference_mode()
def infer(engine: ScoringEngine, batches: Sequence[MicroBatch]) -> None:
    for batch in batches:
        token_ids_BT = batch.token_ids_BT.to(engine.device)
        engine.model(input_ids=token_ids_BT, use_cache=False, output_quality_logits=True)


def flatten_gates(model: nn.Module) -> Tensor:
    gates = gate_weights(model)
    return torch.cat([gates[name].float().flatten() for name in sorted(gates)])


def list_weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def optimizer_states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [entry for state in optimizer.state.values() for entry in state.values()]
    return [entry for entry in states if isinstance(entry, Tensor)]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe(costs: Costs) -> dict[str, object]:
    """The measurements by turn, bytes in MB."""
    held = costs.held_bytes
    return {
        "num_tokens": costs.num_tokens,
        "num_tokens_padded": costs.num_tokens_padded,
        "num_padded_batches": costs.num_padded_batches,
        "inference_seconds": [round(turn.inference, 4) for turn in costs.seconds],
        "step_seconds": [round(turn.step, 4) for turn in costs.seconds],
        "time_ratios": [round(ratio, 3) for ratio in costs.time_ratios],
        "time_ratio_median": round(statistics.median(costs.time_ratios), 3),
        "max_time_ratio": MAX_TIME_RATIO,
        "held_mb": {"inference": megabytes(held.inference), "step": megabytes(held.step)},
        "inference_peak_mb": [megabytes(turn.inference) for turn in costs.peak_bytes],
        "step_peak_mb": [megabytes(turn.step) for turn in costs.peak_bytes],
        "memory_ratios_activations_only": [round(ratio, 3) for ratio in costs.activation_ratios],
        "memory_ratios_with_weights": [round(ratio, 3) for ratio in costs.memory_ratios],
        "max_memory_ratio": MAX_MEMORY_RATIO,
        "largest_gate_change": costs.largest_gate_change,
    }


def megabytes(count: float) -> float:
    return round(count / 1e6, 2)


def exceeded_limits(costs: Costs) -> list[str]:
    """A sentence for each ratio above its limit."""
    time_ratio, memory_ratio = statistics.median(costs.time_ratios), max(costs.memory_ratios)
    exceeded = []
    if time_ratio > MAX_TIME_RATIO:
        exceeded.append(f"a step takes {time_ratio:.2f} times as long, more than {MAX_TIME_RATIO}")
    if memory_ratio > MAX_MEMORY_RATIO:
        exceeded.append(
            f"a step needs {memory_ratio:.2f} times the memory, more than {MAX_MEMORY_RATIO}"
        )
    return exceeded


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument("--model", default=str(EMBEDDED_SELECTOR))
    parser.add_argument("--num-rows", type=int, default=32, help="samples of the step")
    parser.add_argument("--max-tokens", type=int, help="tokens per batch; default: the job's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--quick", action="store_true", help="eight rows, one repeat; no limits and no result file"
    )
    args = parser.parse_args()
    if args.quick:
        args.num_rows, args.repeats = 8, 1
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    samples = read_samples([args.data])[: args.num_rows]
    costs = measure(
        args.model,
        samples,
        max_tokens=args.max_tokens,
        repeats=args.repeats,
        uses_gpu=torch.cuda.is_available(),
    )
    report("bench_training", {"num_rows": len(samples), **describe(costs)}, quick=args.quick)
    exceeded = exceeded_limits(costs)
    if exceeded and not args.quick:
        sys.exit(f"error: {'; '.join(exceeded)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
