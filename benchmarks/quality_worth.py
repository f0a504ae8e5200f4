"""Downstream value of a selection: finetuning on the best rows by each scorer and on random rows.

The target is the selector's own language model, gates forced open, finetuned and evaluated by the
code of stages 3 and 4. Rows without an answer in the first `max_sequence_length` tokens contribute
no loss and are removed from the pool before the selection, so that all runs train on equally many
rows.

A scorer is compared with the random draw of the same seed, which also starts from the same adapter.
There are two p values, both two-sided and uncorrected for the number of scorers: over held-out rows
(would the difference hold on other rows, with these runs?) and over seeds (would it hold with other
draws, orders and adapters?). The larger one counts: over rows, even two random draws differ
significantly, since the losses after 126 rows had a standard deviation of .005 to .007 over seeds.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.paired_tests import sign_flip_p, t_test_p
from benchmarks.worker_tasks import Task, run_tasks
from recipes.held_out_rows import messages_of
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import load_config
from selectmoe.corpus.shards import row_key
from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.writers import write_jsonl
from selectmoe.errors import DataError
from selectmoe.evaluation.answer_loss import AnswerLoss, answer_losses
from selectmoe.evaluation.target_model import load_target
from selectmoe.finetune.stage import finetune
from selectmoe.finetune.supervised_data import load_target_tokenizer, prepare_supervised_rows
from selectmoe.records import Sample, TokenizedSample
from selectmoe.selection.top_k import descending_keys, num_to_keep
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.step_batches import NUM_DONORS

# Shape letters: S = seeds, R = held-out rows.
RANDOM = "random"
NO_FINETUNING = "no finetuning"
COST_RATIO = 5  # time of training on a row for one epoch, relative to evaluating one

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorthSettings:
    """Settings of the finetuning runs."""

    fractions: tuple[float, ...] = (0.05, 0.20)
    """Fractions of the pool to select."""
    only: Mapping[float, tuple[str, ...]] = field(
        default_factory=lambda: {0.20: ("gate", "length")}
    )
    """Fractions evaluated only for these scorers and random, since they take longest."""
    scorers: tuple[str, ...] = ()
    """Scorers whose selections are evaluated; random is always among them."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the adapter, its dropout, the order of the rows and the random draw."""
    model: str | None = None
    """Select-MoE checkpoint whose language model is the target; None is the embedded selector."""
    max_sequence_length: int = 256
    """Longer training rows are truncated, longer held-out rows skipped."""
    overrides: tuple[str, ...] = ("preset=tiny", "training.num_epochs=1")
    """Overrides of the configuration of stage 3."""
    num_workers: int = 2
    """Number of single-threaded worker processes."""

    def finetune_config(self, data_path: Path | None, *, seed: int) -> FinetuneConfig:
        values = {
            "model": self.model,
            "dataset.data_path": data_path and str(data_path),
            "dataset.max_sequence_length": self.max_sequence_length,
            "seed": seed,
        }
        given = {key: value for key, value in values.items() if value is not None}
        return load_config(FinetuneConfig, self.overrides, values=given)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorthRow:
    """Results of one scorer's selection; losses are mean nats per answer token."""

    scorer: str
    fraction: float
    num_rows: int  # trained on
    num_answer_tokens: int  # per epoch; for random the mean over the draws
    loss: float  # mean over seeds
    loss_by_seed: tuple[float, ...]
    difference: float | None = None  # to random; negative is better than random
    difference_by_dataset: Mapping[str, float] = field(default_factory=dict)
    p_rows: float | None = None
    p_seeds: float | None = None
    corrupted_share: float | None = None  # of the rows trained on


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One finetuning run."""

    scorer: str
    fraction: float
    seed: int
    positions: np.ndarray  # indices of the rows in the pool; empty without finetuning

    def __str__(self) -> str:
        return f"{self.scorer}, {self.fraction:.0%}, seed {self.seed}"


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The rows of the pool that have an answer."""

    positions: np.ndarray  # indices in the original pool
    samples: list[Sample]
    row_keys: np.ndarray
    num_answer_tokens: np.ndarray
    corrupted: np.ndarray | None  # bool

    @classmethod
    def of(
        cls, samples: Sequence[Sample], tokenizer: ChatTokenizer, corrupted: np.ndarray | None
    ) -> "Pool":
        tokenized = tokenizer.tokenize(samples)
        kept = [number for number, row in enumerate(tokenized) if has_answer(row)]
        return cls(
            positions=np.array(kept, dtype=np.int64),
            samples=[samples[number] for number in kept],
            row_keys=np.array([row_key(samples[number]) for number in kept]),
            num_answer_tokens=np.array([tokenized[n].answer_mask[1:].sum() for n in kept]),
            corrupted=None if corrupted is None else corrupted[kept],
        )

    def describe(self, runs: Sequence[Run]) -> dict[str, int | float | None]:
        """The training rows of runs that differ only in their seeds."""
        chosen = [run.positions for run in runs]
        return {
            "num_rows": len(chosen[0]),
            "num_answer_tokens": round(
                float(np.mean([self.num_answer_tokens[rows].sum() for rows in chosen]))
            ),
            "corrupted_share": None
            if self.corrupted is None or not len(chosen[0])
            else float(np.mean([self.corrupted[rows].mean() for rows in chosen])),
        }


def corrupted_pool(
    samples: Sequence[Sample],
    *,
    fraction: float,
    seed: int,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
) -> tuple[list[Sample], np.ndarray]:
    """The rows, a fraction of them replaced by corrupted copies of alternating kinds, and a mask.

    If a kind does not apply to a row, the next one is used; if none does, the row stays.
    """
    random = Random(seed)
    pool, corrupted = list(samples), np.zeros(len(samples), dtype=bool)
    for position in random.sample(range(len(samples)), num_to_keep(len(samples), fraction)):
        donors = random.sample(list(samples), min(NUM_DONORS, len(samples)))
        first = int(corrupted.sum()) % len(kinds)
        for kind in [*kinds[first:], *kinds[:first]]:
            copy = corrupt(samples[position], kind=kind, seed=seed, donors=donors)
            if copy is not None:
                pool[position], corrupted[position] = copy, True
                break
    return pool, corrupted


def choose(scores: np.ndarray, fraction: float, row_keys: np.ndarray) -> np.ndarray:
    """Indices of the rows that stage 2 would select."""
    scores = scores.astype(np.float32)  # as stage 2 stores them
    order = np.lexsort((row_keys, descending_keys(scores)))
    return np.sort(order[: num_to_keep(len(scores), fraction)])


def measure_worth(
    pool: Sequence[Sample],
    held_out: Sequence[Sample],
    scores_by_scorer: Mapping[str, np.ndarray],
    settings: WorthSettings,
    *,
    corrupted: np.ndarray | None = None,
) -> list[WorthRow]:
    """One row without finetuning, then one per fraction and scorer, random first.

    scores_by_scorer: a score for every row of the pool, higher is better; those of "random" are
    ignored, since every seed draws its own. corrupted: which rows of the pool are corrupted copies.
    """
    tokenizer = ChatTokenizer(
        load_target_tokenizer(settings.finetune_config(None, seed=0)),
        max_sequence_length=settings.max_sequence_length,
    )
    evaluated = keep_untruncated(held_out, tokenizer)
    usable = Pool.of(pool, tokenizer, corrupted)
    require_rows(usable, evaluated, settings)
    logger.info(
        "worth: %d of %d rows of the pool have an answer in %d tokens, %d of %d held-out rows fit",
        *(len(usable.samples), len(pool), settings.max_sequence_length),
        *(len(evaluated), len(held_out)),
    )
    scores_by_usable = {
        name: scores[usable.positions]
        for name, scores in scores_by_scorer.items()
        if name != RANDOM
    }
    runs = plan_runs(scores_by_usable, usable.row_keys, settings)
    losses = run_all(runs, usable.samples, evaluated, settings)
    return worth_rows(runs, losses, usable, [sample.dataset for sample in evaluated])


def require_rows(usable: Pool, evaluated: Sequence[Sample], settings: WorthSettings) -> None:
    if not usable.samples or not evaluated:
        raise DataError(
            f"max_sequence_length={settings.max_sequence_length} must leave rows for training and "
            f"evaluation, leaves {len(usable.samples)} and {len(evaluated)}"
        )


def has_answer(row: TokenizedSample) -> bool:
    return bool(row.answer_mask[1:].any())


def keep_untruncated(held_out: Sequence[Sample], tokenizer: ChatTokenizer) -> list[Sample]:
    """The rows that have an answer and fit in the maximum sequence length."""
    rows = tokenizer.tokenize(held_out)
    return [
        sample
        for sample, row in zip(held_out, rows, strict=True)
        if has_answer(row) and not row.truncated
    ]


def plan_runs(
    scores_by_scorer: Mapping[str, np.ndarray], row_keys: np.ndarray, settings: WorthSettings
) -> list[Run]:
    runs = [Run(NO_FINETUNING, 0.0, settings.seeds[0], np.empty(0, dtype=np.int64))]
    for fraction in settings.fractions:
        for seed in settings.seeds:
            draw = np.random.default_rng(seed).random(len(row_keys))
            runs.append(Run(RANDOM, fraction, seed, choose(draw, fraction, row_keys)))
        for scorer, scores in scores_by_scorer.items():
            if scorer in settings.only.get(fraction, scores_by_scorer):
                kept = choose(scores, fraction, row_keys)
                runs += [Run(scorer, fraction, seed, kept) for seed in settings.seeds]
    return runs


def run_all(
    runs: Sequence[Run], pool: Sequence[Sample], held_out: Sequence[Sample], settings: WorthSettings
) -> list[list[AnswerLoss]]:
    """Losses on the held-out rows after each run, in the order of `runs`; logs a line per run."""
    report = progress_lines(runs, num_held_out=len(held_out))
    # Longest first, so that the workers finish at about the same time.
    order = sorted(range(len(runs)), key=lambda number: -len(runs[number].positions))
    tasks: dict[str, Task] = {}
    for number in order:
        rows = [pool[position] for position in runs[number].positions]
        tasks[str(number)] = (run_one, (rows, runs[number].seed, held_out, settings))
    losses_by_run = run_tasks(
        tasks,
        num_workers=settings.num_workers,
        on_done=lambda number, losses: report(runs[int(number)], losses),
    )
    return [losses_by_run[str(number)] for number in range(len(runs))]


def run_one(
    rows: Sequence[Sample], seed: int, held_out: Sequence[Sample], settings: WorthSettings
) -> list[AnswerLoss]:
    """Finetunes the target on the rows, if any, and evaluates it on the held-out rows."""
    with TemporaryDirectory() as folder:
        adapter = train_adapter(rows, seed, settings, Path(folder)) if rows else None
        config = EvaluateConfig(model=settings.model, adapter=adapter)
        model, tokenizer = load_target(config, device="cpu")
    losses, reasons = answer_losses(
        model, tokenizer, held_out, max_sequence_length=settings.max_sequence_length
    )
    assert not reasons, reasons  # `keep_untruncated` has the same rules
    return losses


def train_adapter(rows: Sequence[Sample], seed: int, settings: WorthSettings, folder: Path) -> str:
    """Runs stage 3 on the rows; returns the folder of the adapter."""
    write_jsonl(folder / "rows.jsonl", map(row_of, rows))
    config = settings.finetune_config(folder / "rows.jsonl", seed=seed)
    tokenizer = load_target_tokenizer(config)
    worker = TrainingWorker(output=folder / "run", scratch=folder / "checkpoints")
    prepare_supervised_rows(config, tokenizer, worker.output)
    report = finetune(config, tokenizer, worker)
    return str(worker.scratch / report.checkpoint)


def row_of(sample: Sample) -> dict[str, object]:
    messages = messages_of(sample)
    return {"dataset": sample.dataset, "id": sample.sample_id, "messages": messages}


def progress_lines(
    runs: Sequence[Run], *, num_held_out: int
) -> Callable[[Run, list[AnswerLoss]], None]:
    """A callback for finished runs, which logs their loss and the estimated time left."""
    started, num_done, done = time.perf_counter(), 0, 0.0

    def cost(run: Run) -> float:
        return len(run.positions) + num_held_out / COST_RATIO

    def report(run: Run, losses: list[AnswerLoss]) -> None:
        nonlocal num_done, done
        num_done, done = num_done + 1, done + cost(run)
        ratio = max(sum(map(cost, runs)) / done - 1, 0.0)  # remaining over finished work
        seconds = (time.perf_counter() - started) * ratio
        logger.info(
            "worth %d/%d: %s: %.4f nats; about %.0f s left",
            *(num_done, len(runs), run, mean_loss(losses), seconds),
        )

    return report


def mean_loss(losses: Iterable[AnswerLoss]) -> float:
    nll, num_tokens = zip(*((loss.nll, loss.num_tokens) for loss in losses), strict=True)
    return float(sum(nll) / sum(num_tokens))


def worth_rows(
    runs: Sequence[Run],
    losses: Sequence[list[AnswerLoss]],
    pool: Pool,
    datasets: Sequence[str],
) -> list[WorthRow]:
    """One row per scorer and fraction, compared with random. datasets: of the held-out rows."""
    num_tokens_R = np.array([loss.num_tokens for loss in losses[0]])
    runs_by_group: dict[tuple[str, float], list[int]] = {}
    for number, run in enumerate(runs):
        runs_by_group.setdefault((run.scorer, run.fraction), []).append(number)
    nll_SR = {
        group: np.array([[loss.nll for loss in losses[number]] for number in numbers])
        for group, numbers in runs_by_group.items()
    }
    rows = []
    for group, numbers in runs_by_group.items():
        scorer, fraction = group
        loss_S = nll_SR[group].sum(axis=1) / num_tokens_R.sum()
        compared = {}
        if scorer not in (RANDOM, NO_FINETUNING):
            difference_SR = nll_SR[group] - nll_SR[RANDOM, fraction]
            compared = compare_with_random(difference_SR, num_tokens_R, np.array(datasets))
        rows.append(
            WorthRow(
                scorer=scorer,
                fraction=fraction,
                loss=float(loss_S.mean()),
                loss_by_seed=tuple(map(float, loss_S)),
                **pool.describe([runs[number] for number in numbers]),  # type: ignore[arg-type]
                **compared,  # type: ignore[arg-type]
            )
        )
    return rows


def compare_with_random(
    difference_SR: np.ndarray, num_tokens_R: np.ndarray, datasets: np.ndarray
) -> dict[str, object]:
    """difference_SR: differences of the summed loss of each answer, in nats.

    All tokens have the same weight, as in the loss of stage 3 and the answer loss of stage 4. With
    equal weights per row, the noise of one-word answers, of which flan_v2 has many, would hide the
    long ones. The permutation test flips the signs of whole rows.
    """
    difference_R = difference_SR.mean(axis=0)
    return {
        "difference": float(difference_R.sum() / num_tokens_R.sum()),
        "difference_by_dataset": {
            str(name): float(
                difference_R[datasets == name].sum() / num_tokens_R[datasets == name].sum()
            )
            for name in dict.fromkeys(datasets.tolist())
        },
        "p_rows": sign_flip_p(difference_R),
        "p_seeds": t_test_p(difference_SR.sum(axis=1)),
    }
