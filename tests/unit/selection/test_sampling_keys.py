"""Sampling keys: their logarithm, their ranks, and how often they draw a row."""

import numpy as np

from selectmoe.selection.sampling_keys import (
    FINEST_CELL_BITS,
    RankTable,
    cell_bits,
    gumbel_noise,
    natural_log,
    sampling_keys,
    score_cells,
)
from selectmoe.selection.top_k import Histogram


def random_hashes(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, (num_rows, 2), np.uint64)


def test_logarithm_is_that_of_numpy_to_the_last_digits():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.random(10_000), 10.0 ** rng.uniform(-15, 3, 10_000), [1.0, 1 - 2.0**-53, 2.0**-53]]
    )
    # Twelve terms leave 1e-17; the sums round to a few units of 2.2e-16.
    np.testing.assert_allclose(natural_log(values), np.log(values), rtol=2e-15, atol=0)


def test_noise_has_the_mean_and_variance_of_a_gumbel_distribution_and_its_seed():
    hashes = random_hashes(200_000)
    noise = gumbel_noise(hashes, seed=1)
    assert np.isfinite(noise).all()
    # Four standard errors: 1.28 / sqrt(200,000) = 0.003 of the mean.
    assert abs(noise.mean() - np.euler_gamma) < 0.012
    assert abs(noise.var() - np.pi**2 / 6) < 0.04
    other = gumbel_noise(hashes, seed=2)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.01
    assert (gumbel_noise(hashes[::-1], seed=1)[::-1] == noise).all()


def test_a_row_is_drawn_as_often_as_its_weight_says():
    """One of two rows with ranks 1 and -1: at temperature 2 their weights are e^.5 and e^-.5."""
    num_draws = 20_000
    noise = gumbel_noise(random_hashes(2 * num_draws), seed=0).reshape(num_draws, 2)
    keys = sampling_keys(np.array([1.0, -1.0]), noise, temperature=2.0)
    share = (keys[:, 0] > keys[:, 1]).mean()
    expected = 1 / (1 + np.exp(-1))
    assert abs(share - expected) < 4 * (expected * (1 - expected) / num_draws) ** 0.5


def test_ranks_are_standardized_and_follow_the_scores():
    scores = np.random.default_rng(0).beta(8, 2, 50_000).astype(np.float32)
    cells = score_cells(scores, cell_bits=FINEST_CELL_BITS)
    table = RankTable.of(Histogram.of(cells), cell_bits=FINEST_CELL_BITS)
    ranks = table.standardized_ranks(scores)
    assert abs(ranks.mean()) < 1e-3
    assert abs(ranks.var() - 1) < 1e-3
    order = np.argsort(scores, kind="stable")
    assert (np.diff(ranks[order]) >= 0).all()
    exact = 12**0.5 * ((np.argsort(order) + 0.5) / len(scores) - 0.5)
    # Within a cell, of a few rows here, ranks are linear.
    np.testing.assert_allclose(ranks, exact, atol=2e-3)


def test_many_datasets_have_tables_of_fewer_cells():
    assert [cell_bits(number) for number in (1, 16, 17, 64, 10**6)] == [22, 22, 21, 20, 16]
