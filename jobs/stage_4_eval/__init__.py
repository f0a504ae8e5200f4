"""The command behind `jobs/evaluate.py`, and its worker."""
