"""A lower bound of the memory that finetuning needs, from config.json alone, so that a run that
cannot fit is refused before any weight is read.

Only memory that every implementation needs is counted: a refused run would have failed, and one
that is accepted may still fail close to the limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from selectmoe.config.finetune import FinetuneTrainingConfig
from selectmoe.errors import ModelError, NotEnoughMemoryError, first_line
from selectmoe.model.free_memory import free_memory, in_words
from selectmoe.model.quiet_loading import register_select_moe
from selectmoe.model.tokenizer_loading import quiet_transformers
from selectmoe.training.lora_targets import (
    LoraTargets,
    expert_parameters,
    find_targets,
    linear_modules,
    targeted,
)

# The parameter, its gradient and AdamW's two averages, all float32.
BYTES_PER_TRAINED_PARAMETER = 16
# Besides the logit itself: its log-softmax in float32 and its gradient.
BYTES_PER_LOGIT_OF_LOSS = 8
# Hidden-sized activations of a layer besides the outputs of its linear modules: those of its two
# norms and one residual sum.
HIDDEN_TENSORS_PER_LAYER = 3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of memory on one worker."""

    num_parameters: int
    num_trained: int
    weights: int
    adapter: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.loss

    def __str__(self) -> str:
        return (
            f"{in_words(self.weights)} of weights ({self.num_parameters:,} parameters), "
            f"{in_words(self.adapter)} of adapter and optimizer, {in_words(self.activations)} of "
            f"activations and {in_words(self.loss)} of logits"
        )


def skeleton(model: str) -> nn.Module:
    """The model of a folder or hub name on the meta device: all modules and shapes, no memory."""
    register_select_moe()
    with quiet_transformers(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{model}: cannot be loaded: {first_line(error)}") from error
        try:
            bare: nn.Module = AutoModelForCausalLM.from_config(config)
        except (ValueError, ImportError) as error:
            raise ModelError(
                f"{model}: not a causal language model: {first_line(error)}"
            ) from error
    return bare


def estimate_memory(
    model: str,
    training: FinetuneTrainingConfig,
    *,
    dtype: torch.dtype,
    max_tokens: int,
    num_shards: int = 1,
) -> MemoryEstimate:
    """The memory of a step with `training.batch_size` rows of `max_tokens` tokens.

    num_shards: devices over which the weights are sharded.

    Llama-2-7B in bfloat16 with the published adapter, 4 rows of 2,048: 13.5 GB + 2.1 GB + …
    """
    bare = skeleton(model)
    lora = training.lora
    targets = find_targets(bare, lora, model_name=model)
    num_parameters = sum(parameter.numel() for parameter in bare.parameters())
    num_trained = sum(n * lora.r * (rows + cols) for n, rows, cols in targeted(bare, targets))
    num_tokens = training.batch_size * max_tokens
    return MemoryEstimate(
        num_parameters=num_parameters,
        num_trained=num_trained,
        weights=num_parameters * dtype.itemsize // num_shards,
        adapter=num_trained * BYTES_PER_TRAINED_PARAMETER,
        activations=num_tokens * bytes_per_token(bare, targets, training, dtype),
        loss=num_tokens * vocabulary_size(bare) * (dtype.itemsize + BYTES_PER_LOGIT_OF_LOSS),
    )


def bytes_per_token(
    model: nn.Module, targets: LoraTargets, training: FinetuneTrainingConfig, dtype: torch.dtype
) -> int:
    """Activations that backward needs per token: those of all layers, or with gradient
    checkpointing those of one layer and the inputs of the others."""
    config, lora = text_config(model), training.lora
    num_layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    adapters = list(targeted(model, targets))
    activations = sum(_outputs(model)) + len(adapters) * lora.r
    activations += num_layers * HIDDEN_TENSORS_PER_LAYER * hidden
    kept = activations * dtype.itemsize
    if lora.lora_dropout:  # each adapter keeps its input after dropout, and a mask of bytes
        num_dropped = sum(min(rows, columns) for _, rows, columns in adapters)
        kept += num_dropped * (dtype.itemsize + 1)
    if training.gradient_checkpointing:
        return kept // num_layers + num_layers * hidden * dtype.itemsize
    return kept


def vocabulary_size(model: nn.Module) -> int:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def require_memory(
    estimate: MemoryEstimate,
    training: FinetuneTrainingConfig,
    *,
    available: int,
    kind: str,
    max_tokens: int,
) -> None:
    """Raises NotEnoughMemoryError where the lower bound exceeds what is available.

    kind: "memory" or "GPU memory".
    """
    if estimate.total <= available:
        return
    rows = f"training.batch_size={training.batch_size} of {max_tokens:,} tokens"
    # A smaller batch saves activations and logits; otherwise only a smaller model helps.
    if estimate.weights + estimate.adapter > available:
        remedy = "use a smaller model or training.lora.r, or a larger machine"
    elif training.batch_size > 1:
        remedy = "lower training.batch_size"
    elif not training.gradient_checkpointing:
        remedy = "set training.gradient_checkpointing=true"
    else:
        remedy = "lower dataset.max_sequence_length"
    raise NotEnoughMemoryError(
        f"finetuning needs at least {in_words(estimate.total)} of {kind} with {rows}, and "
        f"{in_words(available)} are free: {estimate}; {remedy}"
    )


def available_memory(device: str, *, num_sharing: int = 1) -> tuple[int, str]:
    """Free bytes for one worker, and their kind: "memory" or "GPU memory".

    num_sharing: workers on this machine, which share its memory where they have no GPU.
    """
    free, kind = free_memory(on_gpu=device == "cuda")
    return (free, kind) if device == "cuda" else (free // num_sharing, kind)


def _outputs(model: nn.Module) -> Iterator[int]:
    """Outputs per token of every linear module, and of the experts that a token is routed to."""
    for _, module in linear_modules(model):
        shape: Any = module.weight.shape
        yield int(shape[0] if isinstance(module, nn.Linear) else shape[1])
    for _, parameter in expert_parameters(model):
        yield int(getattr(text_config(model), "num_experts_per_tok", 1)) * parameter.shape[1]


def text_config(model: nn.Module) -> Any:  # noqa: ANN401
    """The language model's part of a configuration."""
    config: Any = model.config
    return config.get_text_config()
