"""Loads the model to evaluate and its adapter; refuses a partial load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import ConfigError, first_line
from selectmoe.model.checkpoint import model_folder, read_model_config
from selectmoe.model.devices import choose_dtype
from selectmoe.model.quiet_loading import load_model, register_select_moe
from selectmoe.model.tokenizer_loading import load_tokenizer
from selectmoe.model.vocabulary import has_tokenizer, require_tokenizer_fits
from selectmoe.paths import model_or_embedded
from selectmoe.training.adapter_folder import adapter_folder
from selectmoe.training.adapter_loading import with_adapter

# PEFT saves the embeddings of new tokens by itself only where it can read the base's configuration,
# so not where the hub does not answer.
ADAPTER_REMEDY = (
    "save the adapter again with save_embedding_layers=True, or remove its tokenizer files to "
    "evaluate it with the base's tokenizer"
)


def load_target(
    config: EvaluateConfig, *, device: str, settings: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model of a run in evaluation mode, and its tokenizer: the adapter's where it has one.

    settings: further arguments of from_pretrained.
    Raises ModelError if the model is not loaded tensor for tensor, has no tokenizer or not all of
    its embeddings, or if the adapter belongs to another model.
    """
    register_select_moe()
    name = model_or_embedded(config.model, config.revision)
    settings = dict(settings or {})
    if read_model_config(name).get("model_type") == "select_moe":
        settings["quality_gate_forced_open"] = config.quality_gate_forced_open
    dtype = choose_dtype(config.dtype, on_gpu=device != "cpu")
    folder = model_folder(name)
    adapter = adapter_folder(Path(config.adapter)) if config.adapter is not None else None
    source = adapter if adapter is not None and has_tokenizer(adapter) else folder
    tokenizer = load_tokenizer(source, trust_remote_code=bool(settings.get("trust_remote_code")))
    try:
        model: Any = load_model(
            cast("type[PreTrainedModel]", AutoModelForCausalLM), folder, dtype=dtype, **settings
        )
    except TypeError as error:  # an unknown argument reaches the model's constructor
        raise ConfigError(f"model_args: {name} refuses them: {first_line(error)}") from error
    if adapter is not None:
        model = with_adapter(model, adapter, given=name)
    _require_all_tokens(model, tokenizer, source, remedy=ADAPTER_REMEDY if adapter else None)
    if not hasattr(model, "hf_device_map"):  # device_map or a quantization has placed it already
        model.to(device)
    return model.eval(), tokenizer


def _require_all_tokens(
    model: Any,  # noqa: ANN401 (a PreTrainedModel or a PeftModel)
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    *,
    remedy: str | None,
) -> None:
    """Raises ModelError for a token without an embedding, and never pads with such a token."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    require_tokenizer_fits(str(source), tokenizer, vocab_size, remedy=remedy)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
