"""Models of known sizes and rows of realistic lengths for bench_scoring.py."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.held_out_rows import read_samples
from selectmoe.data.chat import ChatTokenizer
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.quiet_loading import load_model
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Sample, TokenizedSample

OLMOE_1B_7B: dict[str, Any] = {
    "vocab_size": 50_304, "hidden_size": 2_048, "intermediate_size": 1_024,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "max_position_embeddings": 4_096, "pad_token_id": 1,
}  # fmt: skip
SHAPES = ("embedded", "tiny", "olmoe-1b-7b")
MAX_SEQUENCE_LENGTH = 1_024
USABLE_FRACTION = 0.9  # of the free memory; the rest is for activations


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model and rows of one run."""

    model: SelectMoeForCausalLM  # float32, on the device
    tokenizer: PreTrainedTokenizerBase
    samples: list[Sample]
    rows: list[TokenizedSample]


def load_subject(shape: str, *, data: str, num_rows: int, device: str, model: Path) -> Subject:
    """embedded: the weights of `model`. tiny: random weights of the same size. olmoe-1b-7b: random
    weights, and random token ids in rows as long as those of the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR if shape != "embedded" else model)
    samples = read_samples([data])[:num_rows]
    rows = ChatTokenizer(tokenizer, max_sequence_length=MAX_SEQUENCE_LENGTH).tokenize(samples)
    if shape == "embedded":
        loaded: Any = load_model(SelectMoeForCausalLM, model, dtype=torch.float32)
        loaded = loaded.to(device).eval()
        return Subject(model=loaded, tokenizer=tokenizer, samples=samples, rows=rows)
    config = SelectMoeConfig(**OLMOE_1B_7B)
    if shape == "tiny":
        config = SelectMoeConfig.from_pretrained(EMBEDDED_SELECTOR)
    else:
        generator = np.random.default_rng(0)
        rows = [
            replace(row, token_ids=generator.integers(2, config.vocab_size, len(row.token_ids)))
            for row in rows
        ]
    require_memory(shape, config, device)
    torch.manual_seed(0)
    with torch.device(device):
        random_model = SelectMoeForCausalLM(config).eval()
    return Subject(model=random_model, tokenizer=tokenizer, samples=samples, rows=rows)


def require_memory(shape: str, config: SelectMoeConfig, device: str) -> None:
    """For float32 weights: the reference scores are computed before a conversion to bfloat16."""
    with torch.device("meta"):
        num_bytes = 4 * sum(p.numel() for p in SelectMoeForCausalLM(config).parameters())
    free = free_bytes(device)
    if num_bytes > USABLE_FRACTION * free:
        raise SystemExit(
            f"error: --shape {shape} needs {num_bytes / 1e9:.1f} GB for float32 weights, "
            f"{device} has {free / 1e9:.1f} GB free"
        )


def free_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts reclaimable caches as free
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1_024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def flop_per_token(config: SelectMoeConfig, lengths: list[int]) -> float:
    """FLOP of scoring one token; a multiply-add counts as two.

    Each of L layers: projections 2 H (2 H + 2 V), with V = H * key heads / heads; router and gate
    2 H (E + 2); attention 4 H per attended token. Each layer except the last: experts 6 K H I.
    OLMoE-1B-7B: 2.05 GFLOP without attention.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    values = hidden * (config.num_key_value_heads or heads) // heads
    attended = sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)
    each = 2 * hidden * (2 * hidden + 2 * values + config.num_experts + 2) + 4 * hidden * attended
    experts = 6 * config.num_experts_per_tok * hidden * config.intermediate_size
    return layers * each + (layers - 1) * experts


def product_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product, the best of ten."""
    size = 8_192 if device != "cpu" else 1_024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
