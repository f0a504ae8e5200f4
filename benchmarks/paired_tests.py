"""Is a mean of paired differences more than chance? Two tests, both two-sided, without scipy."""

import math

import numpy as np

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
    standard_error = differences.std(ddof=1) / math.sqrt(len(differences))
    if standard_error == 0:
        return 0.0 if differences.any() else 1.0
    t = float(differences.mean() / standard_error)
    return max(1 - student_within(abs(t), degrees_of_freedom=len(differences) - 1), 0.0)


def student_within(t: float, *, degrees_of_freedom: int) -> float:
    """Chance that Student's variable lies in [-t, t]: the finite sums for whole degrees of freedom.

    With cos, sin of atan(t / sqrt(n)); even n: sin (1 + 1/2 cos² + 1·3/(2·4) cos⁴ + …), odd n:
    2/π (angle + sin (cos + 2/3 cos³ + 2·4/(3·5) cos⁵ + …)), up to the power n - 2.
    """
    angle = math.atan(t / math.sqrt(degrees_of_freedom))
    first = degrees_of_freedom % 2
    term, total = math.cos(angle) ** first, 0.0
    for power in range(first, degrees_of_freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    if first == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
