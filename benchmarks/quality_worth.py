"""What a selection is worth to a target: stage 3 on the best rows by each scorer, and at random.

The target is the selector's own language model, gates forced open, finetuned and asked by the code
of stages 3 and 4. Rows without an answer in the first `max_sequence_length` tokens teach nothing
and are left out of the pool before anything is chosen, so that all learn from equally many rows.

A scorer is compared with the random draw of the same seed, which also starts from the same adapter.
Two p values, both two-sided and without a correction for how many scorers are compared: over
held-out rows (would it hold on other rows, with these finetunings?) and over seeds (would it hold
with other draws, orders and adapters?). Believe the greater one: rows alone tell apart even two
random draws, since the losses after 126 rows had a standard deviation of .005 to .007 over seeds.
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
from selectmoe.finetune.stage import TrainingPlace, finetune
from selectmoe.finetune.supervised_data import SupervisedRows, load_target_tokenizer, prepare_rows
from selectmoe.records import Sample, TokenizedSample
from selectmoe.selection.top_k import descending_keys, num_to_keep
from selectmoe.warmup.contrastive_pairs import NUM_DONORS

# Shape letters: S = seeds, R = held-out rows.
RANDOM = "random"
NO_FINETUNING = "no finetuning"
COST_RATIO = 5  # of learning from a row, once, to asking one

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorthSettings:
    """What is finetuned, how often and how."""

    fractions: tuple[float, ...] = (0.05, 0.20)
    """Shares of the pool that are kept."""
    only: Mapping[float, tuple[str, ...]] = field(
        default_factory=lambda: {0.20: ("gate", "length")}
    )
    """Fractions that are measured for these scorers and random alone, since they take longest."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the adapter, its dropout, the order of the rows and the random draw."""
    model: str | None = None
    """Folder of the Select-MoE whose language model is the target; None is the one that ships."""
    max_sequence_length: int = 256
    """Tokens of a row that are learned from; longer held-out rows are not asked."""
    overrides: tuple[str, ...] = ("preset=tiny", "training.num_epochs=1")
    """Settings of stage 3."""
    num_workers: int = 2
    """Processes, each with one thread."""

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
    """What one scorer's choice was worth; losses are mean nats per answer token."""

    scorer: str
    fraction: float
    num_rows: int  # that were learned from
    num_answer_tokens: int  # in these, once through; of a random choice the mean over its draws
    loss: float  # mean over seeds
    loss_by_seed: tuple[float, ...]
    difference: float | None = None  # to random; negative is better than random
    difference_by_dataset: Mapping[str, float] = field(default_factory=dict)
    p_rows: float | None = None
    p_seeds: float | None = None
    corrupted_share: float | None = None  # of the rows that were learned from


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One finetuning."""

    scorer: str
    fraction: float
    seed: int
    positions: np.ndarray  # of the rows in the pool; none where the target is asked as it is

    def __str__(self) -> str:
        return f"{self.scorer}, {self.fraction:.0%}, seed {self.seed}"


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The rows that can be learned from."""

    positions: np.ndarray  # in the pool that was given
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
        """What runs that differ in nothing but their seeds have learned from."""
        chosen = [run.positions for run in runs]
        bad = self.corrupted
        return {
            "num_rows": len(chosen[0]),
            "num_answer_tokens": round(
                float(np.mean([self.num_answer_tokens[rows].sum() for rows in chosen]))
            ),
            "corrupted_share": None
            if bad is None or not len(chosen[0])
            else float(np.mean([bad[rows].mean() for rows in chosen])),
        }


def corrupted_pool(
    samples: Sequence[Sample], *, share: float, seed: int, kinds: Sequence[str] = tuple(CORRUPTIONS)
) -> tuple[list[Sample], np.ndarray]:
    """The rows with `share` of them replaced by worse copies, kinds in turn, and which these are.

    A row that its kind cannot make worse gets the next one's copy, and stays where none can.
    """
    random = Random(seed)
    pool, corrupted = list(samples), np.zeros(len(samples), dtype=bool)
    for position in random.sample(range(len(samples)), num_to_keep(len(samples), share)):
        donors = random.sample(list(samples), min(NUM_DONORS, len(samples)))
        first = int(corrupted.sum()) % len(kinds)
        for kind in [*kinds[first:], *kinds[:first]]:
            copy = corrupt(samples[position], kind=kind, seed=seed, donors=donors)
            if copy is not None:
                pool[position], corrupted[position] = copy, True
                break
    return pool, corrupted


def choose(scores: np.ndarray, fraction: float, row_keys: np.ndarray) -> np.ndarray:
    """Positions of the rows that stage 2 would keep of these."""
    scores = scores.astype(np.float32)  # as they are stored
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
    """A row for the target as it is, and one for each fraction and scorer, random first.

    scores_by_scorer: of every row of the pool, higher is better; those of "random", if given, are
    drawn anew for every seed. corrupted: which rows of the pool are worse copies.
    """
    tokenizer = ChatTokenizer(
        load_target_tokenizer(settings.finetune_config(None, seed=0)),
        max_sequence_length=settings.max_sequence_length,
    )
    asked = askable(held_out, tokenizer)
    learnable = Pool.of(pool, tokenizer, corrupted)
    logger.info(
        "worth: %d of %d rows of the pool have an answer in %d tokens, %d of %d held-out rows fit",
        *(len(learnable.samples), len(pool), settings.max_sequence_length),
        *(len(asked), len(held_out)),
    )
    if not learnable.samples or not asked:
        raise DataError(
            f"max_sequence_length={settings.max_sequence_length} must leave rows to learn from and "
            f"to ask, leaves {len(learnable.samples)} and {len(asked)}"
        )
    scores = {
        name: found[learnable.positions]
        for name, found in scores_by_scorer.items()
        if name != RANDOM
    }
    runs = plan_runs(scores, learnable.row_keys, settings)
    losses = run_all(runs, learnable.samples, asked, settings)
    return worth_rows(runs, losses, learnable, [sample.dataset for sample in asked])


def has_answer(row: TokenizedSample) -> bool:
    return bool(row.answer_mask[1:].any())


def askable(held_out: Sequence[Sample], tokenizer: ChatTokenizer) -> list[Sample]:
    """The rows that are not longer than what is read."""
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
    """The losses on the held-out rows after each run, in the order of `runs`; a line for each."""
    report = progress_lines(runs, num_held_out=len(held_out))
    # Longest first, so that in the end no worker waits long for another's last.
    order = sorted(range(len(runs)), key=lambda number: -len(runs[number].positions))
    tasks: dict[str, Task] = {}
    for number in order:
        rows = [pool[position] for position in runs[number].positions]
        tasks[str(number)] = (run_one, (rows, runs[number].seed, held_out, settings))
    found = run_tasks(
        tasks,
        num_workers=settings.num_workers,
        on_done=lambda number, losses: report(runs[int(number)], losses),
    )
    return [found[str(number)] for number in range(len(runs))]


def run_one(
    rows: Sequence[Sample], seed: int, held_out: Sequence[Sample], settings: WorthSettings
) -> list[AnswerLoss]:
    """Finetunes the target on rows, if there are any, and asks it the held-out ones."""
    with TemporaryDirectory() as folder:
        adapter = finetuned(rows, seed, settings, Path(folder)) if rows else None
        config = EvaluateConfig(model=settings.model, adapter=adapter)
        model, tokenizer = load_target(config, device="cpu")
    losses, reasons = answer_losses(
        model, tokenizer, held_out, max_sequence_length=settings.max_sequence_length
    )
    assert not reasons, reasons  # `askable` knows the same rules
    return losses


def finetuned(rows: Sequence[Sample], seed: int, settings: WorthSettings, folder: Path) -> str:
    """The folder of the adapter that stage 3 makes of rows."""
    write_jsonl(folder / "rows.jsonl", map(as_line, rows))
    config = settings.finetune_config(folder / "rows.jsonl", seed=seed)
    tokenizer = load_target_tokenizer(config)
    prepare_rows(config, tokenizer, folder / "tokenized")
    place = TrainingPlace(checkpoints=folder / "checkpoints")
    prepared = SupervisedRows(folder / "tokenized")
    report = finetune(config, prepared, tokenizer, place, output=folder / "run")
    return str(place.checkpoints / report.checkpoint)


def as_line(sample: Sample) -> dict[str, object]:
    turns = [{"role": turn.role, "content": turn.content} for turn in sample.messages]
    return {"dataset": sample.dataset, "id": sample.sample_id, "messages": turns}


def progress_lines(
    runs: Sequence[Run], *, num_held_out: int
) -> Callable[[Run, list[AnswerLoss]], None]:
    """To be told of every finished run: logs it, and how long the others will take."""
    started, num_done, done = time.perf_counter(), 0, 0.0

    def cost(run: Run) -> float:
        return len(run.positions) + num_held_out / COST_RATIO

    def report(run: Run, losses: list[AnswerLoss]) -> None:
        nonlocal num_done, done
        num_done, done = num_done + 1, done + cost(run)
        ratio = max(sum(map(cost, runs)) / done - 1, 0.0)  # of what is left to what is done
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
    """The runs of a scorer and fraction as one row, compared with random; datasets: of the held-out
    rows."""
    num_tokens_R = np.array([loss.num_tokens for loss in losses[0]])
    groups: dict[tuple[str, float], list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault((run.scorer, run.fraction), []).append(number)
    nll_SR = {
        key: np.array([[loss.nll for loss in losses[number]] for number in numbers])
        for key, numbers in groups.items()
    }
    rows = []
    for (scorer, fraction), numbers in groups.items():
        mine_SR = nll_SR[scorer, fraction]
        loss_S = mine_SR.sum(axis=1) / num_tokens_R.sum()
        compared = {}
        if scorer not in (RANDOM, NO_FINETUNING):
            difference_SR = mine_SR - nll_SR[RANDOM, fraction]
            compared = comparison(difference_SR, num_tokens_R, np.array(datasets))
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


def comparison(
    difference_SR: np.ndarray, num_tokens_R: np.ndarray, datasets: np.ndarray
) -> dict[str, object]:
    """difference_SR: summed nats of the answers.

    Every token counts the same, as in the loss of stage 3 and the answer loss of stage 4. With
    every row the same, an answer of one word, as many of flan_v2 are, would count for a whole essay
    and hide it in its noise. A row's tokens keep together when the test flips signs.
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
