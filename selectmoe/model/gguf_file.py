"""Loads a model and its tokenizer from a GGUF file, dequantized."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selectmoe.errors import ModelError, first_line
from selectmoe.model.tokenizer_loading import quiet_transformers

MAGIC = b"GGUF"
_PRE_TOKENIZER_FIELD = "tokenizer.ggml.pre"


def load_gguf(
    file: Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, as if it had been loaded from a folder, and its tokenizer.

    Raises ModelError where the file is none, cannot be loaded, or the package gguf is missing.
    """
    require_gguf(file)
    try:
        with quiet_transformers(), _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype
            )
    except Exception as error:  # a cut file, an unknown architecture: each reader has its own
        raise ModelError(f"{file}: cannot be loaded: {first_line(error)}") from error
    return _without_quantization(loaded, dtype), load_gguf_tokenizer(file)


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Raises ModelError as `load_gguf` does."""
    require_gguf(file)
    try:
        with quiet_transformers(), _no_progress_bar():
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            pre_tokenizer = _read_field(file, _PRE_TOKENIZER_FIELD)
    except Exception as error:
        raise ModelError(f"{file}: its tokenizer cannot be read: {first_line(error)}") from error
    if pre_tokenizer == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = _digits_apart()
    tokenizer.model_max_length = read_gguf_config(file)["max_position_embeddings"]
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def read_gguf_config(file: Path) -> dict[str, Any]:
    """The metadata as config.json would have it. Raises ModelError as `load_gguf` does."""
    require_gguf(file)
    try:
        with quiet_transformers(), _no_progress_bar():
            config, _ = PretrainedConfig.get_config_dict(file.parent, gguf_file=file.name)
    except Exception as error:
        raise ModelError(f"{file}: cannot be loaded: {first_line(error)}") from error
    settings: dict[str, Any] = config
    return settings


def count_gguf_parameters(file: Path) -> int:
    """Number of parameters by the file's header."""
    require_gguf(file)
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


def require_gguf(file: Path) -> None:
    """Raises ModelError unless `file` is a GGUF file and the package that reads it is installed."""
    if not file.is_file():
        raise ModelError(f"GGUF file {file} does not exist")
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{file}: is not a GGUF file")
    if find_spec("gguf") is None:
        raise ModelError(f"{file}: a GGUF file needs `pip install gguf`")


def _without_quantization(loaded: Any, dtype: torch.dtype) -> PreTrainedModel:  # noqa: ANN401
    """The same tensors in a model that knows no quantization: `save_pretrained` refuses the other,
    although its tensors are dequantized."""
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    config = type(loaded.config).from_dict(settings)
    config.dtype = dtype
    with torch.device("meta"):
        model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    # Buffers that no file holds, such as the frequencies of rotary embeddings.
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, buffers[name])
    model.generation_config = loaded.generation_config
    model.eval()
    return model


def _digits_apart() -> Any:  # noqa: ANN401 (tokenizers types its classes as Any)
    """The pre-tokenizer of SmolLM, whose name is all that GGUF keeps; transformers would use that
    of GPT-2, which splits white space in front of a digit otherwise."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([digits, byte_level])


def _read_field(file: Path, name: str) -> object:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(name)
    return None if field is None else field.contents()


@contextlib.contextmanager
def _no_progress_bar() -> Any:  # noqa: ANN401
    """transformers draws one for the tensors of a GGUF file, whatever its settings say."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
