"""The command behind `jobs/select.py`, and its scoring backends on Ray."""
