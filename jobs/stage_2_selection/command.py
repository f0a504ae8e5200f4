"""The command of `jobs/select.py`: stage 2 of the package with its scoring backends on Ray."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from selectmoe.cli.select_command import parse, require_inputs, run
from selectmoe.config.selection import SelectConfig

if TYPE_CHECKING:  # --help and a mistyped option must not wait for these imports
    from jobs.stage_2_selection.ray_runner import RayRunner
    from selectmoe.selection.backends import Backend


def main(arguments: Sequence[str]) -> None:
    """One run of stage 2. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments, prog="jobs/select.py")
    require_inputs(config)
    from jobs.stage_2_selection.ray_runner import RayRunner

    runner = RayRunner(config)
    backend = None if config.scored else find_backend(config, runner)
    run(config, backend, runner, tokens_on_gpu=False)


def find_backend(config: SelectConfig, runner: "RayRunner") -> "Backend":
    """Raises SelectMoeError where none answers, or it scores by other settings than `config`."""
    from jobs.stage_2_selection.deployment_backend import DeploymentBackend
    from selectmoe.selection.backends import HttpBackend, LocalBackend

    if config.via == "actors":
        return LocalBackend(config)
    if config.via == "serve":
        runner.start()
        return DeploymentBackend.connect(config)
    return HttpBackend.connect(config)
