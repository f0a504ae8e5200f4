"""Rules that follow from the settings of a gate warm-up; imports no torch."""

from selectmoe.config.warmup import ALL_LAYERS, AUTO_LAYERS, TrainingConfig, layer_numbers
from selectmoe.corruptions.kinds import CORRUPTIONS, KINDS_FOR_BASES
from selectmoe.errors import ConfigError


def is_contrastive(training: TrainingConfig) -> bool:
    return training.quality_loss_type == "contrastive"


def learns_detached(training: TrainingConfig) -> bool:
    """True where no gradient needs to flow through the model: only the gates are trained, by a loss
    on their own logits. A trash expert gets a gradient only through the outputs of the layers."""
    only_quality_gates = training.train_quality_gates and not training.train_moe_gates
    return training.peft_mode == "full_rank" and is_contrastive(training) and only_quality_gates


def corruption_kinds(training: TrainingConfig, *, for_base: bool = False) -> tuple[str, ...]:
    """The kinds of corrupted copies; none for a loss that does not use copies."""
    unknown = sorted(set(training.corruptions) - set(CORRUPTIONS))
    if unknown:
        raise ConfigError(
            f"training.corruptions must be among {', '.join(CORRUPTIONS)}, got {unknown[0]!r}"
        )
    default = KINDS_FOR_BASES if for_base else tuple(CORRUPTIONS)
    return (training.corruptions or default) if is_contrastive(training) else ()


def uses_features(training: TrainingConfig) -> bool:
    """True where gates on a base are fitted to features that are computed once."""
    return (
        training.method or ("steps" if training.strategy == "fsdp" else "features")
    ) == "features"


def require_select_moe_settings(training: TrainingConfig) -> None:
    """Raises ConfigError for what only gates on a base can have."""
    if training.method == "features":
        raise ConfigError(
            "training.method must be steps for a Select-MoE, got 'features': its gates may act on "
            "what the model computes; give its base as model"
        )
    if training.layers not in (None, ALL_LAYERS):
        raise ConfigError(
            f"training.layers must be all for a Select-MoE, which has a gate in every layer, "
            f"got {training.layers!r}"
        )


def require_base_settings(training: TrainingConfig) -> None:
    """Raises ConfigError for what only a Select-MoE can have: gates on a base only read."""
    defaults = TrainingConfig()
    names = (
        "peft_mode", "train_quality_gates", "train_moe_gates", "quality_loss_type",
        "enable_load_balancing", "trash_expert_mode", "quality_gate_init_mean",
        "quality_gate_init_std", "quality_gate_init_bias",
    )  # fmt: skip
    for name in names:
        value, default = getattr(training, name), getattr(defaults, name)
        if value != default:
            raise ConfigError(
                f"training.{name} must be {_in_yaml(default)} for gates on a base, which only "
                f"read, got {_in_yaml(value)}"
            )
    if training.strategy == "fsdp" and training.method == "features":
        raise ConfigError("training.method must be steps with training.strategy=fsdp")
    if training.layers == AUTO_LAYERS and not uses_features(training):
        raise ConfigError("training.layers=auto needs training.method=features")


def layers_to_read(training: TrainingConfig, num_layers: int) -> tuple[int, ...]:
    """Layers of a base that may get a gate. Raises ConfigError for one that the base has not."""
    if training.layers in (None, ALL_LAYERS, AUTO_LAYERS):
        return tuple(range(num_layers))
    layers = layer_numbers(str(training.layers))
    if layers[-1] >= num_layers:
        raise ConfigError(
            f"training.layers must be below {num_layers}, the number of layers of the base, "
            f"got {layers[-1]}"
        )
    return layers


def chooses_layers(training: TrainingConfig) -> bool:
    return training.layers in (None, AUTO_LAYERS) and uses_features(training)


def _in_yaml(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
