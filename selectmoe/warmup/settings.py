"""Rules that follow from the settings of a gate warm-up; imports no torch."""

from selectmoe.config.warmup import TrainingConfig
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.errors import ConfigError


def is_contrastive(training: TrainingConfig) -> bool:
    return training.quality_loss_type == "contrastive"


def learns_detached(training: TrainingConfig) -> bool:
    """True where no gradient needs to flow through the model: only the gates are trained, by a loss
    on their own logits. A trash expert gets a gradient only through the outputs of the layers."""
    only_quality_gates = training.train_quality_gates and not training.train_moe_gates
    return training.peft_mode == "full_rank" and is_contrastive(training) and only_quality_gates


def corruption_kinds(training: TrainingConfig) -> tuple[str, ...]:
    """The kinds of corrupted copies; none for a loss that does not use copies."""
    unknown = sorted(set(training.corruptions) - set(CORRUPTIONS))
    if unknown:
        raise ConfigError(
            f"training.corruptions must be among {', '.join(CORRUPTIONS)}, got {unknown[0]!r}"
        )
    return (training.corruptions or tuple(CORRUPTIONS)) if is_contrastive(training) else ()
