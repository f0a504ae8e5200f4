"""Calibrate a selector: write calibration.json next to its weights, for percentiles of scores.

    python recipes/calibrate_selector.py --selector DIR --corpus DIR
    python recipes/calibrate_selector.py --selector MODEL --weights RUN_OF_STAGE_1 --corpus DIR

The corpus should be the one that the gates were trained on. jobs/pretrain.py calibrates by itself.
The tenth of the rows that the recipes hold out is skipped; at most 4,000 of the others are scored.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.held_out_rows import is_held_out, read_samples  # noqa: E402
from selectmoe.errors import SelectMoeError  # noqa: E402
from selectmoe.model.checkpoint import calibration_folder  # noqa: E402
from selectmoe.paths import EMBEDDED_SELECTOR  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.calibration import save_calibration  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.scoring.formulas import SCORE_FORMULAS  # noqa: E402
from selectmoe.warmup.calibration import calibrate_on, sampled_positions  # noqa: E402


def training_rows(corpora: list[str]) -> list[Sample]:
    """The rows that the recipes train on: all but the held-out tenth."""
    return [row for row in read_samples(corpora) if not is_held_out(row.sample_id)]


def calibrate_selector(
    selector: Path, training: list[Sample], *, seed: int, weights: Path | None = None,
    formula: str = "answer_margin",
) -> Path:  # fmt: skip
    """Scores a sample of `training` and writes calibration.json; returns its path."""
    engine = ScoringEngine.from_pretrained(selector, model_checkpoint_path=weights, formula=formula)
    positions = sampled_positions(len(training), seed=seed)
    calibration = calibrate_on(engine, [training[position] for position in positions])
    return save_calibration(calibration_folder(str(selector), weights), calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--selector", type=Path, default=EMBEDDED_SELECTOR)
    parser.add_argument("--weights", type=Path, help="output folder of stage 1")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--formula", choices=sorted(SCORE_FORMULAS), default="answer_margin")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    try:
        training = training_rows(args.corpus)
        file = calibrate_selector(
            args.selector, training, seed=args.seed, weights=args.weights, formula=args.formula
        )
    except SelectMoeError as error:
        sys.exit(f"error: {error}")
    print(file)


if __name__ == "__main__":
    main()
