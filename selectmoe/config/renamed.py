"""Aliases of settings, and the names of renamed and removed settings, by stage."""

ALIASES = {
    "stage_2_selection": {"dataset.max_sequence_length": "scoring.max_sequence_length"},
}
"""Other names that are accepted."""

RENAMED = {
    "stage_2_selection": {"seed": "selection.seed"},
    "stage_1_pretrain": {"training.max_tokens_per_forward": "training.max_tokens_per_batch"},
}
"""Former names, which are refused with the new one."""

REMOVED: dict[str, dict[str, str]] = {}
"""Former settings, which are refused with the reason."""
