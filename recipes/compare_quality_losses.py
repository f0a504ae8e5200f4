"""What each quality loss teaches fresh gates: the six losses side by side on rows not learned from.

    python recipes/compare_quality_losses.py --data DIR --output DIR --num-steps 300 --threads 2

Each loss gets the same fresh gates, seed, rows and number of steps, by the warm-up of
`jobs/pretrain.py` and with its defaults; `key=value` overrides (training.learning_rate=1e-3) hold
for all of them. Measured on rows outside of the warm-up's subset: the mean good-probability of the
answers' tokens, real and corrupted, and the AUROC of real rows against corrupted copies. Controls:
untrained gates (those that every loss starts from, and of the next seeds), the number of answer
tokens, and the mean log-likelihood of the answer's tokens under the base (gates forced open).
Copies are made in the ways of which the contrastive warm-up has seen examples. Rows are ordered by
their scores, as selection orders them: gates so far open or shut that these round to one number
have an AUROC of 0.5. A warm-up that stops is measured as it stopped.

The base of the embedded selector has itself learned to tell copies apart
(recipes/contrast_tiny_base.py), through fresh gates of seed 0: gates of that seed are the very ones
that its features were made for, so the seed here must be another. --unseen measures only on the
tenth of the rows that no recipe of the embedded selector has trained on.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.held_out_auroc import (  # noqa: E402
    Copies,
    RowScores,
    auroc_by_kind,
    copies_by_kind,
    scores,
)
from recipes.train_tiny_base import is_held_out  # noqa: E402
from selectmoe.config.loading import load_config, resolved  # noqa: E402
from selectmoe.config.warmup import TrainingConfig, WarmupConfig  # noqa: E402
from selectmoe.corpus.shards import keep_subset, row_key  # noqa: E402
from selectmoe.data.chat import ChatTokenizer  # noqa: E402
from selectmoe.data.packing import pad_samples  # noqa: E402
from selectmoe.data.readers import read_corpora  # noqa: E402
from selectmoe.data.writers import write_json  # noqa: E402
from selectmoe.errors import DataError, SelectMoeError  # noqa: E402
from selectmoe.evaluation.answer_loss import MAX_TOKENS_PER_BATCH, batch_losses  # noqa: E402
from selectmoe.model.checkpoint import GATE_WEIGHTS_NAME, model_folder  # noqa: E402
from selectmoe.model.devices import choose_dtype, choose_experts  # noqa: E402
from selectmoe.model.gate_weights import save_gate_weights  # noqa: E402
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.model.quiet_loading import load_model  # noqa: E402
from selectmoe.model.registration import register_select_moe  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, model_or_embedded  # noqa: E402
from selectmoe.records import Sample, TokenizedSample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.training.stopping import TrainingStoppedError  # noqa: E402
from selectmoe.warmup.gate_model import load_gated_model  # noqa: E402
from selectmoe.warmup.rows import CLEAN_DEMO  # noqa: E402
from selectmoe.warmup.settings import corpus_specs  # noqa: E402
from selectmoe.warmup.stage import TrainingPlace, run_warmup  # noqa: E402

LOSS_KEY = "training.quality_loss_type"
LOSSES: tuple[str, ...] = get_args(get_type_hints(TrainingConfig)["quality_loss_type"])
FRESH_GATES_STD = 0.02  # of converted models; that it is given at all starts the gates anew
NUM_UNTRAINED = 3  # draws: one alone may lie on either side of a coin by far
REPORT_NAME = "quality_losses.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that no warm-up learns from, and worse copies of them."""

    real: list[Sample]
    copies: Copies

    def mixed_copies(self) -> list[Sample]:
        """One copy of each row, the kinds in turn."""
        found = []
        for position in range(len(self.real)):
            made = [by_row[position] for by_row in self.copies.values() if position in by_row]
            if made:
                found.append(made[position % len(made)])
        return found


@dataclass(frozen=True, slots=True)
class Warmup:
    """How one warm-up went; its gates are in `full_rank_weights.safetensors` of the folder."""

    num_steps: int
    seconds: float
    stopped: str = ""  # why, and at which step, where it did not reach the last


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table; None is what was not measured or does not exist."""

    name: str
    auroc: Mapping[str, float]  # by kind of copy
    good_real: float | None = None
    good_copies: float | None = None
    num_steps: int | None = None
    seconds: float | None = None
    note: str = ""

    @property
    def auroc_mean(self) -> float | None:
        return float(np.mean(list(self.auroc.values()))) if self.auroc else None


class Watch(TrainerCallback):
    """Holds on to the model of a run, which is lost where the run raises, and to its clock."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ANN401
        self.model, self.state = others["model"], state
        self.started = time.perf_counter()

    def warmup(self, stopped: str = "") -> Warmup:
        return Warmup(self.state.global_step, time.perf_counter() - self.started, stopped)


def read_held_out(config: WarmupConfig, *, num_rows: int, unseen: bool) -> HeldOut:
    """At most `num_rows` rows that the warm-up's subset does not contain, with some answer in the
    tokens that are read; unseen: only such as the base of the embedded selector never saw."""
    specs = corpus_specs(config.dataset)
    rows = read_corpora(specs or [str(DEMO_CORPUS)])
    samples = [row for row in rows if isinstance(row, Sample)]
    if not specs:
        samples = [sample for sample in samples if sample.dataset == CLEAN_DEMO]
    kept = keep_subset(samples, ratio=config.dataset.subset_ratio)
    learned = {row_key(sample) for sample in kept if isinstance(sample, Sample)}
    outside = [
        sample
        for sample in samples
        if row_key(sample) not in learned and (is_held_out(sample.sample_id) or not unseen)
    ]
    Random(config.seed).shuffle(outside)
    real: list[Sample] = []
    engine = engine_of(config, None)
    for sample in outside:
        [outcome] = engine.tokenizer.tokenize_each([sample])
        if isinstance(outcome, TokenizedSample) and outcome.answer_mask[1:].any():
            real.append(sample)
        if len(real) == num_rows:
            break
    if len(real) < 2:
        raise DataError(
            f"dataset.subset_ratio={config.dataset.subset_ratio:g} must leave rows to measure on, "
            f"leaves {len(real)} of {len(samples)}"
        )
    return HeldOut(real, copies_by_kind(real))


def engine_of(
    config: WarmupConfig, weights: Path | None, *, formula: str = "answer_margin"
) -> ScoringEngine:
    return ScoringEngine.from_pretrained(
        model_or_embedded(config.model),
        model_checkpoint_path=weights,
        formula=formula,
        max_sequence_length=config.dataset.max_sequence_length,
    )


def fresh_gates(config: WarmupConfig, output: Path) -> Path:
    """The weights that a warm-up of this seed starts from, as a file."""
    folder = model_folder(model_or_embedded(config.model))
    model = load_gated_model(folder, config.training, uses_gpu=False, seed=config.seed)
    return save_gate_weights(model, output)


def warm_up(config: WarmupConfig, output: Path) -> Warmup:
    watch = Watch()
    place = TrainingPlace(
        output=output,
        scratch=output / "checkpoints",
        uses_gpu=torch.cuda.is_available(),
        callbacks=(watch,),
    )
    try:
        run_warmup(config, place)
    except TrainingStoppedError as error:
        save_gate_weights(watch.model, output)
        reason = str(error).partition("; ")[0]  # without the advice
        return watch.warmup(f"stopped at step {watch.state.global_step}: {reason}")
    return watch.warmup()


def measured(name: str, config: WarmupConfig, weights: Path, held_out: HeldOut) -> Row:
    """What the gates of a weights file say of rows that they have not seen."""
    if not all(tensor.isfinite().all() for tensor in load_file(weights).values()):
        return Row(name=name, auroc={}, note="the gates are not finite numbers")
    by_margin = partial(scores, engine_of(config, weights))
    by_probability = partial(scores, engine_of(config, weights, formula="answer_probability"))
    return Row(
        name=name,
        auroc=auroc_by_kind(by_margin, held_out.real, held_out.copies),
        good_real=float(by_probability(held_out.real).mean()),
        good_copies=float(by_probability(held_out.mixed_copies()).mean()),
    )


def answer_lengths(tokenizer: ChatTokenizer, samples: Sequence[Sample]) -> np.ndarray:
    return np.array([row.answer_mask.sum() for row in tokenizer.tokenize(samples)])


def log_likelihoods(
    model: torch.nn.Module, tokenizer: ChatTokenizer, samples: Sequence[Sample]
) -> np.ndarray:
    """Mean over the answer's tokens, nats."""
    found = np.empty(len(samples))
    rows = tokenizer.tokenize(samples)
    for batch in pad_samples(rows, max_tokens_per_batch=MAX_TOKENS_PER_BATCH):
        nll_B, num_tokens_B = batch_losses(model, batch)
        found[batch.positions] = -nll_B / num_tokens_B
    return found


def controls(config: WarmupConfig, held_out: HeldOut, output: Path) -> Iterator[Row]:
    """The table's lines that need no warm-up."""
    for seed in range(config.seed, config.seed + NUM_UNTRAINED):
        weights = fresh_gates(replace(config, seed=seed), output / f"untrained_{seed}")
        yield measured(f"nothing, seed {seed}", config, weights, held_out)
    tokenizer = engine_of(config, None).tokenizer
    folder = model_folder(model_or_embedded(config.model))
    on_gpu = torch.cuda.is_available()
    base = load_model(
        SelectMoeForCausalLM,
        folder,
        dtype=choose_dtype(None, on_gpu=on_gpu),
        experts_implementation=choose_experts(None, on_gpu=on_gpu),
    ).eval()
    torch.nn.Module.to(base, "cuda" if on_gpu else "cpu")
    base.force_gates_open()
    by_name: dict[str, RowScores] = {
        "answer length": partial(answer_lengths, tokenizer),
        "log-likelihood": partial(log_likelihoods, base, tokenizer),
    }
    for name, score in by_name.items():
        yield Row(name=name, auroc=auroc_by_kind(score, held_out.real, held_out.copies))


def learned(name: str, config: WarmupConfig, held_out: HeldOut, output: Path) -> Row:
    """Warms gates up with one loss and measures them."""
    warmup = warm_up(config, output)
    ending = f"; {warmup.stopped}" if warmup.stopped else ""
    logger.info("%s: %d steps in %.1f s%s", name, warmup.num_steps, warmup.seconds, ending)
    row = measured(name, config, output / GATE_WEIGHTS_NAME, held_out)
    return replace(
        row,
        num_steps=warmup.num_steps,
        seconds=warmup.seconds,
        note="; ".join(filter(None, [warmup.stopped, row.note])),
    )


def tables(rows: Sequence[Row]) -> str:
    """Two Markdown tables: one line a loss or control, and one line a kind of copy."""
    lines = [
        "| gates learn from | steps | s a step | good, real | good, copies | AUROC, mean | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "" if row.num_steps is None else str(row.num_steps)
        pace = row.seconds / row.num_steps if row.seconds and row.num_steps else None
        cells = [row.name, steps, number(pace), number(row.good_real), number(row.good_copies)]
        lines.append("| " + " | ".join([*cells, number(row.auroc_mean), row.note]) + " |")
    lines += ["", "| AUROC by kind of copy | " + " | ".join(row.name for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for kind in next((row.auroc for row in rows if row.auroc), {}):
        cells = [number(row.auroc.get(kind)) for row in rows]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def settings_of(args: argparse.Namespace) -> dict[str, WarmupConfig]:
    """The configuration of each loss's warm-up."""
    options = {
        "model": args.model,
        "dataset.paths": [args.data] if args.data else None,
        "dataset.subset_ratio": args.subset_ratio,
        "dataset.max_sequence_length": args.max_sequence_length,
        "training.num_steps": args.num_steps,
        "training.effective_batch_size": args.batch_size,
        "seed": args.seed,
    }
    given = {key: value for key, value in options.items() if value is not None}
    given["training.quality_gate_init_std"] = FRESH_GATES_STD
    return {
        name: load_config(
            WarmupConfig,
            [*args.overrides, f"{LOSS_KEY}={name}"],
            values=given,
        )
        for name in args.losses.split(",")
    }


def compare(args: argparse.Namespace) -> list[Row]:
    register_select_moe()
    configs = settings_of(args)
    first = next(iter(configs.values()))
    held_out = read_held_out(first, num_rows=args.num_rows, unseen=args.unseen)
    num_copies = sum(map(len, held_out.copies.values()))
    logger.info("measured on %d rows and %d copies", len(held_out.real), num_copies)
    # Controls last: settings that no warm-up accepts are then found out within the first minute.
    found = chain(
        (learned(name, config, held_out, args.output / name) for name, config in configs.items()),
        controls(first, held_out, args.output),
    )
    rows: list[Row] = []
    for row in found:
        logger.info("%s: AUROC %s", row.name, number(row.auroc_mean))
        rows.append(row)
        write_json(args.output / REPORT_NAME, report_of(rows, first, held_out))
    return rows


def report_of(rows: Sequence[Row], config: WarmupConfig, held_out: HeldOut) -> dict[str, object]:
    settings = resolved(config)
    del settings[LOSS_KEY]  # each row has its own
    return {
        "settings": settings,
        "num_rows_evaluated": len(held_out.real),
        "num_copies": {kind: len(made) for kind, made in held_out.copies.items()},
        "rows": [asdict(row) | {"auroc_mean": row.auroc_mean} for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="corpus; default: the clean part of the demo corpus")
    parser.add_argument("--model", help="Select-MoE folder; default: the embedded selector")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--subset-ratio", type=float, help="share of the rows to learn from")
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-sequence-length", type=int)
    parser.add_argument("--num-rows", type=int, default=600, help="rows to measure on")
    parser.add_argument("--unseen", action="store_true", help="rows that the base never saw")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    try:
        print(tables(compare(args)))
    except SelectMoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
