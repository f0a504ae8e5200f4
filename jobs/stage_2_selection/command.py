"""What `jobs/select.py` does: normalise the corpus, score it, cut it, report."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from selectmoe.cli.command_line import CommandParser, parse_arguments, stage_parser
from selectmoe.cli.output_folder import (
    absolute_corpus,
    absolute_model,
    absolute_path,
    claim_run,
    telling_how_to_resume,
    values_given,
)
from selectmoe.config.loading import load_config
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError

# These change where, how fast and whether a run goes on, not what comes out of it.
FREE_ON_RESUME = ("max_rejected", "num_actors", "output", "output_root", "resume")
# A resumed run goes on where it was scored, unless it is told to score elsewhere: a server may
# have moved.
CHANGEABLE_ON_RESUME = ("via", "shards_in_flight")


def main(arguments: Sequence[str]) -> None:
    """One run of stage 2. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()

    # Only now: --help and a mistyped option must not wait for the imports below.
    from jobs.on_ray.map_items import map_over_scores
    from jobs.stage_2_selection.report import print_table, write_manifest
    from jobs.stage_2_selection.score_corpus import score_corpus
    from jobs.stage_2_selection.scoring_places import find_place
    from selectmoe.selection.outputs import cut_run
    from selectmoe.selection.run_folder import RunFolder

    require_inputs(config)
    place = None if config.scored else find_place(config)
    output = claim_output(config)
    scored_run = RunFolder(Path(config.scored) if config.scored else output)
    with telling_how_to_resume(output):
        scoring = None if place is None else score_corpus(config, scored_run, place)
    selected = cut_run(
        scored_run,
        output,
        selection_percentage=config.selection_percentage,
        per_dataset=config.per_dataset,
        max_rejected=config.max_rejected,
        map_items=map_over_scores(scored_run),
    )
    manifest = write_manifest(
        config, output, selected, scoring, wall_seconds=time.perf_counter() - started
    )
    print_table(manifest, output)


def parse(arguments: Sequence[str]) -> SelectConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    options, overrides = parse_arguments(build_parser(), arguments)
    given = {
        "selection_percentage": options.pct,
        "dataset.paths": options.data,
        "model": options.model,
        "output": options.output,
        "via": options.via,
        "num_actors": options.num_actors,
        "scored": options.scored,
        "per_dataset": options.per_dataset or None,
        "max_rejected": options.max_rejected,
        "resume": options.resume,
    }
    return with_absolute_paths(load_config(SelectConfig, overrides, values=values_given(given)))


def build_parser() -> CommandParser:
    parser = stage_parser(
        "jobs/select.py",
        "Stage 2: score a corpus and keep exactly the best share of it.",
        SelectConfig,
    )
    parser.add_argument("--pct", type=float, help="share of the rows to keep, in (0, 1]")
    parser.add_argument(
        "--data", nargs="+", help="corpora: files, folders, globs, URLs or hub:NAME[:split]"
    )
    parser.add_argument("--model", help="Select-MoE folder or hub name")
    parser.add_argument("--output", metavar="DIR", help="folder of this run")
    parser.add_argument(
        "--via", metavar="WHO", help="who scores: actors (default), serve or http://HOST:PORT"
    )
    parser.add_argument("--num-actors", type=int, help="scoring actors; default one a CPU or GPU")
    parser.add_argument("--scored", metavar="DIR", help="cut the scores of this run again")
    parser.add_argument("--per-dataset", action="store_true", help="keep --pct of each data set")
    parser.add_argument("--max-rejected", type=float, help="rejected share that stops the run")
    parser.add_argument("--resume", metavar="DIR", help="go on with the interrupted run in DIR")
    return parser


def with_absolute_paths(config: SelectConfig) -> SelectConfig:
    """Workers may run in another directory than the driver, so no path stays relative."""
    paths = tuple(absolute_corpus(path, "--data") for path in config.dataset.paths)
    changes: dict[str, object] = {"dataset": dataclasses.replace(config.dataset, paths=paths)}
    if config.model is not None:
        changes["model"] = absolute_model(config.model, "--model")
    if config.model_checkpoint_path is not None:
        changes["model_checkpoint_path"] = str(
            absolute_path(config.model_checkpoint_path, "model_checkpoint_path")
        )
    if config.scored is not None:
        changes["scored"] = str(scored_run_folder(absolute_path(config.scored, "--scored")))
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def scored_run_folder(folder: Path) -> Path:
    """The folder of a finished run, given it or its `scored`."""
    run = folder.parent if folder.name == "scored" else folder
    if not (run / "manifest.json").is_file():
        raise ConfigError(f"--scored must be the folder of a finished run, got {folder}")
    return run


def require_inputs(config: SelectConfig) -> None:
    """Refuses a model or a corpus that is not there before Ray starts or a folder is made."""
    from selectmoe.data.readers import require_readable
    from selectmoe.model.checkpoint import require_select_moe, weights_file

    if config.scored is not None:
        return
    if config.model is not None:
        require_select_moe(config.model)
    if config.model_checkpoint_path is not None:
        weights_file(config.model_checkpoint_path)
    if config.resume is None:  # a resumed run reads its own copy
        require_readable(config.dataset.paths)


def claim_output(config: SelectConfig) -> Path:
    return claim_run(
        config,
        free=FREE_ON_RESUME,
        resume=config.resume is not None,
        changeable=CHANGEABLE_ON_RESUME,
    )
