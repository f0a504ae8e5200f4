"""The transformers model `select_moe`, its conversion from OLMoE and its weight files."""
