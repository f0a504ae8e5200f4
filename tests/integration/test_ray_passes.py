"""What many workers share on a real Ray: reading a corpus, and top-k of its scores."""

import functools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.on_ray.map_items import MapOnRay, map_over_scores
from jobs.on_ray.session import start_ray
from selectmoe.config.selection import SelectConfig, SelectionConfig
from selectmoe.corpus import normalize
from selectmoe.corpus import parts as corpus_parts
from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.corpus.normalize import write_corpus, write_shards
from selectmoe.corpus.shards import read_shard
from selectmoe.data.readers import read_corpora
from selectmoe.data.writers import write_parquet
from selectmoe.errors import DataError
from selectmoe.records import Message, Sample, ScoredSample
from selectmoe.selection.outputs import select_rows
from selectmoe.selection.passes import Survey, Thresholds, shard_groups, survey
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import scored_table
from selectmoe.selection.strategies import ScoredRows, choose_rows

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """70 shards of 300 rows with few different scores, so that the threshold goes through a tie."""
    folder = tmp_path_factory.mktemp("scored")
    for number in range(70):
        rng = np.random.default_rng(number)
        table = pa.table(
            {
                "row_key": [rng.bytes(16).hex() for _ in range(300)],
                "dataset": rng.choice(["few", "many", "many"], 300).tolist(),
                "score": rng.random(300).astype(np.float32).round(2),
                "num_tokens": rng.integers(1, 500, 300, dtype=np.int32),
                "num_answer_tokens": rng.integers(1, 400, 300, dtype=np.int32),
                "truncated": rng.random(300) < 0.1,
            }
        )
        pq.write_table(table, folder / f"shard-{number:06d}.parquet")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def connected(head):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head)
        start_ray()
        yield
        ray.shutdown()


def thresholds(
    shards: list[Path], map_items: MapItems, *, per_dataset: bool, **settings
) -> Thresholds:
    groups = shard_groups(shards)
    scored = ScoredRows(groups, Survey.total(map_items(survey, groups)), map_items)
    config = SelectConfig(
        selection_percentage=0.1, per_dataset=per_dataset, selection=SelectionConfig(**settings)
    )
    return choose_rows(config, scored).rule.thresholds


@pytest.mark.parametrize(
    "settings", [{}, {"strategy": "sampled", "floor": 0.3, "max_per_dataset": 40}]
)
def test_passes_on_ray_find_the_thresholds_that_threads_find(connected, shards, settings):
    for per_dataset in (False, True):
        on_ray = thresholds(shards, MapOnRay(), per_dataset=per_dataset, **settings)
        assert on_ray == thresholds(shards, map_in_threads, per_dataset=per_dataset, **settings)


def test_workers_write_the_selection_that_threads_write(connected, tmp_path):
    folder = RunFolder(tmp_path)
    samples = [
        Sample("demo", str(n), (Message("assistant", f"{n} " * 9),), f"f:{n}") for n in range(300)
    ]
    write_shards(samples, folder.corpus, rows_per_shard=5)
    folder.scored.mkdir()
    for shard in folder.corpus_shards():
        rows = read_shard(shard)
        scored = [
            ScoredSample(sample.sample_id, int(key[:4], 16) / 65_536, 9, 9, False, np.zeros(1))
            for key, sample in rows
        ]
        write_parquet(folder.scored / shard.name, scored_table(rows, scored))
    written = []
    for map_items in (map_in_threads, MapOnRay()):
        select_rows(folder, folder, SelectConfig(selection_percentage=0.3), map_items=map_items)
        written.append((tmp_path / "selected_data.jsonl").read_bytes())
    assert written[0] == written[1]
    assert written[0].count(b"\n") == 90


def test_a_mistake_on_a_worker_is_told(connected, tmp_path):
    with pytest.raises(FileNotFoundError):
        list(MapOnRay()(survey, [[tmp_path / "absent.parquet"]]))


def test_few_scores_are_cut_without_ray(tmp_path):
    folder = RunFolder(tmp_path)
    sample = Sample("demo", "1", (Message("assistant", "yes"),), "corpus.jsonl:1")
    write_shards([sample], folder.corpus, rows_per_shard=512)
    assert map_over_scores(folder) is map_in_threads


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """600 rows in one file, which is threshold into eight parts."""
    file = tmp_path / "corpus.jsonl"
    rows = [{"id": n, "text": f"Because {n}."} for n in range(600)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = functools.partial(
        corpus_parts.split_corpora, min_part_bytes=file.stat().st_size // 8 + 1
    )
    monkeypatch.setattr(normalize, "split_corpora", split)
    monkeypatch.setattr(normalize, "SHARDS_PER_RANGE", 2)
    return file


def test_workers_write_the_shards_that_one_process_writes(connected, corpus, tmp_path):
    looks: list[int] = []
    tasks = MapOnRay(num_cpus=1, look=lambda: looks.append(1))
    read = write_corpus([str(corpus)], tmp_path / "a", rows_per_shard=10, map_items=tasks)
    rows = read_corpora([str(corpus)])
    assert replace(read, files={}) == write_shards(rows, tmp_path / "b", rows_per_shard=10)
    assert read.num_shards > 60  # in sixteen ranges of keys: the last of each is not full
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))
    for shard in (tmp_path / "a").glob("shard-*"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    assert looks


def test_answers_of_workers_are_in_the_order_of_the_items(connected):
    for num_cpus in (0, 1):
        tasks = MapOnRay(num_cpus=num_cpus, look=lambda: None)
        assert list(tasks(functools.partial(pow, 2), range(30))) == [2**n for n in range(30)]
    assert list(tasks(abs, [])) == []


def test_what_a_lost_worker_was_at_is_done_again(connected, tmp_path):
    def lost_at_three(number: int) -> int:
        attempt = tmp_path / f"attempt-{number}"
        if number == 3 and not attempt.exists():
            attempt.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    tasks = MapOnRay(num_cpus=1, look=lambda: None)
    assert list(tasks(lost_at_three, range(6))) == list(range(6))
    assert (tmp_path / "attempt-3").exists()


def test_tasks_end_with_the_pass_that_is_interrupted(connected, tmp_path):
    """Else they would go on writing into a folder that is being deleted, and fail there."""

    def tick_for_a_minute(number: int) -> int:
        if number:
            for tick in range(600):
                (tmp_path / "ticks").write_text(str(tick))
                time.sleep(0.1)
        return number

    running = MapOnRay(num_cpus=1)(tick_for_a_minute, [0, 1, 2])
    assert next(running) == 0
    while not (tmp_path / "ticks").exists():
        time.sleep(0.1)
    running.close()  # as Ctrl-C does
    time.sleep(1)
    (tmp_path / "ticks").unlink(missing_ok=True)
    time.sleep(0.5)
    assert not (tmp_path / "ticks").exists()


def test_a_mistake_of_one_part_is_the_users_to_mend(connected, corpus, tmp_path):
    (tmp_path / "z.parquet").write_bytes(b"no parquet")
    specs = [str(corpus), str(tmp_path / "z.parquet")]
    tasks = MapOnRay(num_cpus=1, look=lambda: None)
    with pytest.raises(DataError, match="not a readable parquet file"):
        write_corpus(specs, tmp_path / "a", rows_per_shard=10, map_items=tasks)
