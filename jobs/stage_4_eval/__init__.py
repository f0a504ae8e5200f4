"""The command behind `jobs/evaluate.py`, and its Ray task."""
