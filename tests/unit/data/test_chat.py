"""Chat templates and answer masks, on the tokenizer of the embedded selector."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from selectmoe.data.chat import ChatTokenizer
from selectmoe.errors import DataError
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample

TEMPLATES = {
    "its own": None,
    "trimming, system folded into the user's turn": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{% set s = m['content'] %}"
        "<<{{ s }}>>{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
    ),
    "alternation enforced": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    ),
}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)


def conversation(*turns: str) -> Sample:
    roles = ("user", "assistant") * len(turns)
    return Sample("d", "1", tuple(Message(r, t) for r, t in zip(roles, turns, strict=False)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_covers_exactly_the_assistant_turns_and_the_token_after_each(tokenizer, name):
    if TEMPLATES[name]:
        tokenizer.chat_template = TEMPLATES[name]
    chat = ChatTokenizer(tokenizer, max_sequence_length=512)
    sample = conversation("What is user?", "user is a word.", "And assistant?", "Another — ü.")
    [tokens] = chat.tokenize([sample])
    text, spans = chat.render(sample.messages)
    assert [text[start:end] for start, end in spans] == ["user is a word.", "Another — ü."]
    answer = tokenizer.decode(tokens.token_ids[tokens.answer_mask])
    for turn in ("user is a word.", "Another — ü."):
        assert turn in answer
    assert "What" not in answer
    assert "And assistant?" not in answer


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_what_the_template_gives_for_the_contents_themselves(tokenizer, name):
    if TEMPLATES[name]:
        tokenizer.chat_template = TEMPLATES[name]
    chat = ChatTokenizer(tokenizer, max_sequence_length=512)
    sample = conversation(" Why? ", "Because.\n", "Sure?", "Yes.")
    expected = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in sample.messages], tokenize=False
    )
    assert chat.render(sample.messages)[0] == expected


def test_a_tokenizer_without_a_template_gets_ours(tokenizer):
    tokenizer.chat_template = None
    chat = ChatTokenizer(tokenizer, max_sequence_length=512)
    text, _ = chat.render(conversation("Why?", "Because.").messages)
    assert text == "<|user|>\nWhy?\n<|assistant|>\nBecause.<|endoftext|>\n"


def test_ours_begins_as_the_tokenizer_begins_every_text(tokenizer):
    tokenizer.chat_template = None
    tokenizer.bos_token = tokenizer.eos_token
    begins_with = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[begins_with]
    )
    chat = ChatTokenizer(tokenizer, max_sequence_length=64)
    sample = Sample("x", "1", (Message("user", "why?"), Message("assistant", "so")))
    token_ids = chat.tokenize([sample])[0].token_ids
    # What stage 4 reads is then what stage 3 has trained on, and begins so once.
    assert token_ids[0] == tokenizer.eos_token_id
    assert token_ids[1] != tokenizer.eos_token_id


def test_a_refusing_template_is_a_data_error_with_the_roles(tokenizer):
    tokenizer.chat_template = TEMPLATES["alternation enforced"]
    chat = ChatTokenizer(tokenizer, max_sequence_length=512)
    sample = Sample("d", "1", (Message("assistant", "Hello."),))
    with pytest.raises(DataError, match=r"refuses the roles assistant.*must alternate"):
        chat.tokenize([sample])


def test_a_refused_sample_leaves_its_neighbours_alone(tokenizer):
    tokenizer.chat_template = TEMPLATES["alternation enforced"]
    chat = ChatTokenizer(tokenizer, max_sequence_length=512)
    refused = Sample("d", "refused", (Message("assistant", "Hello."),))
    samples = [conversation("A?", "B."), conversation("C?", "D.")]
    first, reason, second = chat.tokenize_each([samples[0], refused, samples[1]])
    assert (reason.sample_id, reason.reason) == ("refused", "chat_template")
    assert "must alternate" in reason.detail
    for each, together in zip((first, second), chat.tokenize(samples), strict=True):
        assert each.token_ids.tolist() == together.token_ids.tolist()
        assert each.answer_mask.tolist() == together.answer_mask.tolist()
    assert chat.tokenize_each([]) == []


def test_a_long_sample_is_truncated_and_marked(tokenizer):
    chat = ChatTokenizer(tokenizer, max_sequence_length=16)
    long, short = chat.tokenize(
        [conversation("Count.", "one two three " * 50), conversation("A?", "B.")]
    )
    assert (len(long.token_ids), long.truncated) == (16, True)
    assert not short.truncated


@pytest.mark.parametrize("filter_", ["", "| trim", ".lstrip()", ".rstrip()"])
def test_a_template_may_strip_white_space_on_any_side(tokenizer, filter_):
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content']"
        + filter_
        + " }}"
        "{% endfor %}"
    )
    chat = ChatTokenizer(tokenizer, max_sequence_length=100)
    messages = (Message("user", " why? \n"), Message("assistant", "\n because "))
    text, spans = chat.render(messages)
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    assert text == tokenizer.apply_chat_template(conversation, tokenize=False)
    [(start, end)] = spans
    assert text[start:end].strip() == "because"


@pytest.mark.parametrize("content", ["message['content'] | upper", "message['content'] | tojson"])
def test_a_template_that_changes_what_is_said_is_refused(tokenizer, content):
    tokenizer.chat_template = "{% for message in messages %}{{ " + content + " }}{% endfor %}"
    chat = ChatTokenizer(tokenizer, max_sequence_length=100)
    with pytest.raises(DataError, match="changes the contents of messages"):
        chat.render((Message("user", "why?"), Message("assistant", "because")))


def test_a_template_that_fails_is_a_reason_and_no_stack_trace(tokenizer):
    tokenizer.chat_template = "{{ 1 // 0 }}"
    chat = ChatTokenizer(tokenizer, max_sequence_length=100)
    with pytest.raises(DataError, match="chat template refuses the roles user, assistant"):
        chat.render((Message("user", "why?"), Message("assistant", "because")))


@pytest.mark.parametrize("limit", [4, 1_000])
def test_texts_of_tokens_are_those_of_the_tokenized_sample(tokenizer, limit):
    chat = ChatTokenizer(tokenizer, max_sequence_length=limit)
    sample = conversation("Why is grass green?", "Because of 葉緑素, mostly.")
    [tokenized] = chat.tokenize([sample])
    tokens = chat.token_texts(sample)
    assert [token.is_answer for token in tokens] == tokenized.answer_mask.tolist()
    text = chat.render(sample.messages)[0]
    assert [token.text for token in tokens] == [text[token.start : token.end] for token in tokens]
    if limit > len(tokens):
        assert tokens[-1].end == len(text)


def test_only_the_last_answer_counts_with_turns_last(tokenizer):
    chat = ChatTokenizer(tokenizer, max_sequence_length=512, turns="last")
    sample = conversation("One?", "First answer.", "Two?", "Second answer.")
    [tokens] = chat.tokenize([sample])
    assert tokenizer.decode(tokens.token_ids[tokens.answer_mask]).startswith("Second answer.")
    marked = [token.text for token in chat.token_texts(sample) if token.is_answer]
    assert "".join(marked).startswith("Second answer.")


def test_of_a_truncated_conversation_the_last_answer_that_is_left_counts(tokenizer):
    sample = conversation("One?", "First answer.", "Two? " * 40, "Second answer.")
    whole = ChatTokenizer(tokenizer, max_sequence_length=512)
    [tokens] = whole.tokenize([sample])
    first_end = int(np.flatnonzero(np.diff(tokens.answer_mask.astype(int)) < 0)[0])
    chat = ChatTokenizer(tokenizer, max_sequence_length=first_end + 5, turns="last")
    [cut] = chat.tokenize([sample])
    assert cut.truncated
    assert cut.answer_mask.sum() == tokens.answer_mask[: first_end + 1].sum()
