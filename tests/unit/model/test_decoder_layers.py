"""Where the gates of any base sit: the decoder layers and their feed-forward modules."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from selectmoe.errors import ModelError
from selectmoe.model.decoder_layers import decoder_layers
from tests.tiny_bases import FAMILIES, tiny_base


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_are_found_with_and_without_head(family):
    model = tiny_base(family)
    for form in (model, model.model):
        found = decoder_layers(form)
        assert found.decoder is model.model
        assert found.layers is model.model.layers
        assert (len(found), found.hidden_size, found.feed_forward_name) == (4, 32, "mlp")
        assert found.feed_forward(3) is model.model.layers[3].mlp


def test_layers_of_an_older_model_are_found_by_their_number():
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=32))
    assert decoder_layers(model).layers is model.transformer.h


def test_a_model_whose_layers_have_no_feed_forward_module_is_refused_with_what_was_found():
    config = OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, ffn_dim=16, num_attention_heads=2,
        word_embed_proj_dim=16,
    )  # fmt: skip
    message = r"layer 0 of OPTForCausalLM \(OPTDecoderLayer\) has none; its modules are 'self_attn'"
    with pytest.raises(ModelError, match=message):
        decoder_layers(OPTForCausalLM(config))


def test_a_model_with_two_feed_forward_modules_a_layer_is_refused():
    model = tiny_base()
    for layer in model.model.layers:
        layer.feed_forward = nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"layer 0 of Llama.* has 'mlp', 'feed_forward'"):
        decoder_layers(model)


def test_a_model_with_an_encoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match="is an encoder and a decoder"):
        decoder_layers(model)


def test_a_model_whose_layers_are_not_one_list_is_refused_with_the_lists_it_has():
    model = tiny_base()
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"one list of 5 decoder layers .* layers with 4"):
        decoder_layers(model)


def test_anything_else_is_refused():
    with pytest.raises(ModelError, match="language model of transformers, got Linear"):
        decoder_layers(nn.Linear(2, 2))
