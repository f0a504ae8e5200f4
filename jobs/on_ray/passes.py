"""Passes over the scores of a run as Ray Data maps, for more scores than one machine reads fast."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from jobs.on_ray.session import quiet_ray_data, start_ray
from selectmoe.corpus.shards import read_summary
from selectmoe.selection.passes import ShardMap, map_in_threads
from selectmoe.selection.run_folder import RunFolder

# Below, threads of the driver are done before Ray has started: two cores read 10 M scores a second.
RAY_FROM_ROWS = 50_000_000
CALLS_PER_CPU = 16  # for even loads
MAX_SHARDS_PER_CALL = 1_000
T = TypeVar("T")


def shard_map(folder: RunFolder) -> ShardMap:
    """Who makes the passes over the scores in `folder`."""
    summary = read_summary(folder.corpus)
    if summary is None or summary.num_read < RAY_FROM_ROWS:
        return map_in_threads
    import ray

    if not ray.is_initialized():  # scores of another run are cut again
        start_ray()
    return map_on_ray


def map_on_ray(a_pass: Callable[[Sequence[Path]], T], shards: Sequence[Path]) -> Iterator[T]:
    """A ShardMap. Workers read the files that they count: no score enters the object store."""
    import ray

    def call(parts: "ray.data.block.DataBatch") -> dict[str, list[bytes]]:
        # Nested, so that it travels by value: a worker's path need not hold `jobs`.
        [part] = parts["shards"]
        return {"answer": [pickle.dumps(a_pass([Path(shard) for shard in part]))]}

    quiet_ray_data()
    num_calls = CALLS_PER_CPU * int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(MAX_SHARDS_PER_CALL, len(shards) // num_calls))
    parts = [
        {"shards": [str(shard) for shard in shards[start : start + size]]}
        for start in range(0, len(shards), size)
    ]
    answers = ray.data.from_items(parts, override_num_blocks=len(parts))
    for row in answers.map_batches(call, batch_size=1).iter_rows():
        yield pickle.loads(row["answer"])
