"""Formats a row of metrics.jsonl as a log line; imports no torch."""

from collections.abc import Mapping
from typing import Any

METRICS_NAME = "metrics.jsonl"
LOSS_PARTS = ("lm_loss", "aux_loss", "quality_loss", "label_loss", "ranking_loss")


def metrics_line(row: Mapping[str, Any]) -> str:
    """Of optimizer steps, or of gates that are fitted to features.

    step 40 of 150: loss 0.5123, gradient 0.31, good 0.812 (0.610-0.970), 12,345 tokens/s
    features: 320 of 600 rows with their copies, 1,234 tokens/s
    """
    if "phase" in row:
        return _phase_line(row)
    layers = [v for name, v in row.items() if name.startswith("good_probability_layer_")]
    pieces = [f"step {row['step']:,} of {row['num_steps']:,}: loss {row['loss']:.4f}"]
    pieces += [f"{n.replace('_', ' ')} {row[n]:.4f}" for n in LOSS_PARTS if n in row]
    if "grad_norm" in row:
        pieces.append(f"gradient {row['grad_norm']:.3g}")
    if layers:
        span = f"by layer {min(layers):.3f}-{max(layers):.3f}"
        pieces.append(f"good {row['good_probability']:.3f} ({span})")
    if "pairs_in_order" in row:
        pieces.append(f"pairs in order {row['pairs_in_order']:.0%}")
    if "tokens_per_second" in row:
        pieces.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(pieces)


def _phase_line(row: Mapping[str, Any]) -> str:
    if row["phase"] == "features":
        return (
            f"features: {row['rows']:,} of {row['num_rows']:,} rows with their copies, "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
    if row["phase"] == "layers":
        return (
            f"layers {row['first']} to {row['last']} of {row['num_layers']} chosen: AUROC "
            f"{row['auroc']:.3f} of held-out rows against corrupted copies"
        )
    return f"gates fitted: AUROC {row['held_out_auroc']:.3f} of held-out rows"
