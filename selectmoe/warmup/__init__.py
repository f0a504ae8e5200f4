"""Stage 1: the gate warm-up."""
