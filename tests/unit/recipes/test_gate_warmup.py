"""The warm-up in one process, and the batches of pairs that train the tiny base."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from recipes.contrastive_pairs import ContrastivePairs
from recipes.gate_warmup import GateWarmup, warm_up_gates
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.readers import read_corpus
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Sample
from selectmoe.warmup.gate_model import renew_gates


@pytest.fixture(scope="module")
def samples():
    """48 clean rows of the demo corpus."""
    rows = read_corpus(str(DEMO_CORPUS))
    return [row for row in rows if isinstance(row, Sample) and row.dataset == "demo"][:48]


def test_gates_learn_to_detect_gibberish_and_no_other_weight_changes(samples, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    fresh = SelectMoeModel.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    renew_gates(fresh, seed=0)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    settings = GateWarmup(
        num_steps=30, batch_size=8, learning_rate=2e-2, kinds=("gibberish",),
        max_tokens_per_batch=2_048, max_sequence_length=128,
    )  # fmt: skip
    file = warm_up_gates(fresh, tokenizer, samples, settings=settings, output=tmp_path)
    assert file.name == "full_rank_weights.safetensors"
    moved = {n for n, t in fresh.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {name for name in before if "quality_gate" in name}
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["pairs_in_order"] > 0.9


def test_the_same_seed_gives_the_same_pairs(samples):
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR), max_sequence_length=64)
    first, second = (
        next(
            iter(
                ContrastivePairs(samples, chat, kinds=("run_on",), max_tokens_per_batch=512, seed=s)
            )
        )
        for s in (3, 3)
    )
    assert torch.equal(first["input_ids"], second["input_ids"])
