"""Signals beside the score of a row, read from the forward pass that scores it.

nll             mean negative log-likelihood of the answer tokens given the prompt, in nats
pmi             NLL of the answer alone minus nll, which takes a second pass (`answer_alone`)
vector          mean of what the last gate reads, weighted by position (`vectors`)
router_entropy  of the routers below the last gate (`router_entropy`)

Shape letters: B = rows, T = tokens of a row, H = hidden size, S = numbers of all signals of a row.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectmoe.config.engine import HEAD_SIGNALS
from selectmoe.model.decoder_layers import DecoderLayers, module_input
from selectmoe.model.language_model_head import LanguageModelHead
from selectmoe.model.packed_attention import copy_to
from selectmoe.records import PaddedBatch, SampleSignals
from selectmoe.scoring.answer_nll import answer_nll
from selectmoe.scoring.router_entropy import answer_entropy, find_routers, token_entropy
from selectmoe.scoring.vectors import row_vectors, vector_size


def needs_head(signals: Sequence[str]) -> bool:
    """True where the model may not be cut above its last gate."""
    return not HEAD_SIGNALS.isdisjoint(signals)


class SignalReader:
    """Keeps what signals need of a decoder's forward pass, and computes them from it.

    It only reads: what the pass computes is what it computes without.
    """

    def __init__(
        self,
        layers: DecoderLayers,
        *,
        last_gate: int,
        head: LanguageModelHead | None,
        signals: Sequence[str],
    ) -> None:
        """last_gate: its layer. head: given for nll and pmi.

        Raises ConfigError for router_entropy of a base without experts.
        """
        self.signals = tuple(signals)
        self.head = head
        self.vector_size = vector_size(layers.hidden_size)
        self._last_hidden: Tensor | None = None
        self._gate_input: Tensor | None = None
        self._entropies: list[Tensor] = []
        layers.decoder.register_forward_pre_hook(self._forget)
        if "vector" in signals:
            gated = layers.feed_forward(last_gate)
            gated.register_forward_pre_hook(self._keep_gate_input, with_kwargs=True)
        if head is not None:
            layers.decoder.register_forward_hook(self._keep_last_hidden)
        if "router_entropy" in signals:
            for router in find_routers(layers, last_gate):
                router.register_forward_hook(self._keep_entropy)

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers each signal of a row has."""
        return {name: self.vector_size if name == "vector" else 1 for name in self.signals}

    def nll(self, batch: PaddedBatch) -> Tensor:
        """Negative log-likelihood of each answer in the pass just done: float32 [B]."""
        hidden_BTH = self._last_hidden
        assert self.head is not None
        assert hidden_BTH is not None
        ids_BT, answer_BT = (
            copy_to(array, hidden_BTH.device) for array in (batch.token_ids, batch.answer_mask)
        )
        return answer_nll(self.head, hidden_BTH, ids_BT, answer_BT).float()

    def columns(self, batch: PaddedBatch) -> Tensor:
        """The signals of the pass just done, but pmi: float32 [B, S]."""
        parts = []
        if self.head is not None:
            parts.append(self.nll(batch)[:, None])
        if self._entropies:
            answer_BT = copy_to(batch.answer_mask, self._entropies[0].device)
            parts.append(answer_entropy(self._entropies, answer_BT)[:, None])
        if self._gate_input is not None:
            attention_BT = copy_to(batch.attention_mask, self._gate_input.device)
            parts.append(row_vectors(self._gate_input, attention_BT))
        self._forget()
        return torch.cat(parts, dim=1)

    def of_rows(self, columns_BS: np.ndarray, nll_alone_B: np.ndarray) -> list[SampleSignals]:
        """The signals of each row; None where a number is not finite.

        nll_alone_B: NLL of each answer alone; NaN where there is none.
        """
        names = [name for name in ("nll", "router_entropy") if self._has(name)]
        records = []
        for row_S, nll_alone in zip(columns_BS, nll_alone_B.tolist(), strict=True):
            values = dict(zip(names, row_S.tolist(), strict=False))
            nll = values.get("nll", math.nan)
            vector = row_S[len(names) :].astype(np.float16)
            records.append(
                SampleSignals(
                    nll=_finite(nll) if "nll" in self.signals else None,
                    pmi=_finite(nll_alone - nll) if "pmi" in self.signals else None,
                    router_entropy=_finite(values.get("router_entropy", math.nan)),
                    vector=vector if len(vector) and np.isfinite(vector).all() else None,
                )
            )
        return records

    def _has(self, column: str) -> bool:
        return self.head is not None if column == "nll" else column in self.signals

    def _forget(self, *_: Any) -> None:  # noqa: ANN401 (torch's hooks)
        self._last_hidden = self._gate_input = None
        self._entropies = []

    def _keep_last_hidden(self, _: nn.Module, __: Any, output: Any) -> None:  # noqa: ANN401
        self._last_hidden = output[0]

    def _keep_gate_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._gate_input = module_input(args, kwargs)

    def _keep_entropy(self, _: nn.Module, __: Any, output: Any) -> None:  # noqa: ANN401
        self._entropies.append(token_entropy(output))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
