"""Registers the model type; loads models without transformers' progress bars and reports."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from selectmoe.errors import ModelError, first_line
from selectmoe.model import modeling_select_moe
from selectmoe.model.tokenizer_loading import quiet_transformers

Model = TypeVar("Model", bound=PreTrainedModel)


def register_select_moe() -> None:
    """Registers the model type with the Auto classes; safe to repeat."""
    modeling_select_moe.register_auto_classes()


def load_model(
    model_class: type[Model],
    folder: Path,
    *,
    new_parts: tuple[str, ...] = (),
    unused_parts: tuple[str, ...] = (),
    **settings: Any,  # noqa: ANN401 (handed on to from_pretrained, which types them)
) -> Model:
    """The model of a folder. Only tensors whose name contains one of `new_parts` may be missing in
    it, and only those with one of `unused_parts` may be left over; transformers itself fills any
    missing tensor with random numbers.

    Raises ModelError where the folder cannot be loaded, lacks a tensor or has an unknown one.
    """
    with quiet_transformers():
        try:
            # With output_loading_info it returns a pair, which its annotation leaves out.
            pair: Any = model_class.from_pretrained(folder, output_loading_info=True, **settings)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ModelError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    model, report = pair
    missing = _names_without(new_parts, report["missing_keys"])
    unexpected = _names_without(unused_parts, report["unexpected_keys"])
    wrong = sorted({*missing, *unexpected, *map(str, report["mismatched_keys"])})
    if wrong:
        raise ModelError(f"{folder}: not loaded tensor for tensor: {', '.join(wrong[:3])}")
    loaded: Model = model
    return loaded


def _names_without(parts: tuple[str, ...], names: Iterable[str]) -> set[str]:
    return {name for name in names if not any(part in name for part in parts)}
