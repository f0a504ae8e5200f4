"""The threshold against a plain sort of everything."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from selectmoe.selection.top_k import (
    MAX_CANDIDATES,
    Histogram,
    ScoreBucket,
    ScoreBuckets,
    Threshold,
    descending_keys,
    narrow,
    num_to_keep,
)

Blocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Called once per pass; gives (scores float32 (N,), row_keys str (N,)), block by block."""


def find_threshold(
    blocks: Blocks, *, num_kept: int, max_candidates: int = MAX_CANDIDATES
) -> Threshold:
    """The threshold of the best `num_kept` rows, by passes over blocks in memory.

    Row keys differ and begin with 32 lower-case hex digits. Raises ValueError for a score that is
    not finite and where there are fewer than `num_kept` rows.
    """

    def count(buckets: ScoreBuckets) -> dict[str, Histogram]:
        return {
            name: Histogram.total(
                Histogram.of(bucket.next_digits(scores, row_keys.__getitem__)[0])
                for scores, row_keys in blocks()
            )
            for name, bucket in buckets.items()
        }

    [bucket] = narrow(
        {"": ScoreBucket.of_all_rows(num_kept)}, count, max_candidates=max_candidates
    ).values()
    return bucket.threshold(
        bucket.candidates(scores, row_keys.__getitem__) for scores, row_keys in blocks()
    )


def random_keys(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    """Distinct row keys; some share the id's hash, some are exact duplicates of one row."""
    ids = rng.integers(0, max(num_rows // 3, 1), size=num_rows).tolist()
    seen: dict[str, int] = {}
    keys = []
    for number in ids:
        # Multiplied by a large odd number, so that the digits of the hashes are well spread.
        key = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number % 2 * 0xABCDEF:016x}"
        seen[key] = seen.get(key, -1) + 1
        keys.append(f"{key}-{seen[key]}" if seen[key] else key)
    return np.array(keys, dtype=np.str_)


def random_scores(rng: np.random.Generator, num_rows: int, kind: str) -> np.ndarray:
    scores = {
        "different": rng.random(num_rows),
        "tied": rng.integers(0, 3, num_rows) / 4,
        "equal": np.full(num_rows, 0.5),
        "close": 0.5 + rng.integers(0, 50, num_rows) * 2.0**-23,
        "signed": rng.normal(size=num_rows) * 10.0 ** rng.integers(-40, 38, num_rows),
        "zeros": rng.choice([0.0, -0.0, 1e-45, -1e-45], num_rows),
    }[kind]
    return scores.astype(np.float32)


def in_blocks(scores: np.ndarray, row_keys: np.ndarray, *, num_blocks: int) -> Blocks:
    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from zip(
            np.array_split(scores, num_blocks), np.array_split(row_keys, num_blocks), strict=True
        )

    return blocks


def kept_by_sorting(scores: np.ndarray, row_keys: np.ndarray, num_kept: int) -> set[str]:
    return set(row_keys[np.lexsort((row_keys, -scores))[:num_kept]].tolist())


def kept_by(threshold: Threshold, scores: np.ndarray, row_keys: np.ndarray) -> set[str]:
    return set(row_keys[threshold.keeps(scores, row_keys.__getitem__)].tolist())


@pytest.mark.parametrize("kind", ["different", "tied", "equal", "close", "signed", "zeros"])
@pytest.mark.parametrize("max_candidates", [1, 20, 100_000])
def test_cut_keeps_what_a_full_sort_would(kind: str, max_candidates: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(15):
        num_rows = int(rng.integers(1, 300))
        scores, row_keys = random_scores(rng, num_rows, kind), random_keys(rng, num_rows)
        blocks = in_blocks(scores, row_keys, num_blocks=int(rng.integers(1, 8)))
        for num_kept in {1, int(rng.integers(1, num_rows + 1)), num_rows}:
            threshold = find_threshold(blocks, num_kept=num_kept, max_candidates=max_candidates)
            assert threshold.num_kept == num_kept
            assert kept_by(threshold, scores, row_keys) == kept_by_sorting(
                scores, row_keys, num_kept
            )


def test_cut_does_not_depend_on_order_or_splitting() -> None:
    rng = np.random.default_rng(1)
    scores, row_keys = random_scores(rng, 2_000, "tied"), random_keys(rng, 2_000)
    expected = find_threshold(in_blocks(scores, row_keys, num_blocks=1), num_kept=700)
    for num_blocks in (2, 65, 2_500):  # the last has empty blocks
        order = rng.permutation(len(scores))
        blocks = in_blocks(scores[order], row_keys[order], num_blocks=num_blocks)
        assert find_threshold(blocks, num_kept=700, max_candidates=100) == expected


def test_more_copies_of_one_row_than_candidates_are_still_told_apart() -> None:
    row_keys = np.array([f"{7:032x}" + (f"-{n}" if n else "") for n in range(50)])
    scores = np.full(50, 0.25, dtype=np.float32)
    threshold = find_threshold(
        in_blocks(scores, row_keys, num_blocks=3), num_kept=13, max_candidates=5
    )
    assert threshold.keeps(scores, row_keys.__getitem__).sum() == 13


def test_memory_and_passes_are_bounded_when_all_scores_are_equal() -> None:
    rng = np.random.default_rng(2)
    scores, row_keys = np.full(300_000, 0.5, dtype=np.float32), np.empty(300_000, dtype="<U32")
    hashes = rng.integers(0, 2**63, size=(300_000, 2))
    row_keys[:] = [f"{a:016x}{b:016x}" for a, b in hashes.tolist()]
    passes = 0

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal passes
        passes += 1
        yield scores, row_keys

    threshold = find_threshold(blocks, num_kept=15_000)
    assert threshold.keeps(scores, row_keys.__getitem__).sum() == 15_000
    assert passes == 4  # two digits of the score, one of the hash, the candidates


def test_cut_keeps_nothing_that_is_not_a_number() -> None:
    scores = np.array([np.nan, 0.9, np.nan], dtype=np.float32)
    threshold = Threshold(score=0.5, row_key="f" * 32, num_kept=1)
    assert threshold.keeps(scores, np.array(["0" * 32] * 3).__getitem__).tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_score_that_is_not_finite_is_refused(bad: float) -> None:
    scores = np.array([0.1, bad], dtype=np.float32)
    row_keys = np.array(["0" * 32, "1" * 32])
    with pytest.raises(ValueError, match="finite"):
        find_threshold(in_blocks(scores, row_keys, num_blocks=1), num_kept=1)


@pytest.mark.parametrize("num_rows", [0, 4])
def test_keeping_more_rows_than_there_are_is_refused(num_rows: int) -> None:
    scores, row_keys = np.zeros(num_rows, np.float32), random_keys(np.random.default_rng(0), 4)
    blocks = in_blocks(scores, row_keys[:num_rows], num_blocks=2)
    with pytest.raises(ValueError, match=f"cannot keep 5 of {num_rows} rows"):
        find_threshold(blocks, num_kept=5)
    with pytest.raises(ValueError, match="num_kept must be at least 1, got 0"):
        find_threshold(blocks, num_kept=0)


def test_keys_order_scores_from_high_to_low() -> None:
    scores = np.array([3e38, 1.0, 0.5, 1e-45, 0.0, -1e-45, -0.5, -3e38], dtype=np.float32)
    assert (np.diff(descending_keys(scores).astype(np.int64)) > 0).all()
    zeros = descending_keys(np.array([0.0, -0.0], dtype=np.float32))
    assert zeros[0] == zeros[1]


@pytest.mark.parametrize(
    ("num_scored", "share", "expected"),
    [
        (100, 0.29, 29),  # in floats 28.999999999999996
        (100, 0.57, 57),
        (1_000, 0.001, 1),
        (999, 0.001, 1),  # floor gives 0, at least one row is kept
        (1, 0.05, 1),
        (1, 1.0, 1),
        (7, 1, 7),
        (42_636, 0.05, 2_131),
        (10**9, 1e-05, 10_000),
        (3, 0.3333333333333333, 1),
    ],
)
def test_number_to_keep_is_the_exact_floor(num_scored: int, share: float, expected: int) -> None:
    assert num_to_keep(num_scored, share) == expected
