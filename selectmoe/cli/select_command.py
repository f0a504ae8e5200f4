"""`selectmoe select`: stage 2 in one process; `jobs/select.py` runs the same on Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe.cli.command_line import parse_config
from selectmoe.cli.output_folder import (
    absolute_corpus,
    absolute_model,
    absolute_path,
    claimed_run,
    finished_run,
)
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError

if TYPE_CHECKING:  # --help and a mistyped option must not wait for these imports
    from selectmoe.selection.backends import Backend
    from selectmoe.selection.stage import Runner

OPTIONS = {
    "--pct": "selection_percentage",
    "--rows": "selection.rows",
    "--tokens": "selection.tokens",
    "--strategy": "selection.strategy",
    "--data": "dataset.paths",
    "--model": "model",
    "--output": "output",
    "--via": "via",
    "--num-actors": "num_actors",
    "--scored": "scored",
    "--per-dataset": "per_dataset",
    "--max-rejected": "max_rejected",
    "--resume": "resume",
}
# Where a run is written; config.json lies there.
FREE_ON_RESUME = ("output", "output_root", "resume")
# These change where, how fast and whether a run continues, not what comes out of it. A resumed run
# keeps them unless it is given others.
CHANGEABLE_ON_RESUME = ("max_rejected", "num_actors", "via", "shards_in_flight", "report")
# Until a run has selected: what is refused by its scores must not cost scoring again.
CHANGEABLE_BEFORE_SELECTION = ("selection.rows", "selection.tokens", "selection.min_per_dataset")


def main(arguments: Sequence[str]) -> None:
    """One run in this process. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments, prog="selectmoe select")
    require_inputs(config)
    from selectmoe.selection.in_process import InProcess

    run(config, None if config.scored else _backend(config), InProcess(config))


def _backend(config: SelectConfig) -> "Backend":
    from selectmoe.selection.backends import HttpBackend, LocalBackend

    if config.via == "serve":
        raise ConfigError("via=serve needs Ray: python jobs/select.py --via serve")
    return LocalBackend(config) if config.via == "actors" else HttpBackend.connect(config)


def run(
    config: SelectConfig,
    backend: "Backend | None",
    runner: "Runner",
    *,
    tokens_on_gpu: bool = True,
) -> None:
    """Claims the output folder, runs the stage, prints its table and writes its report.

    tokens_on_gpu: False where a GPU of this machine may be in use by others, as on a cluster.
    """
    from selectmoe.cli.progress import SelectionProgress
    from selectmoe.cli.report_command import report_of_run
    from selectmoe.cli.select_table import print_selection
    from selectmoe.selection.stage import run_selection

    with claimed_run(
        config,
        free=FREE_ON_RESUME,
        resume=config.resume is not None,
        changeable=_changeable(config),
    ) as output:
        manifest = run_selection(
            config, output, backend=backend, runner=runner, progress=SelectionProgress()
        )
        print_selection(manifest, output)
        report_of_run(config, output, runner, on_gpu=tokens_on_gpu)


def _changeable(config: SelectConfig) -> tuple[str, ...]:
    """Settings that a resumed run may be given anew."""
    has_selected = config.resume is None or (Path(config.resume) / "manifest.json").is_file()
    return (
        CHANGEABLE_ON_RESUME
        if has_selected
        else (
            *CHANGEABLE_ON_RESUME,
            *CHANGEABLE_BEFORE_SELECTION,
        )
    )


def parse(arguments: Sequence[str], *, prog: str) -> SelectConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    paths = {
        "dataset.paths": absolute_corpus,
        "dataset.folder": absolute_path,
        "model": absolute_model,
        "model_checkpoint_path": absolute_path,
        "scored": finished_run,
    }
    return parse_config(SelectConfig, arguments, prog=prog, options=OPTIONS, paths=paths)


def require_inputs(config: SelectConfig) -> None:
    """Refuses weights or a corpus that cannot be read before anything starts or is written."""
    from selectmoe.data.named_corpora import corpus_specs
    from selectmoe.data.readers import require_readable
    from selectmoe.model.selector_files import find_selector
    from selectmoe.paths import model_or_embedded

    config.require_ranked_signals()
    if config.scored is not None:
        return
    model = model_or_embedded(config.model, config.revision)
    if config.via == "actors":  # a server has weights of its own
        find_selector(model, config.model_checkpoint_path).require_readable()
    elif config.model is not None:
        find_selector(model, config.model_checkpoint_path)
    if config.resume is None:  # a resumed run reads its own copy
        require_readable(corpus_specs(config.dataset))
