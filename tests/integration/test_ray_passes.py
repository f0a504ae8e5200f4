"""The cut of many scores as Ray Data maps, on a real local Ray."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.ray_passes import map_on_ray, shard_map
from jobs.ray_session import start_ray
from selectmoe.data.shards import write_shards
from selectmoe.records import Message, Sample
from selectmoe.score_passes import ShardMap, Survey, find_cuts, map_in_threads, survey
from selectmoe.scored_shards import RunFolder
from selectmoe.selection import Cut

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """70 shards of 300 rows with few different scores, so that the cut goes through a tie."""
    folder = tmp_path_factory.mktemp("scored")
    for number in range(70):
        rng = np.random.default_rng(number)
        table = pa.table(
            {
                "row_key": [rng.bytes(16).hex() for _ in range(300)],
                "dataset": rng.choice(["few", "many", "many"], 300).tolist(),
                "score": rng.random(300).astype(np.float32).round(2),
                "num_tokens": rng.integers(1, 500, 300, dtype=np.int32),
                "truncated": rng.random(300) < 0.1,
            }
        )
        pq.write_table(table, folder / f"shard-{number:06d}.parquet")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def local_ray():
    start_ray()
    yield
    ray.shutdown()


def cuts(shards: list[Path], map_shards: ShardMap, *, per_dataset: bool) -> dict[str, Cut]:
    found = Survey.total(map_shards(survey, shards))
    return find_cuts(
        shards,
        found.first_digits,
        selection_percentage=0.1,
        per_dataset=per_dataset,
        map_shards=map_shards,
        max_candidates=50,
    )


def test_passes_on_ray_find_the_cut_that_threads_find(local_ray, shards):
    for per_dataset in (False, True):
        assert cuts(shards, map_on_ray, per_dataset=per_dataset) == cuts(
            shards, map_in_threads, per_dataset=per_dataset
        )


def test_a_mistake_on_a_worker_is_told(local_ray, tmp_path):
    with pytest.raises(Exception, match=r"No such file or directory|FileNotFoundError"):
        list(map_on_ray(survey, [tmp_path / "absent.parquet"]))


def test_few_scores_are_cut_without_ray(tmp_path):
    folder = RunFolder(tmp_path)
    sample = Sample("demo", "1", (Message("assistant", "yes"),), "corpus.jsonl:1")
    write_shards([sample], folder.corpus, rows_per_shard=512)
    assert shard_map(folder) is map_in_threads
