"""An adapter on its base computes what it computed when it was saved, whatever its vocabulary."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import ModelError
from selectmoe.evaluation.target_model import load_target
from tests.tiny_olmoe import tiny_tokenizer
from tests.tiny_target import LLAMA, save_tiny_llama

# PEFT asks transformers by a name that it has given up, and says that it saves embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers."),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*tied"),
]
ATTENTION = ["q_proj", "v_proj"]
OLD, NEW = LLAMA["vocab_size"], LLAMA["vocab_size"] + 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def tokenizer_with(*added, pad=None):
    """The tiny tokenizer, filled up to the model's vocabulary, and `added` beyond it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<filler {n}>" for n in range(OLD - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def save_adapter(base, folder, settings, *, size=None, tokenizer=None, **saving):
    """A random adapter on `base`, whose vocabulary is resized first; returns its model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    if size is not None:
        model.resize_token_embeddings(size, mean_resizing=False)
    adapted = get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, **saving)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return adapted.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def load(base, adapter):
    return load_target(EvaluateConfig(model=str(base), adapter=str(adapter)), device="cpu")


def lora(**settings):
    settings = {"target_modules": ATTENTION} | settings
    return LoraConfig(r=4, task_type="CAUSAL_LM", **settings)


RESIZED = {
    "attention": lora(),
    "both trained whole": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "head trained whole": lora(modules_to_save=["lm_head"]),
    "embeddings trained whole": lora(modules_to_save=["embed_tokens"]),
    "both targeted": lora(target_modules=[*ATTENTION, "embed_tokens", "lm_head"]),
    "all linear": lora(target_modules="all-linear"),
    "token indices": lora(trainable_token_indices=[5, OLD, OLD + 1]),
    "dora": lora(use_dora=True),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", RESIZED)
def test_an_adapter_with_a_resized_vocabulary_computes_what_it_did_when_it_was_saved(
    request, tmp_path, kind, tied
):
    base = request.getfixturevalue("tied_llama" if tied else "llama")
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>")
    saved = save_adapter(base, tmp_path, RESIZED[kind], size=NEW, tokenizer=tokenizer)
    model, loaded_tokenizer = load(base, tmp_path)
    ids = [3, 7, OLD, OLD + 1, 5]
    torch.testing.assert_close(logits(model, ids), logits(saved, ids), rtol=0, atol=0)
    assert loaded_tokenizer("<|im_end|>")["input_ids"] == [OLD + 1]


OTHERS = {
    "embeddings saved beside it": (lora(), {"save_embedding_layers": True}),
    "ia3": (
        IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        {},
    ),
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), {}),
    "token indices": (lora(trainable_token_indices=[5, 6]), {}),
    "bias": (lora(bias="lora_only"), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_with_the_vocabulary_of_its_base_computes_what_it_did(llama, tmp_path, kind):
    settings, saving = OTHERS[kind]
    saved = save_adapter(llama, tmp_path, settings, **saving)
    model, _ = load(llama, tmp_path)
    ids = [3, 7, 5]
    torch.testing.assert_close(logits(model, ids), logits(saved, ids), rtol=0, atol=0)


def test_a_vocabulary_padded_to_a_multiple_is_resized_to_the_saved_embeddings(llama, tmp_path):
    save_adapter(llama, tmp_path, lora(), size=OLD + 64, tokenizer=tokenizer_with("<new>"))
    model, tokenizer = load(llama, tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == OLD + 64
    assert len(tokenizer) == OLD + 1


def test_other_architectures_name_their_embeddings_otherwise(tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=OLD, n_embd=32, n_layer=2, n_head=4)).save_pretrained(
        base
    )
    tiny_tokenizer().save_pretrained(base)
    adapter = tmp_path / "adapter"
    saved = save_adapter(
        base, adapter, lora(target_modules=["c_attn"], fan_in_fan_out=True), size=NEW
    )
    model, _ = load(base, adapter)
    torch.testing.assert_close(logits(model, [OLD + 2]), logits(saved, [OLD + 2]), rtol=0, atol=0)


def test_the_tokenizer_of_the_base_is_used_where_the_adapter_has_none(llama, tmp_path):
    save_adapter(llama, tmp_path, lora())
    _, tokenizer = load(llama, tmp_path)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_pad_token_beyond_the_embeddings_is_replaced(llama, tmp_path):
    save_adapter(llama, tmp_path, lora(), tokenizer=tokenizer_with(pad="[PAD]"))
    _, tokenizer = load(llama, tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_an_adapter_whose_new_embeddings_were_not_saved_is_refused(llama, tmp_path):
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>")
    save_adapter(
        llama, tmp_path, lora(), size=NEW, tokenizer=tokenizer, save_embedding_layers=False
    )
    with pytest.raises(ModelError, match=r"no embedding for '<\|im_start\|>', .* save_embedding_l"):
        load(llama, tmp_path)


def test_an_adapter_without_the_resized_head_is_refused(llama, tmp_path):
    settings = lora(target_modules=[*ATTENTION, "embed_tokens"])
    save_adapter(llama, tmp_path, settings, size=NEW)
    with pytest.raises(ModelError, match=r"was resized to 323 tokens, and .* for lm_head; save it"):
        load(llama, tmp_path)


def test_an_adapter_of_another_model_is_refused_by_name(llama, tmp_path):
    other = save_tiny_llama(tmp_path / "other", num_hidden_layers=3)
    save_adapter(other, tmp_path / "adapter", lora(), save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"is an adapter of another model \(its base is '.*other'"):
        load(llama, tmp_path / "adapter")


def test_an_adapter_that_does_not_fit_the_base_that_it_names_is_not_called_anothers(
    llama, tmp_path
):
    save_adapter(llama, tmp_path, lora())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"r": 2}), "utf-8")
    with pytest.raises(
        ModelError, match=r"does not fit .*llama.*, which it names as its base: siz"
    ):
        load(llama, tmp_path)


def test_a_model_without_embeddings_for_its_tokenizer_is_refused(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    tokenizer_with("<|im_start|>").save_pretrained(base)
    with pytest.raises(ModelError, match=r"no embedding for '<\|im_start\|>'; resize the model"):
        load_target(EvaluateConfig(model=str(base)), device="cpu")
