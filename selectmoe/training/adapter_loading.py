"""Loads PEFT adapters onto their base model; refuses a partial load."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from selectmoe.errors import ModelError, first_line
from selectmoe.model.checkpoint import split_revision
from selectmoe.training.adapter_folder import adapter_base

# What PEFT puts between the name of a module that it wraps and its weight.
_WRAPPED = "base_layer|modules_to_save|original_module|token_adapter"


def with_adapter(model: PreTrainedModel, adapter: Path, *, given: str | None = None) -> PeftModel:
    """The model with the adapter loaded, and with the adapter's vocabulary if it was resized.

    given: the model's name or folder, to recognize the base that the adapter names.
    Raises ModelError unless all tensors match: PEFT only warns about missing or unexpected tensors,
    if at all, and would load a part of the adapter of a deeper model.
    """
    base = adapter_base(adapter)
    refusal = f"{adapter} is an adapter of another model (its base is {base!r})"
    if base is not None and given is not None and _is_same(base, given):
        refusal = f"{adapter} does not fit {base}, which it names as its base"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensors are compared below
            saved = load_peft_weights(str(adapter), device="cpu")
            _resize_vocabulary(model, saved, adapter)
            adapted = PeftModel.from_pretrained(model, adapter)
            wrong = _mismatches(adapted, saved)
    except (OSError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(f"{adapter}: cannot be loaded: {first_line(error)}") from error
    except ModelError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ModelError(f"{refusal}: {_reason(error)}") from error
    if wrong:
        raise ModelError(f"{refusal}: {len(wrong)} tensors do not match, such as {wrong[0]}")
    return adapted.eval()


def _resize_vocabulary(model: PreTrainedModel, saved: Mapping[str, Tensor], adapter: Path) -> None:
    """Resizes the model's embeddings to those in the adapter, which PEFT then loads.

    Raises ModelError where the adapter holds one of two embedding matrices: the new rows of the
    other would be random.
    """
    sizes = {
        name: tensor.shape[0]
        for name in _embedding_names(model)
        for key, tensor in saved.items()
        if re.search(rf"(^|\.){re.escape(name)}(\.({_WRAPPED}))*\.weight$", key)
    }
    current: Any = model.get_input_embeddings()
    new_sizes = {size for size in sizes.values() if size != current.weight.shape[0]}
    if not new_sizes:
        return
    size = max(new_sizes)
    missing = [name for name in _embedding_names(model) if sizes.get(name) != size]
    if missing:
        raise ModelError(
            f"{adapter}: its vocabulary was resized to {size} tokens, and it has no weights of that"
            f" size for {missing[0]}; save it with save_embedding_layers=True or train it with "
            f"{missing[0].rpartition('.')[2]} in modules_to_save"
        )
    model.resize_token_embeddings(size, mean_resizing=False)


def _embedding_names(model: Any) -> list[str]:  # noqa: ANN401 (a PreTrainedModel)
    """Names of the input embeddings and, unless it is tied to them, of the language-model head."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if layers[1] is not None and layers[1].weight is layers[0].weight:
        del layers[1]
    return [
        name for name, module in model.named_modules() if any(module is layer for layer in layers)
    ]


def _mismatches(adapted: PeftModel, saved: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the adapter that are not saved, and saved ones that the model has no place for.

    Embeddings may be saved beside the adapter (PEFT's save_embedding_layers).
    """
    needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = needed | get_peft_model_state_dict(adapted, save_embedding_layers=True)
    return sorted((needed.keys() - saved.keys()) | (saved.keys() - known.keys()))


def _is_same(base: str, given: str) -> bool:
    return base in (given, split_revision(given)[0]) or (
        Path(base).is_dir() and Path(base).resolve() == Path(given).resolve()
    )


def _reason(error: BaseException) -> str:
    """The first mismatch, without the headline of torch's list."""
    mismatch = re.search(r"size mismatch for [^\n]*", str(error))
    return mismatch[0] if mismatch else first_line(error)
