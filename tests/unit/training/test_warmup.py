"""Warm-up on the embedded selector: only gates move, and they learn the order."""

import pytest
import torch
from transformers import AutoTokenizer

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ConfigError
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Sample
from selectmoe.training.contrastive_pairs import ContrastivePairs
from selectmoe.training.warmup import (
    GateWarmup,
    freeze_all_but_gates,
    row_margins,
    warm_up_gates,
)


@pytest.fixture
def samples():
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return [row for row in rows if row.dataset == "demo"][:48]


@pytest.fixture
def fresh():
    """The embedded selector with gates as they start: it has unlearned everything."""
    model = SelectMoeModel.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    for layer in model.layers:
        model._init_weights(layer.mlp.quality_gate)
    return model


def test_gates_learn_to_tell_gibberish_and_nothing_else_moves(fresh, samples, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    settings = GateWarmup(
        num_steps=30,
        learning_rate=2e-2,
        kinds=("gibberish",),
        max_tokens_per_batch=2_048,
        max_sequence_length=128,
    )
    file = warm_up_gates(fresh, tokenizer, samples, settings=settings, output=tmp_path)
    assert file.name == "full_rank_weights.safetensors"
    moved = {n for n, t in fresh.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {name for name in before if "quality_gate" in name}
    chat = ChatTokenizer(tokenizer, max_sequence_length=128)
    pairs = ContrastivePairs(
        samples, chat, kinds=("gibberish",), max_tokens_per_batch=4_096, seed=9
    )
    batch = next(iter(pairs))
    with torch.no_grad():
        margins = row_margins(fresh.eval(), batch)
    clean, copies = margins.chunk(2)
    assert (clean > copies).float().mean() > 0.9


def test_backward_reaches_every_gate_and_keeps_no_activation_of_the_frozen_model(fresh, samples):
    freeze_all_but_gates(fresh)
    fresh.detach_gates()
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR), max_sequence_length=64)
    pairs = ContrastivePairs(samples, chat, kinds=("truncated",), max_tokens_per_batch=512, seed=0)
    batch = next(iter(pairs))
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        row_margins(fresh, batch).sum().backward()
    gates = [layer.mlp.quality_gate.weight for layer in fresh.layers]
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)
    hidden_sized = [shape for shape in saved if shape and shape[-1] == fresh.config.hidden_size]
    # What a gate needs for its own gradient: its input. The attention and experts save nothing.
    assert len(hidden_sized) <= 2 * len(gates)


def test_the_same_seed_gives_the_same_batches(samples):
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


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="got 'sarcasm'"):
        GateWarmup(kinds=("sarcasm",))
