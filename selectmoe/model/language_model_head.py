"""The head of a causal language model by itself, so that it can read few tokens at a time.

Shape letters: N = tokens, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from selectmoe.errors import ModelError


class LanguageModelHead:
    """Logits from last hidden states, as the model's own forward pass computes them."""

    def __init__(self, projection: Callable[[Tensor], Tensor], config: Any) -> None:  # noqa: ANN401
        """config: the model's, some of which scale or bound their logits."""
        text_config = config.get_text_config(decoder=True)
        self.projection = projection
        self.vocab_size = int(text_config.vocab_size)
        # Cohere multiplies by the first, Granite divides by the second, Gemma 2 bounds by the last.
        factor = getattr(text_config, "logit_scale", None) or 1.0
        self._factor = factor / (getattr(text_config, "logits_scaling", None) or 1.0)
        self._bound = getattr(text_config, "final_logit_softcapping", None)

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, V]."""
        logits_NV = self.projection(hidden_NH).float()
        if self._factor != 1.0:
            logits_NV = logits_NV * self._factor
        if self._bound is not None:
            logits_NV = (logits_NV / self._bound).tanh() * self._bound
        return logits_NV


def head_of(model: nn.Module) -> LanguageModelHead:
    """The head of a causal language model of transformers. Raises ModelError where it has none."""
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_output_embeddings", None)
    projection = find() if find is not None else None
    if config is None or projection is None:
        raise ModelError(
            f"the signals nll and pmi need a model with its language-model head, got "
            f"{type(model).__name__} without one"
        )
    return LanguageModelHead(projection, config)
