"""The part of stage 2 that runs on Ray: normalise the corpus, then score it shard by shard."""

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from jobs import shard_scorer
from jobs.command_line import user_mistake
from jobs.progress import ScoringProgress
from jobs.ray_session import start_ray, without_restart_notice
from jobs.shard_scorer import ShardScorer, normalize_corpus
from selectmoe.config import SelectConfig
from selectmoe.data.shards import CorpusSummary, read_summary
from selectmoe.data.writers import write_json
from selectmoe.errors import ModelError, ResumeError, SelectMoeError, TooManyRejectedError
from selectmoe.model.checkpoint import hash_weights, weights_file, weights_size
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.scored_shards import RunFolder
from selectmoe.selected_data import write_rejected

logger = logging.getLogger(__name__)

# Blocks of shards per actor: enough for even loads, few enough for a million shards.
BLOCKS_PER_ACTOR = 64
ACTOR_BYTES = 1_200_000_000  # 0.7 GB with torch, transformers and Ray, and as much for activations


@dataclass(frozen=True, slots=True)
class ScoringReport:
    """What scoring took."""

    model: str
    weights_sha256: str
    num_shards: int
    num_shards_reused: int  # had scores before this run began
    num_duplicate_ids: int
    num_tokens: int  # read by the model in this run
    seconds: float
    tokens_per_second: float


def score_corpus(config: SelectConfig, folder: RunFolder) -> ScoringReport:
    """Scores whatever of the corpus has no scores yet; each file in `folder` is whole or absent."""
    config = with_defaults(config)
    assert config.model is not None
    stage_1 = weights_file(config.model_checkpoint_path) if config.model_checkpoint_path else None
    weights_sha256 = hash_weights(config.model, stage_1)
    require_same_weights(folder, weights_sha256)
    start_ray(shard_scorer)
    summary = read_summary(folder.corpus) or normalize(config, folder)
    check_rejected(summary, config.max_rejected, folder)
    shards = folder.unscored_shards()
    num_reused = summary.num_shards - len(shards)
    if num_reused:
        logger.info("%d of %d shards have scores already", num_reused, summary.num_shards)
    progress = ScoringProgress(
        num_rows=summary.num_read - summary.num_rejected,
        num_rows_done=min(num_reused * config.rows_per_shard, summary.num_read),
    )
    if shards:
        score_shards(config, folder, shards, progress)
    return ScoringReport(
        model=config.model,
        weights_sha256=weights_sha256,
        num_shards=summary.num_shards,
        num_shards_reused=num_reused,
        num_duplicate_ids=summary.num_duplicate_ids,
        num_tokens=progress.num_tokens,
        seconds=round(progress.seconds, 3),
        tokens_per_second=round(progress.tokens_per_second, 1),
    )


def with_defaults(config: SelectConfig) -> SelectConfig:
    """The embedded selector and demo corpus in the places that are still empty."""
    dataset = config.dataset
    if not dataset.paths:
        dataset = dataclasses.replace(dataset, paths=(str(DEMO_CORPUS),))
    return dataclasses.replace(
        config, model=config.model or str(EMBEDDED_SELECTOR), dataset=dataset
    )


def normalize(config: SelectConfig, folder: RunFolder) -> CorpusSummary:
    import ray

    started = time.perf_counter()
    pending = ray.remote(num_cpus=1)(normalize_corpus).remote(config, folder.corpus)
    import ray.data  # here, while a worker reads the corpus: else the actors' start waits for it

    summary: CorpusSummary = ray.get(pending)
    logger.info(
        "corpus: %s rows in %d shards, %d rejected, %d duplicate ids (%.1f s)",
        f"{summary.num_read:,}",
        summary.num_shards,
        summary.num_rejected,
        summary.num_duplicate_ids,
        time.perf_counter() - started,
    )
    return summary


def require_same_weights(folder: RunFolder, weights_sha256: str) -> None:
    """A resumed run must go on with the weights it began with: their file may have changed."""
    file = folder.root / "model.json"
    if file.is_file():
        before = json.loads(file.read_text("utf-8"))["weights_sha256"]
        if before != weights_sha256:
            raise ResumeError(
                f"{folder.root}: the run was begun with other weights: their SHA-256 was "
                f"{before[:12]}… and is {weights_sha256[:12]}… now; start a new run"
            )
    write_json(file, {"weights_sha256": weights_sha256})


def check_rejected(summary: CorpusSummary, max_rejected: float, folder: RunFolder) -> None:
    """Stops before any scoring when the corpus is not what it was taken for."""
    share = summary.num_rejected / summary.num_read
    if share > max_rejected:
        enough = math.ceil(1_000 * share) / 1_000
        raise TooManyRejectedError(
            f"{summary.num_rejected} of {summary.num_read} rows are rejected, more than "
            f"max_rejected={max_rejected:g} allows; first: {summary.first_rejected}; all of them: "
            f"{write_rejected(folder, folder.root, {})}; to go on without them: --resume "
            f"{folder.root} --max-rejected {enough:g}"
        )


def score_shards(
    config: SelectConfig, folder: RunFolder, shards: list[Path], progress: ScoringProgress
) -> None:
    """Ray Data maps shard names to counts; the actors write the scores themselves."""
    import ray

    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    num_actors = min(config.num_actors or default_num_actors(config, resources), len(shards))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data logs an actor's exception at a hundred lines before it raises it.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    names = ray.data.from_items(
        [{"shard": str(shard)} for shard in shards],
        override_num_blocks=min(len(shards), BLOCKS_PER_ACTOR * num_actors),
    )
    counts = names.map_batches(
        ShardScorer,
        fn_constructor_args=(config, folder.scored),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=1 if num_gpus else None,
        num_cpus=None if num_gpus else config.num_threads_per_actor,
    )
    logger.info("scoring %d shards on %d actors", len(shards), num_actors)
    try:
        with without_restart_notice():
            for row in counts.iter_rows():
                if row["failure"]:
                    raise ModelError(row["failure"])
                progress.add(num_rows=row["num_rows"], num_tokens=row["num_tokens"])
    except ray.exceptions.RayError as error:
        raise user_mistake(error) or ScoringError(stop_message(error, folder)) from error
    finally:
        progress.close()
    if left := folder.unscored_shards():
        raise ScoringError(
            f"{folder.scored}: {len(left)} of the scored shards are not to be seen from here; the "
            "output folder must be on storage that all nodes share"
        )


def default_num_actors(config: SelectConfig, resources: dict[str, float]) -> int:
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


def stop_message(error: Exception, folder: RunFolder) -> str:
    """One line for a person; the whole story goes to a file."""
    details = folder.root / "scoring_error.txt"
    details.write_text(str(error), encoding="utf-8")
    return (
        f"scoring stopped with {len(folder.unscored_shards())} shards left: "
        f"{str(error).strip().splitlines()[-1]}; details: {details}; go on with --resume "
        f"{folder.root}"
    )


class ScoringError(SelectMoeError, RuntimeError):
    """Workers were lost for good, or failed in a way that a retry cannot mend."""
