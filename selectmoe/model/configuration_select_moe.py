"""SelectMoeConfig: an OLMoE configuration and the settings of its quality gates."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import OlmoeConfig

TRASH_EXPERT_MODES = ("zero", "noise", "custom")


@strict
class SelectMoeConfig(OlmoeConfig):
    r"""
    An `OlmoeConfig` with a quality gate in every layer.

    quality_gate_init_mean (`float`, *optional*, defaults to 0.0):
        Mean of the normal distribution that gate weights start from.
    quality_gate_init_std (`float`, *optional*, defaults to 0.02):
        Its standard deviation.
    quality_gate_init_bias (`float`, *optional*, defaults to 4.0):
        Difference between the two gate biases at the start: a token's good-probability starts near
        `sigmoid(4.0)` = 0.982, so the converted model still is a language model.
    quality_gate_forced_open (`bool`, *optional*, defaults to `False`):
        Takes every good-probability as 1: the model computes what its OLMoE base computes. The
        gates' logits are still returned.
    quality_loss_type (`str`, *optional*, defaults to `"sigmoid"`):
        Name of the loss on good-probabilities that is added to `loss`; a key of
        `QUALITY_LOSSES` in `quality_losses`.
    quality_loss_weight (`float`, *optional*, defaults to 0.01):
        Factor of that loss, not negative; 0 leaves it out.
    quality_loss_parameters (`dict`, *optional*):
        Keyword arguments of that loss.
    sample_wise_averaging (`bool`, *optional*, defaults to `True`):
        Averages the quality loss over the tokens of a sample first, then over samples.
    trash_expert_mode (`str`, *optional*, defaults to `"zero"`):
        What the trash expert returns: `"zero"`; `"noise"` of the token's own mean and standard
        deviation; `"custom"`, a learned vector or a registered module.
    trash_expert_name (`str`, *optional*):
        With `"custom"`: the name given to `register_trash_expert`; None learns a vector.
    trash_noise_seed (`int`, *optional*, defaults to 0):
        Seed of the noise.
    trash_noise_at_evaluation (`bool`, *optional*, defaults to `False`):
        Keeps the noise in `eval()` mode, where it otherwise is zero.
    enable_load_balancing (`bool`, *optional*, defaults to `False`):
        Adds `router_aux_loss_coef` times OLMoE's load-balancing loss to `loss`.

    The other settings are those of `OlmoeConfig`.
    """

    model_type = "select_moe"
    # Trainer's predictions are then the logits, as for any causal language model.
    keys_to_ignore_at_inference = [  # noqa: RUF012 (as transformers declares it)
        "past_key_values",
        "aux_loss",
        "lm_loss",
        "quality_loss",
        "router_logits",
    ]

    # `float | int`: the validation takes types by their word, and YAML reads `1` as an int.
    quality_gate_init_mean: float | int = 0.0
    quality_gate_init_std: float | int = 0.02
    quality_gate_init_bias: float | int = 4.0
    quality_gate_forced_open: bool = False
    quality_loss_type: str = "sigmoid"
    quality_loss_weight: float | int = 0.01
    quality_loss_parameters: dict[str, float | int] | None = None
    sample_wise_averaging: bool = True
    trash_expert_mode: str = "zero"
    trash_expert_name: str | None = None
    trash_noise_seed: int = 0
    trash_noise_at_evaluation: bool = False
    enable_load_balancing: bool = False
    output_router_logits: bool = True

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401 (the signature of transformers)
        super().__post_init__(**kwargs)
        if self.trash_expert_mode not in TRASH_EXPERT_MODES:
            raise ValueError(
                f"trash_expert_mode must be one of {', '.join(TRASH_EXPERT_MODES)}, "
                f"got {self.trash_expert_mode!r}"
            )
        if self.trash_expert_name is not None and self.trash_expert_mode != "custom":
            raise ValueError(
                "trash_expert_name needs trash_expert_mode='custom', "
                f"got {self.trash_expert_name!r} with {self.trash_expert_mode!r}"
            )
        for name in ("quality_gate_init_std", "quality_loss_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
