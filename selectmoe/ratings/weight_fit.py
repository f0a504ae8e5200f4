"""Fits weights of standardized signals to ratings: logistic regression, of pairs on differences.

Shape letters: N = rows, S = signals, P = pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selectmoe.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)  # == on arrays gives no single answer
class LinearFit:
    """value = sum of weight * (signal - mean) / deviation, plus the intercept."""

    weights_S: np.ndarray
    means_S: np.ndarray
    deviations_S: np.ndarray
    intercept: float

    def values(self, signals_NS: np.ndarray) -> np.ndarray:
        """float64 (N,)."""
        standardized_NS = (signals_NS - self.means_S) / self.deviations_S
        values_N: np.ndarray = standardized_NS @ self.weights_S + self.intercept
        return values_N


def require_scikit_learn() -> None:
    """Raises ConfigError, with the extra that has it, where scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401 (only to know whether it is there)
    except ImportError as error:
        raise ConfigError(
            "fitting weights needs scikit-learn: pip install 'selectmoe[fit]'; --evaluate-only "
            "measures signals without it"
        ) from error


def fit_weights(
    signals_NS: np.ndarray, good_N: np.ndarray, pairs_P2: np.ndarray | None
) -> LinearFit:
    """pairs_P2: better and worse row of each pair, of which only the difference counts."""
    from sklearn.linear_model import LogisticRegression

    means_S, deviations_S = signals_NS.mean(axis=0), signals_NS.std(axis=0)
    deviations_S = np.where(deviations_S > 0, deviations_S, 1.0)  # a constant tells nothing apart
    standardized_NS = (signals_NS - means_S) / deviations_S
    if pairs_P2 is None:
        model = LogisticRegression(max_iter=1_000).fit(standardized_NS, good_N)
        intercept = float(model.intercept_[0])
    else:
        rows = standardized_NS[pairs_P2[:, 0]] - standardized_NS[pairs_P2[:, 1]]
        # Each difference both ways round: the regression needs two classes.
        labels = np.repeat([True, False], len(rows))
        model = LogisticRegression(max_iter=1_000, fit_intercept=False)
        model.fit(np.concatenate([rows, -rows]), labels)
        intercept = 0.0
    return LinearFit(model.coef_[0].astype(np.float64), means_S, deviations_S, intercept)


def cross_validate(
    signals_NS: np.ndarray,
    good_N: np.ndarray,
    pairs_P2: np.ndarray | None,
    prompts: Sequence[str],
    *,
    num_folds: int,
    seed: int,
) -> np.ndarray:
    """The value of each row by weights that were fitted without its prompt: float64 (N,).

    prompts: one name for all rows that answer the same; both rows of a pair have one.
    Raises DataError where there are too few prompts.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    _, groups_N = np.unique(np.array(prompts, dtype=np.str_), return_inverse=True)
    least = min(len(np.unique(groups_N[good_N])), len(np.unique(groups_N[~good_N])))
    folds = min(num_folds, least)
    if folds < 2:
        raise DataError(
            "cross-validation needs good rows of at least two prompts, and bad rows of as many"
        )
    values_N = np.full(len(signals_NS), np.nan)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for kept, left_out in splitter.split(signals_NS, good_N, groups_N):
        fit = fit_weights(signals_NS[kept], good_N[kept], _pairs_within(pairs_P2, kept))
        values_N[left_out] = fit.values(signals_NS[left_out])
    return values_N


def _pairs_within(pairs_P2: np.ndarray | None, kept: np.ndarray) -> np.ndarray | None:
    """The pairs whose rows are kept, by their positions among these."""
    if pairs_P2 is None:
        return None
    within = pairs_P2[np.isin(pairs_P2[:, 0], kept)]
    positions: np.ndarray = np.searchsorted(kept, within)
    return positions
