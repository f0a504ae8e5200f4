"""The two tests of paired differences against printed tables, manual counts and each other."""

import numpy as np
import pytest

from benchmarks.paired_tests import sign_flip_p, t_test_p


@pytest.mark.parametrize(
    ("t", "degrees_of_freedom", "outside"),
    [
        (12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01),
        (2.571, 5, 0.05), (2.228, 10, 0.05), (2.093, 19, 0.05), (0.0, 4, 1.0),
    ],
)  # fmt: skip
def test_the_t_test_agrees_with_printed_tables(t, degrees_of_freedom, outside):
    spread = np.linspace(-1, 1, degrees_of_freedom + 1)
    differences = spread / spread.std(ddof=1) + t / np.sqrt(len(spread))
    # The tables round t to three decimals.
    assert t_test_p(differences) == pytest.approx(outside, abs=5e-5)


def test_the_t_test_handles_few_and_equal_differences():
    assert t_test_p(np.array([0.3])) is None
    assert t_test_p(np.zeros(5)) == 1.0
    assert t_test_p(np.full(4, 0.5)) == 0.0
    assert t_test_p(np.array([1.0, -1.0])) == 1.0


def test_the_sign_flip_test_agrees_with_a_manual_count():
    # Of 32 combinations of signs only all plus and all minus are as far from 0 as all plus.
    p = sign_flip_p(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert p == pytest.approx(2 / 32, abs=3e-3)  # four standard errors of 100,000 draws
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_both_tests_agree_on_many_well_behaved_differences():
    for mean in (0.02, 0.1, 0.15):
        differences = np.random.default_rng(0).normal(mean, 1, 400)
        assert sign_flip_p(differences) == pytest.approx(t_test_p(differences), abs=0.01)


def test_both_tests_are_two_sided_and_find_a_clear_difference():
    differences = np.random.default_rng(1).normal(1, 1, 200)
    assert sign_flip_p(differences) == sign_flip_p(-differences) < 1e-4
    assert t_test_p(differences) == t_test_p(-differences) < 1e-9
