"""Each strategy on shards on disk, against one sort of all rows in memory."""

import bisect
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.config.selection import SelectConfig, SelectionConfig
from selectmoe.errors import ConfigError
from selectmoe.selection.blocks import score_blocks
from selectmoe.selection.keep_rule import Fate, kept_rows
from selectmoe.selection.passes import Survey, shard_groups, survey
from selectmoe.selection.strategies import ChosenRule, ScoredRows, choose_rows
from selectmoe.selection.top_k import num_to_keep

DATASETS = ("few", "many", "most")
STRATEGIES = ("top", "sampled", "random", "longest")


def random_rows(seed: int, num_rows: int, *, decimals: int = 2) -> pa.Table:
    """Few datasets, many ties, some rows without a score."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "row_key": [rng.bytes(16).hex() for _ in range(num_rows)],
            "dataset": rng.choice(DATASETS, num_rows, p=[0.05, 0.35, 0.6]).tolist(),
            "score": pa.array(
                rng.random(num_rows).astype(np.float32).round(decimals),
                mask=rng.random(num_rows) < 0.05,
            ),
            "num_tokens": rng.integers(1, 500, num_rows, dtype=np.int32),
            "num_answer_tokens": rng.integers(1, 30, num_rows, dtype=np.int32),
            "truncated": rng.random(num_rows) < 0.1,
        }
    )


def write_parts(folder: Path, rows: pa.Table, *, num_files: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.arange(len(rows)), num_files)
    files = []
    for number, part in enumerate(parts):
        files.append(folder / f"shard-{number:06d}.parquet")
        pq.write_table(rows.take(part), files[-1], row_group_size=max(len(part) // 2, 1))
    return files


def settings(budget: dict | None = None, *, per_dataset: bool = False, **selection) -> SelectConfig:
    budget = dict(budget or {"pct": 0.2})
    return SelectConfig(
        selection_percentage=budget.pop("pct", None),
        per_dataset=per_dataset,
        selection=SelectionConfig(**budget, **selection),
    )


def choose(files: list[Path], config: SelectConfig) -> ChosenRule:
    """As a run does, one group after the other."""
    groups = shard_groups(files)
    return choose_rows(config, ScoredRows(groups, Survey.total(map(survey, groups)), map))


def kept_keys(files: list[Path], config: SelectConfig) -> set[str]:
    rule = choose(files, config).rule
    keys: list[str] = []
    for file in files:
        table = pq.read_table(file).take(kept_rows(rule, file).row_numbers)
        keys += table["row_key"].to_pylist()
    assert len(keys) == len(set(keys))
    return set(keys)


def scored_rows(rows: pa.Table) -> list[dict]:
    return [row for row in rows.to_pylist() if row["score"] is not None]


def above_floor(rows: list[dict], floor: float) -> list[dict]:
    ordered = sorted(rows, key=lambda row: (-row["score"], row["row_key"]))
    return ordered[: len(rows) - int(Fraction(str(floor)) * len(rows))]


def mixed(value: int) -> int:
    """SplitMix64, one number at a time."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def noise_of(row: dict, seed: int) -> float:
    name, content = int(row["row_key"][:16], 16), int(row["row_key"][16:32], 16)
    bits = mixed(mixed((name + mixed(seed)) & (2**64 - 1)) ^ content)
    return -math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52))


def in_order(rows: list[dict], config: SelectConfig) -> list[dict]:
    """All rows by the strategy, the first to be kept first; ranks are counted one by one."""
    chosen, seed = config.selection, config.selection.seed
    ascending = sorted(row["score"] for row in rows)

    def priority(row: dict) -> float:
        if chosen.strategy == "top" or (chosen.strategy == "sampled" and not chosen.temperature):
            return row["score"]
        if chosen.strategy == "longest":
            return row["num_answer_tokens"]
        if chosen.strategy == "random":
            return noise_of(row, seed)
        # Each score has a cell of its own here: half of its rows count as better.
        better = len(rows) - bisect.bisect_right(ascending, row["score"])
        equal = len(rows) - better - bisect.bisect_left(ascending, row["score"])
        keys = np.array([row["score"]], np.float32).view(np.uint32)
        inside = (((~keys[0]) & 0x3FF) + 0.5) / 1024
        rank = 12**0.5 * (0.5 - (better + equal * inside) / len(rows))
        return rank / chosen.temperature + noise_of(row, seed)

    return sorted(rows, key=lambda row: (-priority(row), row["row_key"]))


def expected_keys(rows: pa.Table, config: SelectConfig) -> set[str]:
    """By definition: one dataset after the other, or the whole corpus."""
    scored, chosen = scored_rows(rows), config.selection
    groups = [scored]
    if config.per_dataset:
        groups = [[row for row in scored if row["dataset"] == name] for name in DATASETS]
    kept: list[dict] = []
    for group in groups:
        ordered = in_order(above_floor(group, chosen.floor), config)
        if config.per_dataset:
            number = num_in_budget(ordered, len(group), config)
            number = max(number, chosen.min_per_dataset or 0)
            kept += ordered[: min(number, chosen.max_per_dataset or number)]
        else:
            kept += with_limits(ordered, len(group), config)
    return {row["row_key"] for row in kept}


def num_in_budget(ordered: list[dict], num_scored: int, config: SelectConfig, used: int = 0) -> int:
    if config.selection.rows:
        return config.selection.rows
    if config.selection.tokens:
        totals = np.cumsum([row["num_answer_tokens"] for row in ordered])
        return int((totals <= config.selection.tokens - used).sum())
    return num_to_keep(num_scored, config.selection_percentage)


def with_limits(ordered: list[dict], num_scored: int, config: SelectConfig) -> list[dict]:
    least = config.selection.min_per_dataset or 0
    most = config.selection.max_per_dataset or len(ordered)
    place = dict.fromkeys(DATASETS, 0)
    taken, competing = [], []
    for row in ordered:
        place[row["dataset"]] += 1
        if place[row["dataset"]] <= least:
            taken.append(row)
        elif place[row["dataset"]] <= most:
            competing.append(row)
    used = sum(row["num_answer_tokens"] for row in taken)
    number = num_in_budget(competing, num_scored, config, used)
    number -= 0 if config.selection.tokens else len(taken)
    return taken + competing[:number]


BUDGETS = ({"pct": 0.2}, {"pct": 0.001}, {"rows": 57}, {"tokens": 700})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_strategy_keeps_what_a_full_sort_would(tmp_path, strategy, budget):
    for number, decimals in enumerate((0, 2, 7)):
        rows = random_rows(number, 600, decimals=decimals)
        files = write_parts(tmp_path / str(number), rows, num_files=3)
        for floor, per_dataset in ((0.0, False), (0.3, False), (0.3, True)):
            config = settings(
                budget, per_dataset=per_dataset, strategy=strategy, floor=floor, seed=number
            )
            assert kept_keys(files, config) == expected_keys(rows, config)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [{"pct": 0.2}, {"rows": 120}, {"tokens": 1_400}], ids=str)
@pytest.mark.parametrize("limits", [(12, None), (None, 40), (5, 60)])
def test_limits_of_datasets_keep_what_taking_row_by_row_would(tmp_path, strategy, budget, limits):
    rows = random_rows(7, 600)
    files = write_parts(tmp_path, rows, num_files=3)
    least, most = limits
    for floor in (0.0, 0.2):
        config = settings(
            budget, strategy=strategy, floor=floor, min_per_dataset=least, max_per_dataset=most
        )
        assert kept_keys(files, config) == expected_keys(rows, config)
        if "tokens" not in budget:
            config = settings(
                budget,
                per_dataset=True,
                strategy=strategy,
                floor=floor,
                min_per_dataset=least,
                max_per_dataset=most,
            )
            assert kept_keys(files, config) == expected_keys(rows, config)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_and_number_of_files_change_nothing(tmp_path, strategy):
    rows = random_rows(1, 900)
    config = settings({"pct": 0.1}, strategy=strategy, floor=0.25, max_per_dataset=50, seed=3)
    expected = kept_keys(write_parts(tmp_path / "one", rows, num_files=1), config)
    for number, num_files in enumerate((2, 7, 40)):
        shuffled = rows.take(np.random.default_rng(number).permutation(len(rows)))
        files = write_parts(tmp_path / str(num_files), shuffled, num_files=num_files)
        assert kept_keys(files, config) == expected


def test_temperature_leads_from_the_best_rows_to_a_uniform_draw(tmp_path):
    rows = random_rows(2, 1_000, decimals=7)
    files = write_parts(tmp_path, rows, num_files=2)
    scores = {row["row_key"]: row["score"] for row in scored_rows(rows)}

    def kept(strategy, **chosen):
        return kept_keys(files, settings({"pct": 0.1}, strategy=strategy, seed=5, **chosen))

    assert kept("sampled", temperature=0.0) == kept("top")
    assert kept("sampled", temperature=1e-5) == kept("top")
    assert kept("sampled", temperature=1e9) == kept("random")
    means = [
        np.mean([scores[key] for key in kept("sampled", temperature=temperature)])
        for temperature in (0.1, 0.5, 2.0, 20.0)
    ]
    assert means == sorted(means, reverse=True)
    other = settings({"pct": 0.1}, strategy="sampled", seed=6)
    assert kept("sampled") != kept_keys(files, other)


def test_equal_scores_are_drawn_uniformly_and_settled_by_key_otherwise(tmp_path):
    rows = random_rows(3, 300, decimals=0)
    rows = rows.set_column(2, "score", pa.array([0.5] * 300, pa.float32()))
    files = write_parts(tmp_path, rows, num_files=3)
    assert kept_keys(files, settings(strategy="sampled")) == kept_keys(
        files, settings(strategy="random")
    )
    first = set(sorted(rows["row_key"].to_pylist())[:60])
    assert kept_keys(files, settings(strategy="top")) == first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_score_that_is_not_a_number_is_refused(tmp_path, strategy):
    rows = random_rows(0, 20).set_column(2, "score", pa.array([float("nan")] * 20, pa.float32()))
    with pytest.raises(ValueError, match="finite"):
        choose(write_parts(tmp_path, rows, num_files=1), settings(strategy=strategy))


def test_a_budget_that_keeps_every_row_is_told(tmp_path):
    files = write_parts(tmp_path, random_rows(0, 300), num_files=2)
    num_scored = len(kept_keys(files, settings({"pct": 1.0})))
    for budget, told in (
        ({"rows": 1_000}, f"selection.rows=1,000 keeps all {num_scored} scored rows"),
        ({"tokens": 10**9}, f"selection.tokens=1,000,000,000 keeps all {num_scored} scored rows"),
    ):
        assert choose(files, settings(budget)).shortfalls == [told]
        assert len(kept_keys(files, settings(budget))) == num_scored
    chosen = choose(files, settings({"rows": 90}, max_per_dataset=3))
    assert chosen.shortfalls == ["selection.max_per_dataset=3 leaves 9 rows of 90 to keep"]
    floored = choose(files, settings({"rows": 1_000}, floor=0.5)).shortfalls
    assert floored == [
        f"selection.rows=1,000 keeps all {num_scored - num_scored // 2} scored rows above the floor"
    ]


def test_a_budget_that_cannot_be_met_is_refused_with_the_numbers(tmp_path):
    rows = random_rows(0, 300)
    files = write_parts(tmp_path, rows, num_files=2)
    longest = max(row["num_answer_tokens"] for row in scored_rows(rows))
    message = f"at least {longest}, the answer tokens of the first row, got {longest - 1}"
    with pytest.raises(ConfigError, match=message):
        choose(files, settings({"tokens": longest - 1}, strategy="longest"))
    with pytest.raises(ConfigError, match=r"it takes 12 rows, and 10 are to be kept"):
        choose(files, settings({"rows": 10}, min_per_dataset=4))
    with pytest.raises(ConfigError, match=r"the answer tokens of selection\.min_per_dataset=4"):
        choose(files, settings({"tokens": 5}, min_per_dataset=4))


def test_settings_that_contradict_each_other_are_refused_by_name():
    for budget, message in (
        ({"rows": 5, "tokens": 7}, r"selection\.rows \(--rows\)=5 and selection\.tokens"),
        ({"pct": 0.1, "rows": 5}, r"selection_percentage \(--pct\)=0\.1 and selection\.rows"),
    ):
        with pytest.raises(ConfigError, match=f"only one budget may be set, got {message}"):
            settings(budget)
    with pytest.raises(ConfigError, match=r"at most 1 - selection\.floor = 0\.7, got 0\.8"):
        settings({"pct": 0.8}, floor=0.3)
    settings({"pct": 0.7}, floor=0.3)  # in floats 1 - 0.3 is below 0.7
    with pytest.raises(ConfigError, match="min_per_dataset must be at most max_per_dataset=2"):
        settings(min_per_dataset=3, max_per_dataset=2)
    assert SelectConfig().selection_percentage == 0.05


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_scored_row_has_one_fate(tmp_path, strategy):
    rows = random_rows(4, 400)
    files = write_parts(tmp_path, rows, num_files=2)
    config = settings({"rows": 80}, strategy=strategy, floor=0.25, max_per_dataset=30)
    chosen = choose(files, config)
    fates = np.concatenate(
        [
            chosen.rule.fates(block)
            for file in files
            for block in score_blocks(file, chosen.rule.columns)
        ]
    )
    num_scored = len(scored_rows(rows))
    assert len(fates) == num_scored
    assert (fates == Fate.BELOW_FLOOR).sum() == num_scored // 4
    assert (fates == Fate.KEPT).sum() == sum(
        threshold.num_kept for threshold in chosen.rule.thresholds.values()
    )
    assert (fates == Fate.OVER_DATASET_MAXIMUM).sum() == chosen.num_over_maximum > 0
