"""Select-MoE keeps the part of an instruction-tuning corpus that is worth training on."""

__version__ = "0.1.0"
