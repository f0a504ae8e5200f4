"""Registers the model type; loads models and tokenizers without transformers' progress bars."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from selectmoe.errors import ModelError, first_line
from selectmoe.model import modeling_select_moe
from selectmoe.model.vocabulary import has_tokenizer

Model = TypeVar("Model", bound=PreTrainedModel)


def register_select_moe() -> None:
    """Registers the model type with the Auto classes; safe to repeat."""
    modeling_select_moe.register_auto_classes()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers, which reports every tensor that is left out on purpose."""
    verbosity = transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers_logging.enable_progress_bar()


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


def load_tokenizer(
    model: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a hub name, whose weights are not downloaded.

    Raises ModelError where it is missing or unreadable.
    """
    is_folder = Path(model).is_dir()
    if is_folder and not has_tokenizer(Path(model)):
        raise ModelError(
            f"{model}: has no tokenizer; put the base's tokenizer.json and tokenizer_config.json "
            "there"
        )
    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                model, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # the hub's client has many; a broken file raises a bare one
            failed = "cannot be read" if is_folder else "could not be downloaded from the hub"
            raise ModelError(f"{model}: its tokenizer {failed}: {first_line(error)}") from error
    return tokenizer


def _names_without(parts: tuple[str, ...], names: Iterable[str]) -> set[str]:
    return {name for name in names if not any(part in name for part in parts)}
