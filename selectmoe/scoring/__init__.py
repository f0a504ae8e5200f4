"""From samples to scores: the engine, the score formulas and the calibration."""
