"""Stage 0: converts an OLMoE into a Select-MoE that computes the same with its gates forced open.

>>> convert_olmoe("allenai/OLMoE-1B-7B-0125", "select-moe-1b-7b", seed=0)

No tensor of the base is changed: the new folder holds each of them bit for bit, in the hub's
layout and in the base's dtype, and the quality gates beside them. `parity.py` proves it.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selectmoe.errors import ConfigError, ModelError, one_line
from selectmoe.model.checkpoint import model_folder, require_olmoe
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.quiet_loading import (
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from selectmoe.model.vocabulary import require_tokenizer_fits
from selectmoe.model.weight_files import (
    common_dtype,
    hub_tensors,
    require_tensors,
    stored_tensors,
    weight_files,
)

ADDED_PARTS = (".quality_gate.", ".trash_expert.")
"""Parts of the names of the tensors that a base does not have."""

# Settings that identify the base instead of describing its computation; they are not copied.
_NOT_TAKEN_OVER = ("model_type", "architectures", "output_router_logits", "dtype", "_name_or_path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The result of a conversion, in numbers."""

    base: str
    folder: Path
    dtype: str
    num_layers: int
    num_experts: int
    num_tensors: int  # of the base's files; all of them are in the new ones
    num_parameters: int
    num_added_parameters: int


@quiet_transformers()
def convert_olmoe(
    base: str | Path,
    save_path: str | Path,
    *,
    seed: int = 0,
    **gate_settings: Any,  # noqa: ANN401 (settings of SelectMoeConfig, which types them)
) -> Conversion:
    """Writes `base`, a folder or hub name, as a Select-MoE to `save_path`: whole or not at all.

    seed: seed of the gates' initialization.
    gate_settings: settings of SelectMoeConfig, such as quality_gate_init_bias.
    Raises ConfigError where `save_path` cannot be a new folder, and ModelError where the base is
    not an OLMoE, lacks a file or a tensor, or has an unknown tensor.
    """
    require_olmoe(str(base))
    target = _new_folder(save_path)
    folder = model_folder(str(base))
    _require_space(target, folder)
    config = read_config(OlmoeConfig, folder)
    stored = stored_tensors(folder)
    fused = meta_tensors(OlmoeForCausalLM, config)
    require_tensors(folder, stored, fused, tied=config.tie_word_embeddings)
    tokenizer = load_tokenizer(folder)
    require_tokenizer_fits(str(folder), tokenizer, config.vocab_size)
    with _whole_folder(target) as partial:
        new_config = gated_config(config, gate_settings)
        dtype = common_dtype(stored)
        model = _gated_model(folder, new_config, dtype=dtype, seed=seed)
        _save(model, tokenizer, partial)
        # The files that were written must hold exactly the tensors of the new model.
        written = meta_tensors(SelectMoeForCausalLM, new_config)
        require_tensors(partial, stored_tensors(partial), written, tied=config.tie_word_embeddings)
    num_added = sum(p.numel() for name, p in model.named_parameters() if is_added(name))
    return Conversion(
        base=str(base),
        folder=target,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=config.num_hidden_layers,
        num_experts=config.num_experts,
        num_tensors=len(stored),
        num_parameters=model.num_parameters() - num_added,
        num_added_parameters=num_added,
    )


def is_added(name: str) -> bool:
    """True for the tensors that a Select-MoE has in addition to those of its base."""
    return any(part in name for part in ADDED_PARTS)


def gated_config(config: OlmoeConfig, gate_settings: Mapping[str, object]) -> SelectMoeConfig:
    """The base's configuration with gates."""
    settings = config.to_dict()
    for key in _NOT_TAKEN_OVER:
        settings.pop(key, None)
    return SelectMoeConfig(**{**settings, **gate_settings})


def read_config(config_class: type[OlmoeConfig], folder: Path) -> Any:  # noqa: ANN401
    """The configuration of a folder as an instance of `config_class`."""
    try:
        return config_class.from_pretrained(folder)
    except Exception as error:  # its checks raise classes of their own
        raise ModelError(f"{folder / 'config.json'}: cannot be used: {one_line(error)}") from error


def meta_tensors(model_class: type[PreTrainedModel], config: OlmoeConfig) -> dict[str, Tensor]:
    """The tensors of a model of this configuration on the meta device, with fused experts."""
    try:
        with torch.device("meta"):
            return dict(model_class(config).state_dict())
    except Exception as error:  # an impossible configuration fails wherever it happens to
        raise ModelError(f"config.json describes no model that can be built: {error!r}") from error


def _gated_model(
    folder: Path, config: SelectMoeConfig, *, dtype: torch.dtype, seed: int
) -> SelectMoeForCausalLM:
    """The base with new gates; only these depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_model(
            SelectMoeForCausalLM, folder, new_parts=ADDED_PARTS, config=config, dtype=dtype
        )


def _save(model: SelectMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # Named explicitly: transformers would write the layout that the base was stored in.
    tensors = hub_tensors(model.state_dict())
    model.save_pretrained(folder, state_dict=tensors, save_original_format=False)
    tokenizer.save_pretrained(folder)  # with the chat template, where there is one
    for file in weight_files(folder):
        # safetensors ignores the umask and lets only the owner read the file.
        file.chmod((folder / "config.json").stat().st_mode)


def _new_folder(save_path: str | Path) -> Path:
    """`save_path` without links, checked to be new or empty."""
    target = Path(save_path).expanduser().resolve()
    reason = None
    try:
        if target.is_mount():
            reason = "which is a mount point: name a folder in it"
        elif target.is_dir() and any(target.iterdir()):
            reason = "which is not empty"
        elif target.exists() and not target.is_dir():
            reason = "which is a file"
    except OSError as error:
        reason = str(error)
    if reason:
        raise ConfigError(f"save_path must be a new or empty folder, got {target}, {reason}")
    return target


def _require_space(target: Path, base: Path) -> None:
    """Raises ConfigError for a target inside the base, or on a disk that is too small for it."""
    base = base.resolve()
    if target == base or base in target.parents:
        raise ConfigError(f"save_path must lie outside base, {base}, got {target}")
    num_bytes = sum(file.stat().st_size for file in weight_files(base))
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ConfigError(
            f"save_path {target}: the checkpoint takes {num_bytes / 1e9:.1f} GB, "
            f"only {free / 1e9:.1f} GB are free"
        )


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `target` at the end and is deleted on an error."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"save_path {target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
