"""Signals as numbers that are weighted."""

import numpy as np

from selectmoe.scoring.weighted_signals import signal_values


def test_the_gate_is_log_odds_and_length_a_logarithm():
    np.testing.assert_allclose(signal_values("gate", np.float32([0.5, 0.75])), [0, np.log(3)])
    assert np.isfinite(signal_values("gate", np.float32([0, 1]))).all()
    np.testing.assert_allclose(signal_values("length", np.int32([0, 1, 10])), [0, 0, np.log(10)])
