"""A tokenizer with tokens that the model does not embed is refused in one line by every stage."""

import json

import pytest

from selectmoe.config.finetune import FinetuneConfig, FinetuneDatasetConfig
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import ModelError
from selectmoe.finetune.supervised_data import load_target_tokenizer, prepare_supervised_rows
from selectmoe.model.checkpoint import require_select_moe
from selectmoe.model.vocabulary import require_embedded
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.warmup.rows import warmup_tokenizer
from tests.tiny_olmoe import tiny_tokenizer
from tests.tiny_select_moe import tiny_model

REFUSAL = r"token ids up to \d+, .* vocab_size of \d+: .* no embedding for '<one>', '<two>'; resize"


@pytest.fixture(scope="module")
def selector(tmp_path_factory):
    """A selector whose tokenizer got two tokens after the model was trained."""
    folder = tmp_path_factory.mktemp("selector")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_before_stages_1_and_2_read_their_corpus(selector):
    with pytest.raises(ModelError, match=REFUSAL):
        require_select_moe(selector)


def test_by_the_scoring_engine(selector):
    with pytest.raises(ModelError, match=REFUSAL):
        ScoringEngine.from_pretrained(selector)


def test_by_the_tokenizer_of_stage_1(selector):
    with pytest.raises(ModelError, match=REFUSAL):
        warmup_tokenizer(WarmupConfig(model=selector))


def test_by_stage_3_before_ray_starts(selector, tmp_path):
    dataset = FinetuneDatasetConfig(chat_template="selectmoe")
    config = FinetuneConfig(model=selector, dataset=dataset)
    with pytest.raises(ModelError, match=REFUSAL):
        prepare_supervised_rows(config, load_target_tokenizer(config), tmp_path)


def test_a_padding_token_alone_may_lie_beyond_the_embeddings():
    tokens = {"a": 0, "b": 1, "<pad>": 2}
    require_embedded("m", tokens, vocab_size=2, pad_token="<pad>")
    require_embedded("m", tokens, vocab_size=3)
    with pytest.raises(ModelError, match=r"^m: its tokenizer has token ids up to 2, .* '<pad>'; "):
        require_embedded("m", tokens, vocab_size=2)


@pytest.mark.parametrize("pad_token", ["<pad>", {"content": "<pad>"}])
def test_unigram_vocabularies_and_stored_padding_tokens_are_read(tmp_path, pad_token):
    (tmp_path / "config.json").write_text('{"model_type": "select_moe", "vocab_size": 2}')
    tokenizer = {
        "model": {"vocab": [["a", -1.0], ["b", -2.0]]},
        "added_tokens": [{"id": 2, "content": "<pad>"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="no embedding for '<pad>'"):
        require_select_moe(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad_token}))
    require_select_moe(str(tmp_path))
