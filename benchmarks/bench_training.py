"""A warm-up step of the gates against inference on the same batch: time and peak memory.

    python benchmarks/bench_training.py --data ../shared/data/instructions/dolly.jsonl

The step is the job's own (`selectmoe.warmup.stage.train`; full_rank, gates alone, contrastive):
forward, loss, backward, clipping, optimizer, cleared gradients. Inference is the scoring pass
without gradients: the model of a ScoringEngine in inference mode, over the same token ids in the
same rectangles, samples and copies, as far as the warm-up's forward goes, which is the last gate;
nothing is made of what it returns. The two take turns, `--repeats` times under a clock and as often
again under a memory meter, after one turn that does not count. Memory is what is held all the time
(weights; the optimizer's averages) and the peak above it. Exits with 1 where the median of the time
ratios or the largest memory ratio is above its limit. Without --data it is the demo corpus.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

# Before torch is imported: its profiler tells each start and end, and what was allocated before.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import describe_run, one_line_errors, print_result, write_result  # noqa: E402
from selectmoe.config.warmup import TrainingConfig  # noqa: E402
from selectmoe.data.readers import read_corpus  # noqa: E402
from selectmoe.model.checkpoint import model_folder  # noqa: E402
from selectmoe.model.gate_weights import gate_weights  # noqa: E402
from selectmoe.model.registration import register_select_moe  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.warmup.gate_model import load_gated_model, prepare_trainee  # noqa: E402
from selectmoe.warmup.stage import TrainingPlace, step_settings, train  # noqa: E402
from selectmoe.warmup.step_batches import MicroBatch, StepBatches, TrainingRows  # noqa: E402

MAX_TIME_RATIO = 2.2
MAX_MEMORY_RATIO = 1.5
SEED = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """What one inference pass and one step took, in the unit of their meter."""

    inference: float
    step: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured on one batch; bytes held are those between two passes."""

    seconds: tuple[Turn, ...]
    peak_bytes: tuple[Turn, ...]  # above what is held
    held_bytes: Turn
    num_tokens: int  # without padding
    num_tokens_padded: int
    num_rectangles: int
    largest_gate_change: float  # by all steps; 0 would mean that nothing was trained

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
    """Seconds."""

    def start(self) -> None:
        wait_for_device()
        self.started = time.perf_counter()

    def stop(self) -> float:
        wait_for_device()
        return time.perf_counter() - self.started


class CudaPeak:
    """Bytes above those at the start, by the caching allocator's own count."""

    def start(self) -> None:
        wait_for_device()
        torch.cuda.reset_peak_memory_stats()
        self.at_start = torch.cuda.memory_allocated()

    def stop(self) -> float:
        wait_for_device()
        return float(torch.cuda.max_memory_allocated() - self.at_start)


class CpuPeak:
    """Bytes above those at the start, from the profiler's record of every tensor made and freed.

    The resident size would not do: freed memory stays with the process, and the next pass has it.
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
class InTurn(TrainerCallback):
    """Before each step of the trainer an inference pass, both under that turn's meter."""

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


class SameStep(StepBatches):
    """The first step again and again."""

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
    """Inference and warm-up steps on all of `samples`, each beside a copy."""
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
    gated = load_gated_model(model_folder(model), training, uses_gpu=uses_gpu, seed=SEED)
    gated.model.skip_last_experts()
    trainee = prepare_trainee(gated, training, name=model, seed=SEED)
    before = gates_of(trainee.model)
    peaks: list[Meter] = [CudaPeak() if uses_gpu else CpuPeak() for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        place = TrainingPlace(output=Path(folder), scratch=Path(folder), uses_gpu=uses_gpu)
        rows = TrainingRows(samples, engine.tokenizer.tokenize(samples))
        batches = SameStep(rows, engine.tokenizer, step_settings(training, place, seed=SEED))
        step = batches.step(0)
        clocks: list[Meter] = [Clock() for _ in range(1 + repeats)]
        in_turn = InTurn(lambda: infer(engine, step), [*clocks, *peaks])
        watched = replace(place, callbacks=(in_turn,))
        trainer = train(trainee, batches, training, place=watched)
    assert trainer.optimizer is not None
    return Costs(
        seconds=tuple(in_turn.turns[1 : 1 + repeats]),
        peak_bytes=tuple(in_turn.turns[1 + repeats :]),
        held_bytes=Turn(
            num_bytes(weights_of(engine.model)),
            num_bytes([*weights_of(trainee.model), *averages_of(trainer.optimizer)]),
        ),
        num_tokens=sum(batch.num_tokens for batch in step),
        num_tokens_padded=sum(batch.token_ids_BT.numel() for batch in step),
        num_rectangles=len(step),
        largest_gate_change=float((gates_of(trainee.model) - before).abs().max()),
    )


@torch.inference_mode()
def infer(engine: ScoringEngine, batches: Sequence[MicroBatch]) -> None:
    for batch in batches:
        token_ids_BT = batch.token_ids_BT.to(engine.device)
        engine.model(input_ids=token_ids_BT, use_cache=False, output_quality_logits=True)


def gates_of(model: nn.Module) -> Tensor:
    gates = gate_weights(model)
    return torch.cat([gates[name].float().flatten() for name in sorted(gates)])


def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def averages_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [entry for state in optimizer.state.values() for entry in state.values()]
    return [entry for entry in states if isinstance(entry, Tensor)]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def described(costs: Costs) -> dict[str, object]:
    """The numbers as they are written down: bytes in MB, everything by turn."""
    held = costs.held_bytes
    return {
        "num_tokens": costs.num_tokens,
        "num_tokens_padded": costs.num_tokens_padded,
        "num_rectangles": costs.num_rectangles,
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


def complaints(costs: Costs) -> list[str]:
    """A sentence for each limit that was missed."""
    slowest, largest = statistics.median(costs.time_ratios), max(costs.memory_ratios)
    found = []
    if slowest > MAX_TIME_RATIO:
        found.append(f"a step takes {slowest:.2f} times as long, more than {MAX_TIME_RATIO}")
    if largest > MAX_MEMORY_RATIO:
        found.append(f"a step needs {largest:.2f} times the memory, more than {MAX_MEMORY_RATIO}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument("--model", default=str(EMBEDDED_SELECTOR))
    parser.add_argument("--num-rows", type=int, default=32, help="the first so many, in one step")
    parser.add_argument("--max-tokens", type=int, help="computed at a time; default: the job's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--quick", action="store_true", help="eight rows, one turn; no limits and no result file"
    )
    args = parser.parse_args()
    if args.quick:
        args.num_rows, args.repeats = 8, 1
    torch.set_num_threads(args.threads)

    rows = (row for row in read_corpus(args.data) if isinstance(row, Sample))
    samples = list(islice(rows, args.num_rows))
    costs = measure(
        args.model,
        samples,
        max_tokens=args.max_tokens,
        repeats=args.repeats,
        uses_gpu=torch.cuda.is_available(),
    )
    result = {**describe_run(), "num_rows": len(samples), **described(costs)}
    if args.quick:
        print_result(result)
        return
    write_result("bench_training", result)
    if found := complaints(costs):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    with one_line_errors():
        main()
