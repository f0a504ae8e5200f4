"""Makes `model_type = "select_moe"` known to transformers, with the package's quality losses."""

from selectmoe.model.modeling_select_moe import QUALITY_LOSSES, register_auto_classes
from selectmoe.model.quality_losses import QUALITY_LOSSES as OUR_LOSSES


def register_select_moe() -> None:
    """Registers SelectMoe with AutoConfig, AutoModel and AutoModelForCausalLM; safe to repeat."""
    register_auto_classes()
    QUALITY_LOSSES.update(OUR_LOSSES)
