"""The signals of rows as numbers that are weighted: pure functions on columns of `scored/`.

gate    log-odds of the score, which spread out where scores are close to 0 or 1
length  natural logarithm of the number of answer tokens
others  as they are stored

Shape letters: N = rows.
"""

import numpy as np

from selectmoe.scoring.formulas import SMALLEST_PROBABILITY

COLUMNS = {"gate": "score", "length": "num_answer_tokens"}


def column_of(signal: str) -> str:
    """The column of `scored/` that holds a signal."""
    return COLUMNS.get(signal, signal)


def signal_values(signal: str, column_N: np.ndarray) -> np.ndarray:
    """float64 (N,), NaN where a row has none."""
    values_N = column_N.astype(np.float64)
    if signal == "gate":
        values_N = np.clip(values_N, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
        values_N = np.log(values_N) - np.log1p(-values_N)
    elif signal == "length":
        values_N = np.log(np.maximum(values_N, 1))
    return values_N
