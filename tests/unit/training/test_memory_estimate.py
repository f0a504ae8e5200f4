"""The estimate from config.json, held against what a model really keeps for backward."""

import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    Qwen3Config,
)

from selectmoe.config.finetune import FinetuneTrainingConfig
from selectmoe.config.lora import LoraSettings
from selectmoe.errors import ModelError, NotEnoughMemoryError
from selectmoe.finetune.stage import checkpoint_layers
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.training.lora_targets import add_adapter
from selectmoe.training.memory_estimate import (
    available_memory,
    estimate_memory,
    require_memory,
)
from tests.tiny_target import save_tiny_llama

NUM_ROWS, NUM_TOKENS = 4, 64
LORA = LoraSettings(r=8, lora_alpha=8, lora_dropout=0.1)
SHARED = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(intermediate_size=176, **SHARED),
    "qwen3": Qwen3Config(intermediate_size=176, head_dim=16, num_key_value_heads=2, **SHARED),
    "olmoe": OlmoeConfig(
        intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_key_value_heads=4, **SHARED
    ),
}


def settings(**others):
    return FinetuneTrainingConfig(batch_size=NUM_ROWS, lora=LORA, **others)


def kept_for_backward(model, ids):
    """Bytes of all storages that autograd holds, without the model's own."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_exactly_and_activations_from_below(
    tmp_path, name, gradient_checkpointing
):
    MODELS[name].save_pretrained(tmp_path)
    training = settings(gradient_checkpointing=gradient_checkpointing)
    estimate = estimate_memory(str(tmp_path), training, dtype=torch.float32, max_tokens=NUM_TOKENS)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert estimate.num_parameters == sum(p.numel() for p in model.parameters())
    assert estimate.weights == 4 * estimate.num_parameters
    adapted = add_adapter(model, LORA, model_name=name).train()
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate.num_trained == trained
    if gradient_checkpointing:
        checkpoint_layers(model)
    kept = kept_for_backward(adapted, torch.randint(0, 64, (NUM_ROWS, NUM_TOKENS)))
    if gradient_checkpointing:
        # Kept are the layers' inputs and little else; the estimate has one whole layer besides.
        assert kept < estimate.activations
    else:
        # Never more than there is, or runs that fit would be refused; and most of it. What is
        # left out differs by model: rotary embeddings, norms of heads, routing.
        assert 0.7 * kept < estimate.activations <= kept


def test_what_cannot_fit_is_refused_with_numbers_and_a_remedy(tmp_path):
    folder = str(save_tiny_llama(tmp_path / "llama"))
    training = settings()
    estimate = estimate_memory(folder, training, dtype=torch.float32, max_tokens=64)
    require_memory(estimate, training, available=estimate.total, kind="GPU memory", max_tokens=64)
    with pytest.raises(NotEnoughMemoryError) as refused:
        require_memory(
            estimate, training, available=estimate.total - 1, kind="GPU memory", max_tokens=64
        )
    for part in ("MB of GPU memory", "batch_size=4 of 64 tokens", "lower training.batch_size"):
        assert part in str(refused.value)
    with pytest.raises(NotEnoughMemoryError, match="smaller model"):
        require_memory(estimate, training, available=estimate.weights, kind="memory", max_tokens=64)


def test_no_weight_is_read(tmp_path):
    shutil.copy(EMBEDDED_SELECTOR / "config.json", tmp_path)
    estimate = estimate_memory(
        str(tmp_path), FinetuneTrainingConfig(), dtype=torch.bfloat16, max_tokens=1_024
    )
    assert estimate.num_parameters > 1_000_000
    assert estimate.total > 2 * estimate.num_parameters


def test_workers_of_one_machine_share_its_memory():
    one, what = available_memory("cpu")
    # Other processes take and give memory meanwhile.
    assert available_memory("cpu", num_sharing=4)[0] == pytest.approx(one / 4, rel=0.2)
    assert what == "memory"


def test_what_is_no_causal_language_model_is_refused_in_a_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="not a causal language model") as refused:
        estimate_memory(str(tmp_path), FinetuneTrainingConfig(), dtype=torch.float32, max_tokens=8)
    assert "\n" not in str(refused.value)
