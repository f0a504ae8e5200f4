"""Calibrations of given scores, without a model."""

from collections.abc import Sequence

import numpy as np

from selectmoe.scoring.calibration import Calibration, score_quantiles


def raw_calibration(scores: Sequence[float] | np.ndarray, **facts: object) -> Calibration:
    """The calibration of these scores, without length adjustment."""
    known: dict[str, object] = {
        "formula": "answer_margin",
        "max_sequence_length": 64,
        "weights_hash": "abc",
        "corpus": {"warm": len(scores)},
    }
    quantiles = score_quantiles(np.asarray(scores))
    return Calibration(quantiles=quantiles, num_samples=len(scores), **known | facts)
