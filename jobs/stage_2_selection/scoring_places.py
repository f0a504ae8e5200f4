"""Where the rows of stage 2 are scored (`via`), found out before anything else begins.

actors         a pool of this run, each actor with the model
serve          the deployment that runs on this Ray cluster, through its handle
http://…       a score server, through the network

All three give the same scores to the last digit, as long as the server keeps the rows of a shard
together and its processor is of the same kind.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.on_ray.session import ClusterError, start_ray
from jobs.stage_2_selection import remote_scorers, shard_scorer
from jobs.stage_2_selection.remote_scorers import DeploymentScorer, ServerScorer
from jobs.stage_2_selection.shard_scorer import open_engine
from selectmoe.client import ScoreClient
from selectmoe.client.requests import ServerInfo, parse_info
from selectmoe.client.score_client import API_KEY_VARIABLE
from selectmoe.config.loading import resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError
from selectmoe.model.checkpoint import (
    calibration_folder,
    hash_weights,
    weights_file,
    weights_size,
)
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.scoring.calibration import Calibration, fitting, from_json, load_calibration
from selectmoe.selection.run_folder import Scorer

WORKER_MODULES = (shard_scorer, remote_scorers)
DEPLOYMENT = "Scorer"
ACTOR_BYTES = 1_200_000_000  # 0.7 GB with torch, transformers and Ray, and as much for activations
# To say what it scores with, a server that is there needs no time.
INFO_TIMEOUT_SECONDS = 10.0
# Batches of an actor that only asks: the last shards of a batch leave the server less to do.
ROUNDS_PER_BATCH = 4
SETTINGS_OF_ACTORS = (
    "scoring.row_layout",
    "scoring.attn_implementation",
    "scoring.experts_implementation",
    "num_threads_per_actor",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """The actors, and what each of them takes."""

    num_actors: int
    num_cpus: float | None
    num_gpus: float | None
    shards_in_flight: int
    shards_per_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringPlace:
    """A model that scores, and how actors come by it."""

    model: str
    weights_sha256: str
    read_calibration: Callable[[], Calibration | None]
    open_scorer: Callable[[], Scorer]  # runs on a worker
    pool: Callable[[Mapping[str, float]], Pool]  # for the resources of the cluster


def find_place(config: SelectConfig) -> ScoringPlace:
    """Raises SelectMoeError where nothing answers there, or scores otherwise than `config` says."""
    if config.via == "actors":
        return own_actors(config)
    if config.via == "serve":
        return running_deployment(config)
    return score_server(config)


def own_actors(config: SelectConfig) -> ScoringPlace:
    config = dataclasses.replace(config, model=config.model or str(EMBEDDED_SELECTOR))
    weights_sha256 = hash_of_weights(config)

    def read_calibration() -> Calibration | None:
        stored = load_calibration(calibration_folder(str(config.model), stage_1_weights(config)))
        formula = config.scoring.formula
        return fitting(stored, formula=formula, weights_hash=lambda: weights_sha256)

    return ScoringPlace(
        model=str(config.model),
        weights_sha256=weights_sha256,
        read_calibration=read_calibration,
        open_scorer=functools.partial(open_engine, config),
        pool=functools.partial(engine_pool, config),
    )


def running_deployment(config: SelectConfig) -> ScoringPlace:
    from ray import serve

    start_ray(*WORKER_MODULES)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    found = [
        name
        for name, application in serve.status().applications.items()
        if DEPLOYMENT in application.deployments
    ]
    if len(found) != 1:
        running = f"{len(found)} applications with one run: {', '.join(found)}" if found else "none"
        raise ClusterError(
            f"via=serve needs one running deployment {DEPLOYMENT} on this Ray cluster, got "
            f"{running}; start it with 'serve run serve.app:app'"
        )
    handle: Any = serve.get_app_handle(found[0])
    info = parse_info(handle.info.remote().result(timeout_s=60))
    return remote_place(
        config,
        f"application {found[0]!r}",
        info,
        functools.partial(DeploymentScorer, found[0]),
    )


def score_server(config: SelectConfig) -> ScoringPlace:
    # The environment of the driver: a worker of a cluster has another one.
    api_key = os.environ.get(API_KEY_VARIABLE) or None
    with ScoreClient(config.via, api_key=api_key, timeout_seconds=INFO_TIMEOUT_SECONDS) as client:
        info = client.info()
    if info.max_samples < config.rows_per_shard:
        logger.warning(
            "%s takes %d samples a request, fewer than rows_per_shard=%d: shards go in parts, "
            "and a score may differ from that of via=actors in its last digit",
            config.via,
            info.max_samples,
            config.rows_per_shard,
        )
    return remote_place(
        config, config.via, info, functools.partial(ServerScorer, config.via, api_key)
    )


def remote_place(
    config: SelectConfig, name: str, info: ServerInfo, open_scorer: Callable[[], Scorer]
) -> ScoringPlace:
    require_agreement(config, name, info)
    calibration = None if info.calibration is None else from_json(info.calibration)
    return ScoringPlace(
        model=info.model,
        weights_sha256=info.weights_hash,
        read_calibration=lambda: calibration,
        open_scorer=open_scorer,
        pool=functools.partial(asking_pool, config),
    )


def require_agreement(config: SelectConfig, name: str, info: ServerInfo) -> None:
    """The saved configuration must say how the rows were scored, so a server may not do otherwise.

    A setting that is null is the server's to decide, and so is the model where none is given.
    """
    given, defaults = resolved(config), resolved(SelectConfig())
    for key in SETTINGS_OF_ACTORS:
        if given[key] != defaults[key]:
            raise ConfigError(f"{key} is for via=actors; {name} decides it itself")
    settings = (
        ("scoring.formula", config.scoring.formula, info.formula),
        ("scoring.dtype", config.scoring.dtype, info.dtype),
        (
            "scoring.max_tokens_per_batch",
            config.scoring.max_tokens_per_batch,
            info.max_batch_tokens,
        ),
        (
            "dataset.max_sequence_length",
            config.dataset.max_sequence_length,
            info.max_sequence_length,
        ),
    )
    for key, ours, theirs in settings:
        if ours is not None and ours != theirs:
            raise ConfigError(
                f"{key} is {ours} here, and {name} scores with {theirs}; give {key}={theirs}, or "
                "another server"
            )
    if config.model is None and config.model_checkpoint_path is None:
        return
    weights_hash = hash_of_weights(config)
    if weights_hash != info.weights_hash:
        raise ConfigError(
            f"{name} scores with other weights (SHA-256 {info.weights_hash[:12]}…) than "
            f"model={config.model} model_checkpoint_path={config.model_checkpoint_path} has "
            f"({weights_hash[:12]}…); leave both out to take the server's"
        )


def hash_of_weights(config: SelectConfig) -> str:
    return hash_weights(config.model or str(EMBEDDED_SELECTOR), stage_1_weights(config))


def stage_1_weights(config: SelectConfig) -> Path | None:
    return weights_file(config.model_checkpoint_path) if config.model_checkpoint_path else None


def engine_pool(config: SelectConfig, resources: Mapping[str, float]) -> Pool:
    has_gpus = resources.get("GPU", 0) >= 1
    return Pool(
        num_actors=config.num_actors or default_num_actors(config, resources),
        num_gpus=1 if has_gpus else None,
        num_cpus=None if has_gpus else config.num_threads_per_actor,
        shards_in_flight=1,
        shards_per_batch=1,
    )


def asking_pool(config: SelectConfig, resources: Mapping[str, float]) -> Pool:
    """Actors that wait for others, without a CPU: replicas may hold every one of the cluster."""
    return Pool(
        num_actors=config.num_actors or 1,
        num_gpus=None,
        num_cpus=0,
        shards_in_flight=config.shards_in_flight,
        shards_per_batch=ROUNDS_PER_BATCH * config.shards_in_flight,
    )


def default_num_actors(config: SelectConfig, resources: Mapping[str, float]) -> int:
    """One for each GPU; without any, one for each CPU, as far as memory holds their models."""
    if resources.get("GPU", 0) >= 1:
        return int(resources["GPU"])
    by_cpu = max(int(resources.get("CPU", 1)) // config.num_threads_per_actor, 1)
    # On a CPU the model is float32, and its files most likely bfloat16.
    num_bytes = ACTOR_BYTES + 2 * weights_size(str(config.model))
    by_memory = max(int(resources.get("memory", 0) // num_bytes), 1)
    if by_memory < by_cpu:
        logger.info(
            "%d actors instead of %d: each needs %.1f GB, and the cluster has %.1f GB for them",
            by_memory,
            by_cpu,
            num_bytes / 1e9,
            resources.get("memory", 0) / 1e9,
        )
    return min(by_cpu, by_memory)
