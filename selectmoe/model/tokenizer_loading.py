"""Loads tokenizers without the code of a model, and silences transformers while it loads."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from selectmoe.errors import ModelError, first_line
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.vocabulary import has_tokenizer

# AutoTokenizer reads the model's configuration, too. Its classes and all that they import would
# cost a process that only tokenizes, as the driver of a training does, two CPU seconds.
AutoConfig.register(SelectMoeConfig.model_type, SelectMoeConfig, exist_ok=True)


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
