"""The command behind `jobs/finetune.py`, and its training function."""
