"""Statistics of the gates between two logs, and the detection of collapsed gates."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from selectmoe.errors import TrainingStoppedError
from selectmoe.warmup.gate_objectives import MicroLoss, answer_tokens, row_margins
from selectmoe.warmup.step_batches import MicroBatch

# Shape letters: L = layers, B = rows of a batch (real ones first, then their copies), T = tokens.
LARGEST_GOOD, SMALLEST_GOOD = 0.999, 0.001
# The spread of the margins of trained and of new gates is 0.05 and more; below this it is rounding.
SMALLEST_SPREAD = 1e-4
NUM_LOGS_BEFORE_STOP = 3


class GateStatistics:
    """Sums over rows, kept on the device so that no step waits for them, and reduced over workers
    only when they are logged."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.num_layers = num_layers
        # Good-probability of each layer over the real rows; margin and its square over all rows;
        # number of pairs whose real row is above its copy.
        self.sums = torch.zeros(num_layers + 3, dtype=torch.float64, device=device)
        self.num_real = self.num_rows = self.num_pairs = self.num_tokens = 0
        self.parts: dict[str, Tensor] = {}
        self.num_steps = 0

    @torch.no_grad()
    def add(self, loss: MicroLoss, batch: MicroBatch, *, num_tokens: int) -> None:
        mask_BT = answer_tokens(batch).float()
        good_LB = (loss.margins_LBT.sigmoid() * mask_BT).sum(-1) / mask_BT.sum(-1)
        margins_B = row_margins(loss.margins_LBT, batch).double()
        real_B, copies_B = margins_B[: batch.num_real], margins_B[batch.num_real :]
        in_order = (real_B > copies_B).sum() if len(copies_B) else torch.zeros_like(margins_B[0])
        others = torch.stack([margins_B.sum(), margins_B.square().sum(), in_order.double()])
        self.sums += torch.cat([good_LB[:, : batch.num_real].double().sum(1), others])
        self.num_real += batch.num_real
        self.num_rows += len(margins_B)
        self.num_pairs += len(copies_B)
        self.num_tokens += num_tokens
        for name, part in loss.parts.items():
            self.parts[name] = self.parts.get(name, torch.zeros_like(part)) + part

    def to_logs(self, *, num_workers: int, seconds: float) -> dict[str, float]:
        """The means over all workers. Every worker must call it, and all get the same values."""
        names = sorted(self.parts)
        counts = (self.num_real, self.num_rows, self.num_pairs, self.num_tokens)
        sums = torch.cat([
            self.sums,
            self.sums.new_tensor(counts),
            *(self.parts[name].double().reshape(1) for name in names),
        ])  # fmt: skip
        if num_workers > 1:
            torch.distributed.all_reduce(sums)
        *good, margin, square, in_order = sums[: self.num_layers + 3].tolist()
        real, rows, pairs, tokens, *parts = sums[self.num_layers + 3 :].tolist()
        means = [layer / real for layer in good]
        mean = margin / rows
        logs = {name: part / self.num_steps for name, part in zip(names, parts, strict=True)}
        logs["good_probability"] = sum(means) / len(means)
        logs |= {f"good_probability_layer_{n:02d}": value for n, value in enumerate(means)}
        logs["margin_mean"] = mean
        logs["margin_spread"] = math.sqrt(max(square / rows - mean**2, 0.0))
        if pairs:
            logs["pairs_in_order"] = in_order / pairs
        return logs | {"tokens_per_second": tokens / seconds}


class CollapseWatch:
    """Ends a run whose gates give all rows the same score in several logs in a row."""

    def __init__(self) -> None:
        self.num_collapsed = 0

    def check(self, logs: Mapping[str, float]) -> None:
        """Raises TrainingStoppedError at the third log in a row that shows a collapse."""
        complaint = collapse_of(logs)
        self.num_collapsed = self.num_collapsed + 1 if complaint else 0
        if self.num_collapsed >= NUM_LOGS_BEFORE_STOP:
            raise TrainingStoppedError(
                f"the gates have collapsed: {complaint}, in {self.num_collapsed} logs in a row; "
                "try another training.quality_loss_type, a smaller training.quality_loss_weight "
                "or a smaller training.learning_rate"
            )


def collapse_of(logs: Mapping[str, float]) -> str | None:
    """The reason why the gates count as collapsed; None where they do not.

    With the contrastive loss, gates that are nearly open have not collapsed as long as margins
    differ, since only the order of the margins counts.
    """
    if "label_loss" in logs:
        spread = logs["margin_spread"]
        if spread < SMALLEST_SPREAD:
            return f"the margins of all rows are {logs['margin_mean']:.3g}, spread {spread:.1g}"
        return None
    layers = [value for name, value in logs.items() if name.startswith("good_probability_layer_")]
    if layers and min(layers) > LARGEST_GOOD:
        return f"every layer keeps everything (mean good-probability above {LARGEST_GOOD})"
    if layers and max(layers) < SMALLEST_GOOD:
        return f"every layer discards everything (mean good-probability below {SMALLEST_GOOD})"
    return None
