"""The command behind `jobs/pretrain.py`, and its training function."""
