"""Makes scores.json anew: .venv/bin/python tests/golden/remake.py

Only a change of the maths, the embedded selector or the demo corpus is a reason to; the pull
request shows the scores before and after.
"""

import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.results import commit  # noqa: E402
from selectmoe.config.engine import EngineConfig  # noqa: E402
from selectmoe.data.readers import read_corpus  # noqa: E402
from selectmoe.data.writers import write_json  # noqa: E402
from selectmoe.paths import DEMO_CORPUS  # noqa: E402
from selectmoe.records import Sample, ScoredSample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.scoring.formulas import SCORE_FORMULAS  # noqa: E402

EVERY_NTH_ROW = 25


def golden_scores() -> dict[str, dict[str, float]]:
    """Score by row id, of every 25th row of the demo corpus: raw by formula, and as the embedded
    selector gives it by default."""
    samples = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    found: dict[str, dict[str, float]] = {}
    settings = {formula: EngineConfig(formula=formula, length="raw") for formula in SCORE_FORMULAS}
    for name, config in {**settings, "default": EngineConfig()}.items():
        engine = ScoringEngine.from_pretrained(device="cpu", config=config)
        outcomes = engine.score(samples[::EVERY_NTH_ROW])
        found[name] = {o.sample_id: o.score for o in outcomes if isinstance(o, ScoredSample)}
    return found


if __name__ == "__main__":
    write_json(
        Path(__file__).with_name("scores.json"),
        {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "commit": commit(),
            "scores": golden_scores(),
        },
    )
