"""Two-sided significance tests of the mean of paired differences."""

import numpy as np
from scipy.stats import ttest_1samp

NUM_FLIPS = 100_000  # the smallest possible p is 1 / (NUM_FLIPS + 1)
FLIPS_PER_CHUNK = 4_000  # 13 MB of float64 at 400 differences


def sign_flip_p(differences: np.ndarray, *, seed: int = 0) -> float:
    """Sign-flip permutation test: it assumes symmetry around 0, but no distribution."""
    observed = abs(differences.sum())
    # Rounding differs with the order of a sum; a sum equal to the observed one must count.
    limit = observed * (1 - 1e-9)
    random = np.random.default_rng(seed)
    num_as_far = 0
    for start in range(0, NUM_FLIPS, FLIPS_PER_CHUNK):
        num_flips = min(FLIPS_PER_CHUNK, NUM_FLIPS - start)
        signs = 2.0 * random.integers(0, 2, (num_flips, len(differences)), dtype=np.int8) - 1.0
        num_as_far += int((np.abs(signs @ differences) >= limit).sum())
    return (num_as_far + 1) / (NUM_FLIPS + 1)  # the observed signs are one of the flips


def t_test_p(differences: np.ndarray) -> float | None:
    """Student's t-test of mean 0; None for fewer than two differences, which have no variance."""
    if len(differences) < 2:
        return None
    if differences.std() == 0:  # for which scipy returns NaN
        return 0.0 if differences.any() else 1.0
    return float(ttest_1samp(differences, 0).pvalue)
