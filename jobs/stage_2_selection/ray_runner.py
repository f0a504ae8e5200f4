"""Runs stage 2 on a Ray cluster: tasks read the corpus, a pool of actors scores it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.on_ray.errors import describe_cause, user_mistake, write_details
from jobs.on_ray.map_items import MapOnRay, map_over_scores
from jobs.on_ray.session import alive_nodes, quiet_ray_data, start_ray
from jobs.on_ray.worker_probe import free_memory_of_worker, largest_resources, require_node
from jobs.stage_2_selection import deployment_backend, shard_scorer
from jobs.stage_2_selection.shard_scorer import COUNTS, ScoringFailure, ShardScorer
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems
from selectmoe.errors import ScoringError, SelectMoeError, StorageError
from selectmoe.selection.backends import Backend
from selectmoe.selection.in_process import engine_bytes, require_engine_fits
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import ShardCounts

# Blocks of shards per actor: enough for even loads, few enough for a million shards. A pool that
# grows divides those of its beginning.
BLOCKS_PER_ACTOR = 64
MIN_BLOCKS = 1_024
# With a remote backend, rounds of requests per call: in the last one the server has less to do.
ROUNDS_PER_BATCH = 4

Resources = Mapping[str, float]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPool:
    """The scoring actors, and what each of them reserves."""

    min_actors: int
    num_at_start: int  # as many as the cluster has room for
    max_actors: int | None  # None: as many as it ever has room for
    num_cpus: float | None
    num_gpus: float | None
    memory: float | None = None  # bytes
    shards_in_flight: int
    shards_per_batch: int

    def limited_to(self, num_shards: int) -> tuple[int, int, int]:
        """The least, those at the start and the most, where each has at least one shard."""
        most = min(self.max_actors or num_shards, num_shards)
        return min(self.min_actors, most), min(self.num_at_start, most), most


class RayRunner:
    """A Runner of the package's stage 2."""

    def __init__(self, config: SelectConfig) -> None:
        self.config = config

    def start(self) -> None:
        start_ray(shard_scorer, deployment_backend)

    def require_workers(self, backend: Backend) -> None:
        if backend.is_remote:
            return
        num_threads = self.config.num_threads_per_actor
        on_gpu = has_gpus(largest_resources())
        needed = {"GPU": 1.0} if on_gpu else {"CPU": float(num_threads)}
        require_node(needed, setting=f"num_threads_per_actor={num_threads}")
        free, kind = free_memory_of_worker(needed)
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

        pool = actor_pool(self.config, backend, ray.cluster_resources(), largest_resources())
        least, num_at_start, most = pool.limited_to(len(shards))
        quiet_ray_data()
        names = ray.data.from_items(
            [{"shard": str(shard)} for shard in shards],
            override_num_blocks=min(len(shards), max(BLOCKS_PER_ACTOR * num_at_start, MIN_BLOCKS)),
        )
        counts = names.map_batches(
            ShardScorer,
            fn_constructor_args=(backend.open_scorer, scored),
            fn_constructor_kwargs={
                "shards_in_flight": pool.shards_in_flight,
                "has_gpu": bool(pool.num_gpus),
            },
            batch_size=pool.shards_per_batch,
            compute=ray.data.ActorPoolStrategy(
                min_size=least, initial_size=num_at_start, max_size=most
            ),
            num_gpus=pool.num_gpus,
            num_cpus=pool.num_cpus,
            memory=pool.memory if _a_node_has(pool.memory) else None,
        )
        logger.info("scoring %d shards on %d actor(s)", len(shards), num_at_start)
        folder = RunFolder(scored.parent)
        try:
            for row in counts.iter_rows():
                if row["failure"]:
                    raise scoring_error(ScoringFailure(**json.loads(row["failure"])), folder)
                yield ShardCounts(**{key: row[key] for key in COUNTS})
        except ray.exceptions.RayError as error:
            raise user_mistake(error) or stopped(describe_cause(error), error, folder) from error


def _a_node_has(memory: float | None) -> bool:
    """True where some node has room for an actor that reserves this much; else none would start."""
    return any(node.get("memory", 0) >= (memory or 0) for node in alive_nodes())


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


def actor_pool(
    config: SelectConfig, backend: Backend, now: Resources, grown: Resources
) -> ActorPool:
    """The pool for the resources that a cluster has `now`, and when it has `grown`."""
    least, most = config.actor_bounds
    if backend.is_remote:
        # Actors that wait for others take no CPU: replicas may hold every one of the cluster.
        num_actors = most or 1
        return ActorPool(
            min_actors=num_actors,
            num_at_start=num_actors,
            max_actors=num_actors,
            num_gpus=None,
            num_cpus=0,
            shards_in_flight=config.shards_in_flight,
            shards_per_batch=ROUNDS_PER_BATCH * config.shards_in_flight,
        )
    on_gpus = has_gpus(grown)
    room = default_num_actors(config, backend.model, now, has_gpus=on_gpus)
    return ActorPool(
        min_actors=least,
        num_at_start=max(least, min(room, most or room)),
        max_actors=most,
        num_gpus=1 if on_gpus else None,
        num_cpus=None if on_gpus else config.num_threads_per_actor,
        memory=None if on_gpus else engine_bytes(config, backend.model),
        shards_in_flight=1,
        shards_per_batch=1,
    )


def has_gpus(resources: Resources) -> bool:
    """Whether actors of a cluster with these resources score on GPUs."""
    return resources.get("GPU", 0) >= 1


def default_num_actors(
    config: SelectConfig, model: str, resources: Resources, *, has_gpus: bool
) -> int:
    """One for each GPU; without any, one for each CPU, as far as memory holds their models."""
    if has_gpus:
        return max(int(resources.get("GPU", 0)), 1)
    memory = resources.get("memory", 0)
    by_cpu = max(int(resources.get("CPU", 1)) // config.num_threads_per_actor, 1)
    by_memory = max(int(memory // engine_bytes(config, model)), 1)
    if by_memory < by_cpu:
        logger.info(
            "%d actors instead of %d: the cluster's %.1f GB of memory hold no more engines",
            by_memory,
            by_cpu,
            memory / 1e9,
        )
    return min(by_cpu, by_memory)
