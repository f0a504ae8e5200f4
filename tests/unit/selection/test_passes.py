"""Passes over scored shards on disk, against one sort of everything in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import map_in_threads
from selectmoe.data.writers import write_parquet
from selectmoe.records import Message, Sample, ScoredSample, UnscoredSample
from selectmoe.selection.budgets import scope_totals
from selectmoe.selection.keep_rule import ThresholdRule, kept_rows
from selectmoe.selection.orders import ByScore
from selectmoe.selection.passes import Pool, Survey, find_thresholds, shard_groups, survey
from selectmoe.selection.scored_shards import scored_table
from selectmoe.selection.strategies import ScoredRows, choose_rows
from selectmoe.selection.top_k import num_to_keep

NUM_SHARDS = 20
DATASETS = ("few", "many", "most")


def random_shard(seed: int, num_rows: int, *, decimals: int) -> pa.Table:
    """Some rows have no score; the last shard has none at all of one dataset."""
    rng = np.random.default_rng(seed)
    scores = rng.random(num_rows).astype(np.float32).round(decimals)
    datasets = rng.choice(DATASETS[seed == NUM_SHARDS - 1 :], num_rows)
    return pa.table(
        {
            "row_key": [rng.bytes(16).hex() for _ in range(num_rows)],
            "dataset": pa.array(datasets.tolist(), pa.string()),
            "score": pa.array(scores, mask=rng.random(num_rows) < 0.05),
            "num_tokens": rng.integers(1, 500, num_rows, dtype=np.int32),
            "num_answer_tokens": rng.integers(1, 90, num_rows, dtype=np.int32),
            "truncated": rng.random(num_rows) < 0.1,
        }
    )


def write_scored(folder: Path, *, decimals: int = 2, rows_per_group: int = 150) -> list[Path]:
    shards = []
    for number in range(NUM_SHARDS):
        shards.append(folder / f"shard-{number:06d}.parquet")
        table = random_shard(number, 400, decimals=decimals)
        pq.write_table(table, shards[-1], row_group_size=rows_per_group)
    return shards


def kept_keys(
    shards: list[Path], *, percentage: float, per_dataset: bool, max_candidates: int = 100_000
) -> list[str]:
    groups = shard_groups(shards)
    found = Survey.total(map_in_threads(survey, groups))
    scored = ScoredRows(groups, found, map_in_threads)
    num_rows = scope_totals(found.num_rows, by_dataset=per_dataset)
    thresholds = find_thresholds(
        groups,
        {name: num_to_keep(number, percentage) for name, number in num_rows.items()},
        Pool(),
        histograms=scored.first_digits(by_dataset=per_dataset),
        map_items=map_in_threads,
        max_candidates=max_candidates,
    )
    rule = ThresholdRule(ByScore(), thresholds)
    keys = []
    for shard in shards:
        kept = kept_rows(rule, shard)
        table = pq.read_table(shard).take(kept.row_numbers)
        assert table["score"].to_pylist() == kept.scores.tolist()
        assert table["num_answer_tokens"].to_pylist() == kept.num_answer_tokens.tolist()
        keys += table["row_key"].to_pylist()
    return keys


def keys_by_sorting(shards: list[Path], *, percentage: float, per_dataset: bool) -> set[str]:
    table = pa.concat_tables(map(pq.read_table, shards))
    rows = [row for row in table.to_pylist() if row["score"] is not None]
    kept = set()
    for names in [[name] for name in DATASETS] if per_dataset else [list(DATASETS)]:
        own = sorted((-row["score"], row["row_key"]) for row in rows if row["dataset"] in names)
        kept |= {key for _, key in own[: num_to_keep(len(own), percentage)]}
    return kept


@pytest.mark.parametrize("per_dataset", [False, True])
@pytest.mark.parametrize("decimals", [0, 2, 7])  # 0: all scores are 0 or 1
@pytest.mark.parametrize("percentage", [0.0001, 0.1, 1.0])
def test_the_passes_keep_what_a_full_sort_would(tmp_path, percentage, decimals, per_dataset):
    shards = write_scored(tmp_path, decimals=decimals)
    keys = kept_keys(shards, percentage=percentage, per_dataset=per_dataset)
    expected = keys_by_sorting(shards, percentage=percentage, per_dataset=per_dataset)
    assert len(keys) == len(expected)
    assert set(keys) == expected


@pytest.mark.parametrize("per_dataset", [False, True])
@pytest.mark.parametrize("decimals", [0, 7])
def test_the_same_rows_are_kept_when_few_may_be_looked_at(tmp_path, decimals, per_dataset):
    shards = write_scored(tmp_path, decimals=decimals)
    keys = kept_keys(shards, percentage=0.3, per_dataset=per_dataset, max_candidates=3)
    assert set(keys) == keys_by_sorting(shards, percentage=0.3, per_dataset=per_dataset)


def test_the_survey_counts_scored_rows_by_data_set(tmp_path):
    shards = write_scored(tmp_path)
    found = Survey.total(map_in_threads(survey, shard_groups(shards)))
    table = pa.concat_tables(map(pq.read_table, shards))
    rows = [row for row in table.to_pylist() if row["score"] is not None]
    for name in DATASETS:
        own = [row for row in rows if row["dataset"] == name]
        assert found.num_rows[name] == len(own)
        assert found.num_tokens[name] == sum(row["num_tokens"] for row in own)
        assert found.num_truncated[name] == sum(row["truncated"] for row in own)
    assert found.quantile_bins.sum() == len(rows)


def bytes_read() -> int:
    """By this process so far, as the kernel counts what its calls of read() returned."""
    counters = Path("/proc/self/io").read_text().splitlines()
    return int(counters[0].removeprefix("rchar: "))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
def test_row_groups_that_cannot_hold_a_kept_row_are_not_read(tmp_path):
    """Ten row groups, each of scores above those before it: the best 5 % lie in the last."""
    num_rows = 300_000
    rng = np.random.default_rng(0)
    scores = (rng.random(num_rows) + np.repeat(np.arange(10), num_rows // 10)) / 10
    table = random_shard(0, num_rows, decimals=7).set_column(
        2, "score", pa.array(scores, pa.float32())
    )
    shard = tmp_path / "shard-000000.parquet"
    pq.write_table(table, shard, row_group_size=num_rows // 10)
    scored = ScoredRows([[shard]], survey([shard]), map_in_threads)
    rule = choose_rows(SelectConfig(selection_percentage=0.05), scored).rule
    before = bytes_read()
    rows = kept_rows(rule, shard).row_numbers
    num_bytes = bytes_read() - before
    metadata = pq.read_metadata(shard)
    names = metadata.schema.names
    last = metadata.row_group(9)
    score, row_key = (last.column(names.index(name)) for name in ("score", "row_key"))
    assert len(rows) == num_rows // 20
    assert rows.min() >= num_rows * 9 // 10
    # Scores of one row group in ten, the keys of those that the one tied row is among, the footer.
    wanted = score.total_compressed_size + row_key.total_compressed_size
    assert score.total_compressed_size < num_bytes < wanted + 100_000
    scores_of_all = sum(
        metadata.row_group(n).column(names.index("score")).total_compressed_size for n in range(10)
    )
    assert wanted + 100_000 < scores_of_all + row_key.total_compressed_size


def test_shards_are_written_with_the_statistics_that_row_groups_are_passed_over_by(tmp_path):
    sample = Sample("demo", "1", (Message("assistant", "yes"),), "corpus.jsonl:1")
    outcomes = [
        ScoredSample("1", 0.25, 9, 4, False, np.zeros(2, dtype=np.float32)),
        ScoredSample("1", 0.75, 9, 4, False, np.zeros(2, dtype=np.float32)),
        UnscoredSample("1", "score_not_finite", "nan"),
    ]
    table = scored_table([("0" * 32, sample)] * 3, outcomes)
    write_parquet(tmp_path / "shard-000000.parquet", table)
    metadata = pq.read_metadata(tmp_path / "shard-000000.parquet")
    names = metadata.schema.names
    score = metadata.row_group(0).column(names.index("score")).statistics
    assert (score.min, score.max, score.null_count) == (0.25, 0.75, 1)
    assert metadata.row_group(0).column(names.index("reason")).statistics.null_count == 2


def test_a_pass_is_called_on_every_shard_once_and_its_mistakes_are_told():
    shards = [Path(str(number)) for number in range(1_000)]
    groups = shard_groups(shards)
    assert 1 < len(groups) < len(shards)
    parts = list(map_in_threads(list, groups))
    assert [shard for part in parts for shard in part] == shards
    with pytest.raises(FileNotFoundError, match="0"):
        list(map_in_threads(survey, groups))
