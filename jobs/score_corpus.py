"""The part of stage 2 that runs on Ray: normalise the corpus, then score it shard by shard."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from jobs import shard_scorer
from jobs.progress import ScoringProgress
from jobs.ray_session import start_ray, without_restart_notice
from jobs.shard_scorer import ShardScorer, normalize_corpus
from selectmoe.config import SelectConfig
from selectmoe.data.shards import CorpusSummary, read_summary
from selectmoe.errors import SelectMoeError, TooManyRejectedError
from selectmoe.model.checkpoint import hash_weights, require_select_moe, weights_file
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.scored_shards import RunFolder

logger = logging.getLogger(__name__)

# Blocks of shards per actor: enough for even loads, few enough for a million shards.
BLOCKS_PER_ACTOR = 64


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
    require_select_moe(config.model)
    stage_1 = weights_file(config.model_checkpoint_path) if config.model_checkpoint_path else None
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
        weights_sha256=hash_weights(config.model, stage_1),
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
    summary: CorpusSummary = ray.get(
        ray.remote(num_cpus=1)(normalize_corpus).remote(config, folder.corpus)
    )
    logger.info(
        "corpus: %s rows in %d shards, %d rejected, %d duplicate ids (%.1f s)",
        f"{summary.num_read:,}",
        summary.num_shards,
        summary.num_rejected,
        summary.num_duplicate_ids,
        time.perf_counter() - started,
    )
    return summary


def check_rejected(summary: CorpusSummary, max_rejected: float, folder: RunFolder) -> None:
    """Stops before any scoring when the corpus is not what it was taken for."""
    if summary.num_rejected > max_rejected * summary.num_read:
        raise TooManyRejectedError(
            f"{summary.num_rejected} of {summary.num_read} rows are rejected, more than "
            f"max_rejected={max_rejected:g} allows; first: {summary.first_rejected}; all of them: "
            f"{folder.corpus / 'rejected.parquet'}"
        )


def score_shards(
    config: SelectConfig, folder: RunFolder, shards: list[Path], progress: ScoringProgress
) -> None:
    """Ray Data maps shard names to counts; the actors write the scores themselves."""
    import ray

    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    num_actors = config.num_actors or num_gpus or max(int(resources.get("CPU", 1)), 1)
    num_actors = min(num_actors, len(shards))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
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
                progress.add(num_rows=row["num_rows"], num_tokens=row["num_tokens"])
    except ray.exceptions.RayError as error:
        left = folder.unscored_shards()
        raise ScoringError(
            f"scoring stopped with {len(left)} shards left: {str(error).strip().splitlines()[-1]}; "
            f"go on with --resume {folder.root}"
        ) from error
    finally:
        progress.close()


class ScoringError(SelectMoeError, RuntimeError):
    """Workers were lost for good, or failed in a way that a retry cannot mend."""
