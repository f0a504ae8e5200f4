"""Rows that people rated: how well a selector's signals agree with them, and weights of signals."""
