"""`jobs/fit_weights.py`: how well signals agree with rated rows, and weights fitted to these."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe.cli.command_line import format_table, parse_config
from selectmoe.cli.output_folder import (
    absolute_corpus,
    absolute_model,
    absolute_path,
    finished_run,
)
from selectmoe.config.ratings import FitWeightsConfig
from selectmoe.errors import ConfigError

if TYPE_CHECKING:  # --help and a mistyped option must not wait for these imports
    from selectmoe.ratings.agreement import Agreement
    from selectmoe.ratings.evaluation import RatingReport
    from selectmoe.ratings.rated_rows import RatedRow
    from selectmoe.ratings.row_signals import RowSignals

OPTIONS = {
    "--rated": "rated",
    "--scored": "scored",
    "--signals": "signals",
    "--evaluate-only": "evaluate_only",
    "--model": "model",
    "--model-checkpoint-path": "model_checkpoint_path",
    "--output": "output",
}
PATHS = {
    "rated": absolute_corpus,
    "scored": finished_run,
    "model": absolute_model,
    "model_checkpoint_path": absolute_path,
    "output": absolute_path,
}


def main(arguments: Sequence[str], *, prog: str = "jobs/fit_weights.py") -> None:
    """Raises SelectMoeError for what the user can mend."""
    config = parse_config(FitWeightsConfig, arguments, prog=prog, options=OPTIONS, paths=PATHS)
    output = Path(config.output)
    require_inputs(config, output)
    from selectmoe.ratings.evaluation import evaluate_signals
    from selectmoe.ratings.rated_rows import read_rated

    rows = read_rated(config.rated, config.columns)
    found = find_signals(config, rows)
    # Baselines are measured beside the signals that were asked for, not weighted.
    fitted = config.signals or tuple(found.values)
    report = evaluate_signals(
        rows,
        found,
        fitted=None if config.evaluate_only else fitted,
        num_folds=config.num_folds,
        seed=config.seed,
    )
    print_report(report)
    if report.weights:
        write_weights(config, report, output)
        print(output)


def require_inputs(config: FitWeightsConfig, output: Path) -> None:
    """Refuses what cannot work before anything heavy is imported."""
    from selectmoe.data.readers import require_readable

    if not config.rated:
        raise ConfigError("no rated rows: give --rated FILE")
    require_readable(config.rated)
    if config.evaluate_only:
        return
    if output.exists():
        raise ConfigError(f"--output must be a new file, got {output}, which exists")
    from selectmoe.ratings.weight_fit import require_scikit_learn

    require_scikit_learn()


def find_signals(config: FitWeightsConfig, rows: "Sequence[RatedRow]") -> "RowSignals":
    from selectmoe.paths import model_or_embedded
    from selectmoe.ratings.row_signals import score_signals, stored_signals

    if config.scored is not None:
        return stored_signals(rows, Path(config.scored), config.signals)
    return score_signals(
        rows,
        signals=config.signals,
        model=str(model_or_embedded(config.model, config.revision)),
        model_checkpoint_path=config.model_checkpoint_path,
        config=config.scoring,
    )


def print_report(report: "RatingReport") -> None:
    """One line per signal: fraction of comparisons that it ranks as the ratings do."""
    kind = f"{report.num_pairs:,} pairs" if report.num_pairs else "rated alone"
    print(f"{report.num_rows:,} rows, {kind}, {report.num_prompts:,} prompts")
    for name, num_rows in report.num_left_out.items():
        print(f"left out: {num_rows:,} rows that lack {name}, or whose partner does")
    any_like = [line.like_length for line in report.agreement.values() if line.like_length]
    num_like = any_like[0].num_compared if any_like else 0
    measure = "pairs right" if report.num_pairs else "AUROC"
    table = [("signal", measure, "95 % interval", f"like length ({num_like:,})", "95 % interval")]
    for name, line in report.agreement.items():
        table.append((name, *_cells(line.all_rows), *_cells(line.like_length)))
    print(f"\n{format_table(table)}\n")
    for name, weight in report.weights.items():
        print(f"weight of {name}: {weight.weight:+.3f}")
    for warning in report.warnings:
        print(f"warning: {warning}")


def _cells(agreement: "Agreement | None") -> tuple[str, str]:
    if agreement is None:
        return "", ""
    low, high = agreement.low, agreement.high
    return f"{agreement.estimate:.3f}", f"{low:.3f} to {high:.3f}"


def write_weights(config: FitWeightsConfig, report: "RatingReport", output: Path) -> None:
    from dataclasses import asdict

    from selectmoe.config.code_version import code_version
    from selectmoe.config.loading import resolved
    from selectmoe.scoring.signal_weights import save_weights

    about = {
        "agreement": {name: asdict(line) for name, line in report.agreement.items()},
        "num_rows": report.num_rows,
        "num_pairs": report.num_pairs,
        "warnings": list(report.warnings),
        "config": resolved(config),
        "code": code_version(),
    }
    save_weights(output, report.weights, about)
