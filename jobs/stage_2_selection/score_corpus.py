"""The part of stage 2 that runs on Ray: normalise the corpus, then score it shard by shard."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.on_ray.errors import user_mistake
from jobs.on_ray.map_items import MapOnRay
from jobs.on_ray.session import quiet_ray_data, start_ray
from jobs.stage_2_selection.scoring_places import WORKER_MODULES, ScoringPlace
from jobs.stage_2_selection.shard_scorer import ShardScorer
from selectmoe.cli.progress import RowsProgress, ScoringProgress
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.normalize import rows_read, write_corpus
from selectmoe.corpus.shards import CorpusSummary, read_summary
from selectmoe.data.writers import write_json
from selectmoe.errors import ResumeError, SelectMoeError, TooManyRejectedError
from selectmoe.paths import DEMO_CORPUS
from selectmoe.scoring.calibration import Calibration, save_calibration
from selectmoe.selection.outputs import write_rejected
from selectmoe.selection.run_folder import RunFolder

logger = logging.getLogger(__name__)

MODEL_NAME = "model.json"  # written when a run has begun: the hash of the weights that score
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


def score_corpus(config: SelectConfig, folder: RunFolder, place: ScoringPlace) -> ScoringReport:
    """Scores whatever of the corpus has no scores yet; each file in `folder` is whole or absent."""
    keep_calibration(folder, place.read_calibration)
    require_same_weights(folder, place.weights_sha256)
    start_ray(*WORKER_MODULES)
    summary = read_summary(folder.corpus) or normalize(config, folder)
    check_rejected(summary, config.max_rejected, folder)
    shards = folder.unscored_shards()
    num_reused = summary.num_shards - len(shards)
    if num_reused:
        logger.info("%d of %d shards have scores already", num_reused, summary.num_shards)
    num_rows = summary.num_read - summary.num_rejected
    progress = ScoringProgress(
        num_rows=num_rows,
        # By the mean size of a shard: the last one of a range is not full.
        num_rows_done=num_rows * num_reused // max(summary.num_shards, 1),
    )
    if shards:
        score_shards(place, folder, shards, progress)
    return ScoringReport(
        model=place.model,
        weights_sha256=place.weights_sha256,
        num_shards=summary.num_shards,
        num_shards_reused=num_reused,
        num_duplicate_ids=summary.num_duplicate_ids,
        num_tokens=progress.num_tokens,
        seconds=round(progress.seconds, 3),
        tokens_per_second=round(progress.tokens_per_second, 1),
    )


def normalize(config: SelectConfig, folder: RunFolder) -> CorpusSummary:
    """Of the demo corpus, where none is named."""
    if not config.dataset.paths:
        dataset = dataclasses.replace(config.dataset, paths=(str(DEMO_CORPUS),))
        config = dataclasses.replace(config, dataset=dataset)
    started = time.perf_counter()
    progress = RowsProgress("normalising")
    summary = write_corpus(
        config.dataset.paths,
        folder.corpus,
        rows_per_shard=config.rows_per_shard,
        subset_ratio=config.dataset.subset_ratio,
        map_items=MapOnRay(
            # Replicas may hold every CPU of a cluster for good, and tasks that ask for one would
            # wait.
            num_cpus=1 if config.via == "actors" else 0,
            look=lambda: progress(rows_read(folder.corpus), None),
        ),
    )
    progress.clear()
    logger.info(
        "corpus: %s rows in %d shards, %d rejected, %d duplicate ids (%.1f s)",
        f"{summary.num_read:,}",
        summary.num_shards,
        summary.num_rejected,
        summary.num_duplicate_ids,
        time.perf_counter() - started,
    )
    return summary


def keep_calibration(folder: RunFolder, read: Callable[[], Calibration | None]) -> None:
    """Copies the weights' calibration into a run that begins. The one beside the weights may be
    made anew, and a resumed run must give the bytes of one that was never interrupted."""
    if (folder.root / MODEL_NAME).is_file():
        return
    calibration = read()
    if calibration is not None:
        save_calibration(folder.root, calibration)


def require_same_weights(folder: RunFolder, weights_sha256: str) -> None:
    """A resumed run must go on with the weights it began with: their file may have changed."""
    file = folder.root / MODEL_NAME
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
    place: ScoringPlace, folder: RunFolder, shards: list[Path], progress: ScoringProgress
) -> None:
    """Ray Data maps shard names to counts; the actors write the scores themselves."""
    import ray

    pool = place.pool(ray.cluster_resources())
    num_actors = min(pool.num_actors, len(shards))
    quiet_ray_data()
    names = ray.data.from_items(
        [{"shard": str(shard)} for shard in shards],
        override_num_blocks=min(len(shards), BLOCKS_PER_ACTOR * num_actors),
    )
    counts = names.map_batches(
        ShardScorer,
        fn_constructor_args=(place.open_scorer, folder.scored),
        fn_constructor_kwargs={"shards_in_flight": pool.shards_in_flight},
        batch_size=pool.shards_per_batch,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=pool.num_gpus,
        num_cpus=pool.num_cpus,
    )
    logger.info("scoring %d shards on %d actors", len(shards), num_actors)
    try:
        for row in counts.iter_rows():
            if row["failure"]:
                raise ScoringError(failure_message(row["failure"], folder))
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


def failure_message(failure: str, folder: RunFolder) -> str:
    """What a worker said, and how to go on where that helps."""
    if not folder.scored_shards():
        return failure  # a model that cannot be loaded cannot be loaded by a resumed run either
    return f"{failure}; go on with --resume {folder.root}"


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
