"""Metrics of bench_gate_kinds.py: what one score is worth on one half of the evaluation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.gate_kinds_sets import CopySet, Half, PairSet
from benchmarks.quality_scorers import LIKE_LENGTH, matched_auroc, mean_of
from recipes.held_out_auroc import auroc

# Shape letters: N = rows, P = pairs.

# What people, or a strong model, rate, with as little of the length as each set allows.
RATING_METRICS = ("pairs", "rated", "revisions_like", "arguments_like")
NUM_RESAMPLES = 500
NUM_RATED_RESAMPLES = 300
INTERVAL = (0.025, 0.975)

Metrics = dict[str, float | None]


def measure(scores_N: np.ndarray, half: Half, num_answer_N: np.ndarray) -> Metrics:
    """AUROC of kinds, fraction of pairs right ("_like": pairs of like length) and AUROC of rated
    rows. None where there are no such rows, or one of them has no score (NaN)."""
    metrics: Metrics = {
        "seen": mean_of(auroc_by_kind(scores_N, half.seen)),
        "unseen": mean_of(auroc_by_kind(scores_N, half.unseen)),
    }
    for name, pairs in half.pairs.items():
        right_P, is_like_P = right(scores_N, pairs), like_length_pairs(pairs, num_answer_N)
        metrics[name] = _mean(right_P)
        metrics[f"{name}_like"] = _mean(right_P[is_like_P])
    good, bad = scores_N[half.rated.better], scores_N[half.rated.worse]
    metrics["rated"] = auroc(good, bad) if _are_scores(good, bad) else None
    return metrics


def measure_in_full(scores_N: np.ndarray, half: Half, num_answer_N: np.ndarray) -> dict[str, Any]:
    """As `measure`, also at equal length, by kind and with 95 % intervals of the bootstrap."""
    rated = half.rated
    good, bad = scores_N[rated.better], scores_N[rated.worse]
    lengths = num_answer_N[rated.better], num_answer_N[rated.worse]
    seen, unseen = (
        matched_by_kind(scores_N, copies, num_answer_N) for copies in (half.seen, half.unseen)
    )
    return {
        **measure(scores_N, half, num_answer_N),
        "seen_matched": mean_of(seen),
        "unseen_matched": mean_of(unseen),
        "rated_matched": matched_auroc(good, bad, *lengths) if _are_scores(good, bad) else None,
        "intervals": intervals(scores_N, half, num_answer_N),
        "num_pairs": {
            name: [len(pairs.better), int(like_length_pairs(pairs, num_answer_N).sum())]
            for name, pairs in half.pairs.items()
        },
        "seen_by_kind": auroc_by_kind(scores_N, half.seen),
        "unseen_by_kind": auroc_by_kind(scores_N, half.unseen),
        "short_replies_above": {
            reply: float((scores_N[copies] > scores_N[originals]).mean())
            for reply, (originals, copies) in half.short.by_kind.items()
        },
    }


def rating_mean(metrics: Mapping[str, float | None]) -> float | None:
    """The mean of RATING_METRICS."""
    return mean_of({name: metrics.get(name) for name in RATING_METRICS})


def total(metrics: Mapping[str, float | None]) -> float:
    """By which penalties and mixes are chosen: copies and ratings count the same."""
    kinds = mean_of({name: metrics[name] for name in ("seen", "unseen")})
    return (kinds or 0.0) + (rating_mean(metrics) or 0.0)


def auroc_by_kind(scores_N: np.ndarray, copies: CopySet) -> dict[str, float | None]:
    return {
        kind: auroc(good, bad) if _are_scores(good, bad) else None
        for kind, (good, bad) in _scores_by_kind(scores_N, copies).items()
    }


def matched_by_kind(
    scores_N: np.ndarray, copies: CopySet, num_answer_N: np.ndarray
) -> dict[str, float | None]:
    """Between answers of equal length."""
    lengths = _scores_by_kind(num_answer_N, copies)
    return {
        kind: matched_auroc(good, bad, *lengths[kind]) if _are_scores(good, bad) else None
        for kind, (good, bad) in _scores_by_kind(scores_N, copies).items()
    }


def right(scores_N: np.ndarray, pairs: PairSet) -> np.ndarray:
    """1 for each pair whose better answer scores higher, one half for a tie: float64 (P,)."""
    better_P, worse_P = scores_N[pairs.better], scores_N[pairs.worse]
    right_P = (better_P > worse_P) + 0.5 * (better_P == worse_P)
    return np.where(np.isnan(better_P) | np.isnan(worse_P), np.nan, right_P)


def like_length_pairs(pairs: PairSet, num_answer_N: np.ndarray) -> np.ndarray:
    """bool (P,)."""
    one_P, other_P = num_answer_N[pairs.better], num_answer_N[pairs.worse]
    like_P: np.ndarray = np.minimum(one_P, other_P) >= LIKE_LENGTH * np.maximum(one_P, other_P)
    return like_P


def intervals(
    scores_N: np.ndarray, half: Half, num_answer_N: np.ndarray
) -> dict[str, list[float] | None]:
    """Quantiles of the bootstrap over pairs, and over the rated rows of each label."""
    found: dict[str, list[float] | None] = {}
    for name, pairs in half.pairs.items():
        random = np.random.default_rng(0)
        right_P, is_like_P = right(scores_N, pairs), like_length_pairs(pairs, num_answer_N)
        for key, values in ((name, right_P), (f"{name}_like", right_P[is_like_P])):
            found[key] = _interval_of_mean(values, random)
    good, bad = scores_N[half.rated.better], scores_N[half.rated.worse]
    random = np.random.default_rng(0)
    found["rated"] = (
        _quantiles([
            auroc(random.choice(good, len(good)), random.choice(bad, len(bad)))
            for _ in range(NUM_RATED_RESAMPLES)
        ])
        if _are_scores(good, bad)
        else None
    )  # fmt: skip
    return found


def _interval_of_mean(values: np.ndarray, random: np.random.Generator) -> list[float] | None:
    if _mean(values) is None:
        return None
    draws = (random.integers(0, len(values), len(values)) for _ in range(NUM_RESAMPLES))
    return _quantiles([float(values[draw].mean()) for draw in draws])


def _quantiles(values: list[float]) -> list[float]:
    return [float(quantile) for quantile in np.quantile(values, INTERVAL)]


def _scores_by_kind(
    values_N: np.ndarray, copies: CopySet
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        kind: (values_N[originals], values_N[made])
        for kind, (originals, made) in copies.by_kind.items()
    }


def _are_scores(*parts: np.ndarray) -> bool:
    return all(len(part) > 0 and not np.isnan(part).any() for part in parts)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if _are_scores(values) else None
