"""Runs stage 2 on a Ray cluster: tasks read the corpus, a pool of actors scores it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.on_ray.errors import describe_cause, user_mistake, write_details
from jobs.on_ray.map_items import MapOnRay, map_over_scores
from jobs.on_ray.session import quiet_ray_data, start_ray
from jobs.on_ray.worker_probe import free_memory_of_worker, largest_resources, require_node
from jobs.stage_2_selection import deployment_backend, shard_scorer
from jobs.stage_2_selection.shard_scorer import COUNTS, ScoringFailure, ShardScorer
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems
from selectmoe.errors import ScoringError, SelectMoeError, StorageError
from selectmoe.selection.backends import Backend
from selectmoe.selection.in_process import num_engines_in_memory, require_engine_fits
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import ShardCounts

# Blocks of shards per actor: enough for even loads, few enough for a million shards.
BLOCKS_PER_ACTOR = 64
# With a remote backend, rounds of requests per call: in the last one the server has less to do.
ROUNDS_PER_BATCH = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPool:
    """The scoring actors, and what each of them reserves."""

    num_actors: int
    num_cpus: float | None
    num_gpus: float | None
    shards_in_flight: int
    shards_per_batch: int


class RayRunner:
    """A Runner of the package's stage 2."""

    def __init__(self, config: SelectConfig) -> None:
        self.config = config

    def start(self) -> None:
        start_ray(shard_scorer, deployment_backend)

    def require_workers(self, backend: Backend) -> None:
        if backend.is_remote:
            return
        pool = actor_pool(self.config, backend, largest_resources())
        needed = {"GPU": pool.num_gpus} if pool.num_gpus else {"CPU": pool.num_cpus or 0}
        require_node(needed, setting=f"num_threads_per_actor={self.config.num_threads_per_actor}")
        free, kind = free_memory_of_worker(needed)
        on_gpu = bool(pool.num_gpus)
        require_engine_fits(self.config, backend.model, on_gpu=on_gpu, free=free, kind=kind)

    def map_parts(self, look: Callable[[], None]) -> MapItems:
        # Replicas may hold every CPU of a cluster for good, and tasks that ask for one would wait.
        return MapOnRay(num_cpus=1 if self.config.via == "actors" else 0, look=look)

    def map_over_scores(self, folder: RunFolder) -> MapItems:
        return map_over_scores(folder)

    def score(
        self, backend: Backend, shards: Sequence[Path], scored: Path
    ) -> Iterator[ShardCounts]:
        """Ray Data maps shard names to counts; the actors write the scores themselves.

        Raises ScoringError where workers are lost for good or fail.
        """
        import ray

        pool = actor_pool(self.config, backend, ray.cluster_resources())
        num_actors = min(pool.num_actors, len(shards))
        quiet_ray_data()
        names = ray.data.from_items(
            [{"shard": str(shard)} for shard in shards],
            override_num_blocks=min(len(shards), BLOCKS_PER_ACTOR * num_actors),
        )
        counts = names.map_batches(
            ShardScorer,
            fn_constructor_args=(backend.open_scorer, scored),
            fn_constructor_kwargs={
                "shards_in_flight": pool.shards_in_flight,
                "has_gpu": bool(pool.num_gpus),
            },
            batch_size=pool.shards_per_batch,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_gpus=pool.num_gpus,
            num_cpus=pool.num_cpus,
        )
        logger.info("scoring %d shards on %d actors", len(shards), num_actors)
        folder = RunFolder(scored.parent)
        try:
            for row in counts.iter_rows():
                if row["failure"]:
                    raise scoring_error(ScoringFailure(**json.loads(row["failure"])), folder)
                yield ShardCounts(**{key: row[key] for key in COUNTS})
        except ray.exceptions.RayError as error:
            raise user_mistake(error) or stopped(describe_cause(error), error, folder) from error


def scoring_error(failure: ScoringFailure, folder: RunFolder) -> SelectMoeError:
    """What an actor reported, as the error that ends the run."""
    if failure.disk_is_full:
        return StorageError(
            f"{failure.message}; free some space, then resume with --resume {folder.root}"
        )
    if failure.story:
        return stopped(failure.message, failure.story, folder)
    if not folder.scored_shards():  # as a model that cannot be loaded: resuming would not help
        return ScoringError(failure.message)
    return ScoringError(f"{failure.message}; resume with --resume {folder.root}")


def stopped(cause: str, story: object, folder: RunFolder) -> ScoringError:
    """One line about an unexpected end of the scoring; the whole story goes to a file."""
    return ScoringError(
        f"scoring stopped with {len(folder.unscored_shards())} shards left: {cause}"
        f"{write_details(folder.error_details, story)}; resume with --resume {folder.root}"
    )


def actor_pool(config: SelectConfig, backend: Backend, resources: Mapping[str, float]) -> ActorPool:
    """The pool for the resources of a cluster."""
    if backend.is_remote:
        # Actors that wait for others take no CPU: replicas may hold every one of the cluster.
        return ActorPool(
            num_actors=config.num_actors or 1,
            num_gpus=None,
            num_cpus=0,
            shards_in_flight=config.shards_in_flight,
            shards_per_batch=ROUNDS_PER_BATCH * config.shards_in_flight,
        )
    has_gpus = resources.get("GPU", 0) >= 1
    return ActorPool(
        num_actors=config.num_actors or default_num_actors(config, backend.model, resources),
        num_gpus=1 if has_gpus else None,
        num_cpus=None if has_gpus else config.num_threads_per_actor,
        shards_in_flight=1,
        shards_per_batch=1,
    )


def default_num_actors(config: SelectConfig, model: str, resources: Mapping[str, float]) -> int:
    """One for each GPU; without any, one for each CPU, as far as memory holds their models."""
    if resources.get("GPU", 0) >= 1:
        return int(resources["GPU"])
    memory = resources.get("memory", 0)
    by_cpu = max(int(resources.get("CPU", 1)) // config.num_threads_per_actor, 1)
    by_memory = max(num_engines_in_memory(model, memory), 1)
    if by_memory < by_cpu:
        logger.info(
            "%d actors instead of %d: the cluster's %.1f GB of memory hold no more engines",
            by_memory,
            by_cpu,
            memory / 1e9,
        )
    return min(by_cpu, by_memory)
