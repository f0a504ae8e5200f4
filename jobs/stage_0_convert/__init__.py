"""The command behind `jobs/convert.py`."""
