"""Stage 4: evaluate a model on tasks, with or without an adapter."""
