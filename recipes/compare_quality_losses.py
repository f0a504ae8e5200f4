"""Compare the quality losses: gates trained with each of them, evaluated on held-out rows.

    python recipes/compare_quality_losses.py --data DIR --output DIR --num-steps 300 --threads 2

Each loss starts from the same untrained gates and trains on the same rows for the same number of
steps, with the warm-up of `jobs/pretrain.py` and its defaults; `key=value` overrides
(training.learning_rate=1e-3) apply to all losses. Evaluation uses rows outside the warm-up's
subset: the mean good-probability of the answer tokens, for originals and corrupted copies, and the
AUROC of originals against copies. Baselines: untrained gates (those that every loss starts from,
and two more seeds), the number of answer tokens, and the mean log-likelihood of the answer tokens
under the base (gates forced open). The copies are made by the corruptions that the contrastive
warm-up trains on. Rows are ranked by score, as in selection: gates whose scores are all rounded
to the same number have an AUROC of 0.5. A warm-up that stops early is evaluated as it is.

The base of the embedded selector was itself trained on corrupted copies, through gates of seed 0
(recipes/contrast_tiny_base.py): its features were learned for exactly these gates, so use another
seed here. --unseen evaluates only on the tenth of the rows that no recipe trained on.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.baseline_scores import (  # noqa: E402
    FRESH_GATES_STD,
    answer_lengths,
    answer_nll,
    load_language_model,
    save_untrained_gates,
)
from recipes.held_out_auroc import (  # noqa: E402
    Copies,
    RowScores,
    auroc_by_kind,
    copies_by_kind,
    score_samples,
)
from recipes.held_out_rows import is_held_out, read_samples  # noqa: E402
from selectmoe.config.loading import load_config, resolved  # noqa: E402
from selectmoe.config.warmup import TrainingConfig, WarmupConfig  # noqa: E402
from selectmoe.corpus.shards import keep_subset, row_key  # noqa: E402
from selectmoe.data.named_corpora import corpus_specs  # noqa: E402
from selectmoe.data.writers import write_json  # noqa: E402
from selectmoe.errors import (  # noqa: E402
    DataError,
    SelectMoeError,
    TrainingStoppedError,
)
from selectmoe.model.checkpoint import GATE_WEIGHTS_NAME, model_folder  # noqa: E402
from selectmoe.model.gate_weights import save_gate_weights  # noqa: E402
from selectmoe.model.quiet_loading import register_select_moe  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, model_or_embedded  # noqa: E402
from selectmoe.records import Sample, TokenizedSample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.training.worker import TrainingWorker  # noqa: E402
from selectmoe.warmup.rows import (  # noqa: E402
    CLEAN_DEMO,
    prepare_warmup_rows,
    warmup_tokenizer,
)
from selectmoe.warmup.stage import run_warmup  # noqa: E402

LOSS_KEY = "training.quality_loss_type"
LOSSES: tuple[str, ...] = get_args(get_type_hints(TrainingConfig)["quality_loss_type"])
NUM_UNTRAINED = 3  # seeds: the AUROC of a single one may be far above or below 0.5
REPORT_NAME = "quality_losses.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that no warm-up trains on, and corrupted copies of them."""

    originals: list[Sample]
    copies: Copies

    def mixed_copies(self) -> list[Sample]:
        """One copy of each row, alternating between the kinds."""
        mixed = []
        for index in range(len(self.originals)):
            copies = [by_row[index] for by_row in self.copies.values() if index in by_row]
            if copies:
                mixed.append(copies[index % len(copies)])
        return mixed


@dataclass(frozen=True, slots=True)
class Warmup:
    """One finished warm-up; its gates are in `full_rank_weights.safetensors` of the folder."""

    num_steps: int
    seconds: float
    stop_reason: str = ""  # set if it stopped before the last step


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One line of the table; None where a column does not apply."""

    name: str
    auroc: Mapping[str, float]  # by kind of corruption
    good_real: float | None = None
    good_copies: float | None = None
    num_steps: int | None = None
    seconds: float | None = None
    note: str = ""

    @property
    def auroc_mean(self) -> float | None:
        return float(np.mean(list(self.auroc.values()))) if self.auroc else None


class RunObserver(TrainerCallback):
    """Keeps the model of a run, which is lost if the run raises, and measures its time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ANN401
        self.model, self.state = others["model"], state
        self.started = time.perf_counter()

    def finish(self, stop_reason: str = "") -> Warmup:
        return Warmup(self.state.global_step, time.perf_counter() - self.started, stop_reason)


def read_held_out(config: WarmupConfig, *, num_rows: int, unseen: bool) -> HeldOut:
    """At most `num_rows` rows outside the warm-up's subset that have answer tokens within the
    maximum sequence length; unseen: only rows that no recipe trained on."""
    specs = corpus_specs(config.dataset)
    samples = read_samples(specs or [str(DEMO_CORPUS)])
    if not specs:
        samples = [sample for sample in samples if sample.dataset == CLEAN_DEMO]
    candidates = rows_outside_subset(samples, config.dataset.subset_ratio)
    if unseen:
        candidates = [sample for sample in candidates if is_held_out(sample.sample_id)]
    Random(config.seed).shuffle(candidates)
    engine = load_engine(config, None)
    originals = list(islice((row for row in candidates if has_answer(engine, row)), num_rows))
    if len(originals) < 2:
        raise DataError(
            f"dataset.subset_ratio={config.dataset.subset_ratio:g} must leave rows for evaluation, "
            f"leaves {len(originals)} of {len(samples)}"
        )
    return HeldOut(originals, copies_by_kind(originals))


def rows_outside_subset(samples: list[Sample], subset_ratio: float) -> list[Sample]:
    subset = keep_subset(samples, ratio=subset_ratio)
    trained_on = {row_key(sample) for sample in subset if isinstance(sample, Sample)}
    return [sample for sample in samples if row_key(sample) not in trained_on]


def has_answer(engine: ScoringEngine, sample: Sample) -> bool:
    """Whether a token after the first, which nothing predicts, belongs to the answer."""
    [outcome] = engine.tokenizer.tokenize_each([sample])
    return isinstance(outcome, TokenizedSample) and bool(outcome.answer_mask[1:].any())


def load_engine(
    config: WarmupConfig, weights: Path | None, *, formula: str = "answer_margin"
) -> ScoringEngine:
    return ScoringEngine.from_pretrained(
        model_or_embedded(config.model),
        model_checkpoint_path=weights,
        formula=formula,
        max_sequence_length=config.dataset.max_sequence_length,
    )


def warm_up(config: WarmupConfig, output: Path) -> Warmup:
    observer = RunObserver()
    prepare_warmup_rows(config, warmup_tokenizer(config), output)
    worker = TrainingWorker(
        output=output,
        scratch=output / "checkpoints",
        uses_gpu=torch.cuda.is_available(),
        callbacks=(observer,),
    )
    try:
        run_warmup(config, worker)
    except TrainingStoppedError as error:
        save_gate_weights(observer.model, output)
        reason = str(error).partition("; ")[0]  # without the remedy
        return observer.finish(f"stopped at step {observer.state.global_step}: {reason}")
    return observer.finish()


def measure_gates(name: str, config: WarmupConfig, weights: Path, held_out: HeldOut) -> TableRow:
    """Evaluates the gates of a weights file on the held-out rows."""
    if not all(tensor.isfinite().all() for tensor in load_file(weights).values()):
        return TableRow(name=name, auroc={}, note="the gates are not finite numbers")
    by_margin = partial(score_samples, load_engine(config, weights))
    probability_engine = load_engine(config, weights, formula="answer_probability")
    by_probability = partial(score_samples, probability_engine)
    return TableRow(
        name=name,
        auroc=auroc_by_kind(by_margin, held_out.originals, held_out.copies),
        good_real=float(by_probability(held_out.originals).mean()),
        good_copies=float(by_probability(held_out.mixed_copies()).mean()),
    )


def measure_baselines(config: WarmupConfig, held_out: HeldOut, output: Path) -> Iterator[TableRow]:
    """The lines of the table that need no training."""
    folder = model_folder(model_or_embedded(config.model))
    for seed in range(config.seed, config.seed + NUM_UNTRAINED):
        weights = save_untrained_gates(
            folder, config.training, seed=seed, output=output / f"untrained_{seed}"
        )
        yield measure_gates(f"untrained, seed {seed}", config, weights, held_out)
    tokenizer = load_engine(config, None).tokenizer
    base = load_language_model(folder, on_gpu=torch.cuda.is_available())
    baselines: dict[str, RowScores] = {
        "answer length": partial(answer_lengths, tokenizer),
        "log-likelihood": lambda samples: -answer_nll(base, tokenizer, samples),
    }
    for name, score in baselines.items():
        auroc = auroc_by_kind(score, held_out.originals, held_out.copies)
        yield TableRow(name=name, auroc=auroc)


def measure_loss(name: str, config: WarmupConfig, held_out: HeldOut, output: Path) -> TableRow:
    """Trains gates with one loss and evaluates them."""
    warmup = warm_up(config, output)
    ending = f"; {warmup.stop_reason}" if warmup.stop_reason else ""
    logger.info("%s: %d steps in %.1f s%s", name, warmup.num_steps, warmup.seconds, ending)
    row = measure_gates(name, config, output / GATE_WEIGHTS_NAME, held_out)
    return replace(
        row,
        num_steps=warmup.num_steps,
        seconds=warmup.seconds,
        note="; ".join(filter(None, [warmup.stop_reason, row.note])),
    )


def format_tables(rows: Sequence[TableRow]) -> str:
    """Two Markdown tables: one line per loss or baseline, and one line per kind of corruption."""
    lines = [
        "| loss | steps | s/step | P(good), originals | P(good), copies | mean AUROC | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "" if row.num_steps is None else str(row.num_steps)
        pace = row.seconds / row.num_steps if row.seconds and row.num_steps else None
        numbers = map(format_number, (pace, row.good_real, row.good_copies, row.auroc_mean))
        lines.append("| " + " | ".join([row.name, steps, *numbers, row.note]) + " |")
    lines += ["", "| AUROC by corruption | " + " | ".join(row.name for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for kind in next((row.auroc for row in rows if row.auroc), {}):
        cells = [format_number(row.auroc.get(kind)) for row in rows]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def configs_by_loss(args: argparse.Namespace) -> dict[str, WarmupConfig]:
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


def compare(args: argparse.Namespace) -> list[TableRow]:
    register_select_moe()
    configs = configs_by_loss(args)
    first = next(iter(configs.values()))
    held_out = read_held_out(first, num_rows=args.num_rows, unseen=args.unseen)
    num_copies = sum(map(len, held_out.copies.values()))
    logger.info("evaluation on %d rows and %d copies", len(held_out.originals), num_copies)
    # Baselines last: settings that the warm-up rejects then fail within the first minute.
    measurements = chain(
        (
            measure_loss(name, config, held_out, args.output / name)
            for name, config in configs.items()
        ),
        measure_baselines(first, held_out, args.output),
    )
    rows: list[TableRow] = []
    for row in measurements:
        logger.info("%s: AUROC %s", row.name, format_number(row.auroc_mean))
        rows.append(row)
        write_json(args.output / REPORT_NAME, report_of(rows, first, held_out))
    return rows


def report_of(
    rows: Sequence[TableRow], config: WarmupConfig, held_out: HeldOut
) -> dict[str, object]:
    settings = resolved(config)
    del settings[LOSS_KEY]  # differs between the rows
    return {
        "settings": settings,
        "num_rows_evaluated": len(held_out.originals),
        "num_copies": {kind: len(made) for kind, made in held_out.copies.items()},
        "rows": [asdict(row) | {"auroc_mean": row.auroc_mean} for row in rows],
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="corpus; default: the clean rows of the demo corpus")
    parser.add_argument("--model", help="Select-MoE folder; default: the embedded selector")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--losses", default=",".join(LOSSES), help="comma-separated")
    parser.add_argument("--subset-ratio", type=float, help="fraction of the rows to train on")
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-sequence-length", type=int)
    parser.add_argument("--num-rows", type=int, default=600, help="rows for evaluation")
    parser.add_argument("--unseen", action="store_true", help="only rows that no recipe trained on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    try:
        print(format_tables(compare(args)))
    except SelectMoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
