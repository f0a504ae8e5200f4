"""Measures signals on rated rows, alone and weighted together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selectmoe.errors import DataError
from selectmoe.ratings.agreement import Agreement, Comparisons
from selectmoe.ratings.rated_rows import RatedRow, good_rows, pairs_of
from selectmoe.ratings.row_signals import RowSignals
from selectmoe.ratings.weight_fit import cross_validate, fit_weights
from selectmoe.scoring.signal_weights import SignalWeight

FEW_LABELS = 50
TOGETHER = "together"
LENGTH = "length"
NEGATED = "nll"  # the less, the better: measured as -nll


@dataclass(frozen=True, slots=True)
class SignalAgreement:
    """How well one signal, or all together, agree with the ratings."""

    all_rows: Agreement
    like_length: Agreement | None  # None where no rows of like length are compared


@dataclass(frozen=True, slots=True)
class RatingReport:
    """What rated rows say of a selector's signals."""

    num_rows: int
    num_pairs: int  # 0 where rows are rated alone
    num_prompts: int
    num_left_out: dict[str, int]  # by the signal that a row or its partner lacks
    agreement: dict[str, SignalAgreement]
    weights: dict[str, SignalWeight]  # empty without a fit
    warnings: tuple[str, ...]


def evaluate_signals(
    rows: Sequence[RatedRow],
    found: RowSignals,
    *,
    fitted: Sequence[str] | None,
    num_folds: int,
    seed: int,
) -> RatingReport:
    """fitted: the signals that weights are fitted of; None fits none.

    Raises DataError where too few rows are left to compare.
    """
    pairs = pairs_of(rows)
    kept, num_left_out = _complete(rows, found, pairs)
    if len(kept) < 2:
        raise DataError(f"too few rated rows have all signals: {len(kept)} of {len(rows)}")
    position = {old: new for new, old in enumerate(kept)}
    pairs = [(position[one], position[other]) for one, other in pairs if one in position]
    rows = [rows[index] for index in kept]
    good = _good(rows, pairs)
    prompts = _prompts(rows, pairs)
    values = {name: column[kept] for name, column in found.values.items()}
    lengths_N = found.num_answer_tokens[kept]
    compared = Comparisons.of(good, pairs, lengths_N, prompts, seed=seed)
    measured = {
        f"-{name}" if name == NEGATED else name: -column if name == NEGATED else column
        for name, column in values.items()
    }
    weights: dict[str, SignalWeight] = {}
    if fitted is not None:
        signals_NS = np.stack([values[name] for name in fitted], axis=1)
        measured[TOGETHER] = cross_validate(
            signals_NS, compared.good_N, compared.pairs_P2, prompts, num_folds=num_folds, seed=seed
        )
        fit = fit_weights(signals_NS, compared.good_N, compared.pairs_P2)
        numbers = zip(fit.weights_S, fit.means_S, fit.deviations_S, strict=True)
        triples = (SignalWeight(*map(float, three)) for three in numbers)
        weights = dict(zip(fitted, triples, strict=True))
    return RatingReport(
        num_rows=len(rows),
        num_pairs=len(pairs),
        num_prompts=len(set(prompts)),
        num_left_out=num_left_out,
        agreement={name: _agreement(compared, column) for name, column in measured.items()},
        weights=weights,
        warnings=tuple(_warnings(compared, measured, len(pairs) or len(rows))),
    )


def _complete(
    rows: Sequence[RatedRow], found: RowSignals, pairs: Sequence[tuple[int, int]]
) -> tuple[list[int], dict[str, int]]:
    """Positions of the rows that have all signals, as does their partner; and the others, by the
    first signal that is missing."""
    partner = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    kept, left_out = [], dict.fromkeys(found.values, 0)
    for index in range(len(rows)):
        both = [index, partner.get(index, index)]
        missing = [name for name, column in found.values.items() if np.isnan(column[both]).any()]
        if missing:
            left_out[missing[0]] += 1
        else:
            kept.append(index)
    return kept, {name: number for name, number in left_out.items() if number}


def _good(rows: Sequence[RatedRow], pairs: Sequence[tuple[int, int]]) -> list[bool]:
    if not pairs:
        return good_rows(rows)
    better = {one for one, _ in pairs}
    return [index in better for index in range(len(rows))]


def _prompts(rows: Sequence[RatedRow], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """The two rows of a pair count as of one prompt, also where one was edited with its prompt."""
    prompts = [row.prompt for row in rows]
    for better, worse in pairs:
        prompts[better] = prompts[worse]
    return prompts


def _agreement(compared: Comparisons, values_N: np.ndarray) -> SignalAgreement:
    overall = compared.agreement(values_N)
    assert overall is not None
    return SignalAgreement(overall, compared.agreement(values_N, like_length=True))


def _warnings(
    compared: Comparisons, measured: Mapping[str, np.ndarray], num_labels: int
) -> list[str]:
    warnings = []
    if num_labels < FEW_LABELS:
        warnings.append(
            f"{num_labels} labels are few: differences between signals are mostly chance below "
            f"{FEW_LABELS}"
        )
    if TOGETHER in measured:
        shares_R, _ = compared.shares(measured[TOGETHER], like_length=False)
        lengths_R, _ = compared.shares(measured[LENGTH], like_length=False)
        if lengths_R[0] < 0.5:
            lengths_R = 1 - lengths_R
        gain_R = shares_R - lengths_R
        low, high = np.nanpercentile(gain_R[1:], [2.5, 97.5])
        if low <= 0:
            warnings.append(
                "all signals together are not above answer length alone (difference "
                f"{gain_R[0]:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}): the labels may "
                "reward length"
            )
    return warnings
