"""Loads the model to evaluate and its adapter; refuses a partial load."""

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import ModelError, first_line
from selectmoe.evaluation.adapter_folder import ADAPTER_CONFIG_NAME, adapter_folder
from selectmoe.model.checkpoint import model_folder, read_model_config
from selectmoe.model.devices import choose_dtype
from selectmoe.model.quiet_loading import load_model, load_tokenizer, register_select_moe
from selectmoe.paths import model_or_embedded


def load_target(
    config: EvaluateConfig, *, device: str
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model of a run in evaluation mode, and its tokenizer.

    Raises ModelError if the model is not loaded tensor for tensor or has no tokenizer, or if the
    adapter belongs to another model.
    """
    register_select_moe()
    name = model_or_embedded(config.model)
    settings: dict[str, Any] = {}
    if read_model_config(name).get("model_type") == "select_moe":
        settings["quality_gate_forced_open"] = config.quality_gate_forced_open
    dtype = choose_dtype(config.dtype, on_gpu=device != "cpu")
    folder = model_folder(name)
    tokenizer = load_tokenizer(folder)
    model = load_model(
        cast("type[PreTrainedModel]", AutoModelForCausalLM), folder, dtype=dtype, **settings
    )
    model.to(device)  # type: ignore[arg-type]  # a device name is accepted
    if config.adapter is None:
        return model, tokenizer
    return with_adapter(model, adapter_folder(Path(config.adapter))), tokenizer


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with the adapter loaded. Raises ModelError unless all tensors match.

    PEFT only warns about missing or unexpected tensors, if at all: it would load a part of the
    adapter of a deeper model.
    """
    base = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text("utf-8")).get(
        "base_model_name_or_path"
    )
    refusal = f"{adapter} is an adapter of another model (its base is {base!r})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensors are compared below
            saved = load_peft_weights(str(adapter), device="cpu")
            adapted = PeftModel.from_pretrained(model, adapter)
    except (OSError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(f"{adapter}: cannot be loaded: {first_line(error)}") from error
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{refusal}: {_reason(error)}") from error
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    wrong = sorted(expected.keys() ^ saved.keys())
    if wrong:
        raise ModelError(f"{refusal}: {len(wrong)} tensors do not match, such as {wrong[0]}")
    return adapted.eval()


def _reason(error: BaseException) -> str:
    """The first mismatch, without the headline of torch's list."""
    mismatch = re.search(r"size mismatch for [^\n]*", str(error))
    return mismatch[0] if mismatch else first_line(error)
