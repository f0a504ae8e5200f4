"""Is a mean of paired differences more than chance? Two tests, both two-sided."""

import numpy as np
from scipy.stats import ttest_1samp

NUM_FLIPS = 100_000  # the least p that can come out is one in as many
FLIPS_PER_CHUNK = 4_000  # at 400 differences 6 MB


def sign_flip_p(differences: np.ndarray, *, seed: int = 0) -> float:
    """Chance of a sum this far from 0 if each difference were as likely to have the other sign.

    A permutation test: it asks for no distribution, and a difference counts by its size.
    """
    observed = abs(differences.sum())
    # Sums in another order differ by rounding, and what is as far as observed has to count.
    limit = observed * (1 - 1e-9)
    random = np.random.default_rng(seed)
    num_as_far = 0
    for start in range(0, NUM_FLIPS, FLIPS_PER_CHUNK):
        num_flips = min(FLIPS_PER_CHUNK, NUM_FLIPS - start)
        signs = 2.0 * random.integers(0, 2, (num_flips, len(differences)), dtype=np.int8) - 1.0
        num_as_far += int((np.abs(signs @ differences) >= limit).sum())
    return (num_as_far + 1) / (NUM_FLIPS + 1)  # with the observed signs themselves


def t_test_p(differences: np.ndarray) -> float | None:
    """Student's test of a mean of 0; None for fewer than two differences, which have no spread."""
    if len(differences) < 2:
        return None
    if differences.std() == 0:  # where scipy has no answer
        return 0.0 if differences.any() else 1.0
    return float(ttest_1samp(differences, 0).pvalue)
