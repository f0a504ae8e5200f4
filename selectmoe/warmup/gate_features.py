"""What the gates of a base would read of a row: the mean input of each layer's feed-forward module
over the answer tokens.

A margin is linear in what its gate reads, and the score of a sample averages margins over answer
tokens and layers. Where gates only read, these means are therefore all that a warm-up needs to
know of a row.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectmoe.data.packing import pad_samples
from selectmoe.model.decoder_layers import DecoderLayers, decoder_layers, module_input
from selectmoe.records import TokenizedSample
from selectmoe.scoring.formulas import scored_tokens

# Shape letters: N = rows, L = layers that are read, H = hidden, B = rows of a batch, T = tokens.


class FeatureReader:
    """A frozen base, of which nothing above the last layer to read is computed or kept."""

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        """layers: ascending; None is all. The model loses the layers above the last one.

        Raises ModelError where the model has no such layers (`decoder_layers`).
        """
        self.decoder_layers: DecoderLayers = decoder_layers(model.eval())
        self.layers = tuple(layers or range(len(self.decoder_layers)))
        del self.decoder_layers.layers[self.layers[-1] + 1 :]

    @property
    def hidden_size(self) -> int:
        return self.decoder_layers.hidden_size

    @torch.inference_mode()
    def read(
        self, rows: Sequence[TokenizedSample], *, max_tokens_per_batch: int = 4_096
    ) -> np.ndarray:
        """Mean input of each layer over the answer tokens of each row: float32 [N, L, H]."""
        features_NLH = np.empty((len(rows), len(self.layers), self.hidden_size), np.float32)
        decoder: Any = self.decoder_layers.decoder
        device = next(decoder.parameters()).device
        for batch in pad_samples(rows, max_tokens_per_batch=max_tokens_per_batch):
            answer_BT, real_BT = map(torch.from_numpy, (batch.answer_mask, batch.attention_mask))
            mask_BT = scored_tokens(answer_BT, real_BT, "answer").float().to(device)
            weights_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True)
            token_ids_BT = torch.from_numpy(batch.token_ids).to(device)
            means = self._means(decoder, token_ids_BT, weights_BT)
            features_NLH[batch.positions] = torch.stack(means, dim=1).cpu().numpy()
        return features_NLH

    def _means(self, decoder: Any, token_ids_BT: Tensor, weights_BT: Tensor) -> list[Tensor]:  # noqa: ANN401
        """The weighted mean of what each layer's feed-forward module reads: L times [B, H]."""
        means: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self.layers:
                hook = _reader(means, weights_BT, is_last=layer == self.layers[-1])
                module = self.decoder_layers.feed_forward(layer)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(suppress(_AllRead))
            # No attention mask: padding is on the right, and causal attention never looks there.
            decoder(input_ids=token_ids_BT, use_cache=False)
        return means


def gate_features(
    model: nn.Module, rows: Sequence[TokenizedSample], *, max_tokens_per_batch: int = 4_096
) -> np.ndarray:
    """As `FeatureReader.read`, of every layer."""
    return FeatureReader(model).read(rows, max_tokens_per_batch=max_tokens_per_batch)


class _AllRead(Exception):
    """The last layer has been read: the rest of the forward pass is not needed."""


def _reader(means: list[Tensor], weights_BT: Tensor, *, is_last: bool) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = module_input(args, kwargs)
        # Some mixtures of experts get their tokens in one dimension.
        inputs_BTH = inputs.view(*weights_BT.shape, inputs.shape[-1])
        # Autocast would compute the mean over the tokens in bfloat16.
        with torch.autocast(inputs.device.type, enabled=False):
            means.append(torch.einsum("bth,bt->bh", inputs_BTH.float(), weights_BT))
        if is_last:
            raise _AllRead

    return hook
