"""The first tokens of a long text are those of the whole text, for every kind of tokenizer."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, PreTokenizer, Sequence, Split
from tokenizers.processors import ByteLevel as TrimOffsets

from selectmoe.data.first_tokens import FirstTokens
from selectmoe.data.tokenizer_rules import _GPT2_PATTERNS, _LLAMA_3_PATTERNS, read_rules
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR

TEXTS = DEMO_CORPUS.read_text("utf-8").splitlines()[:150]
ODD = [
    "it's, we've -- they'll 'tis ''' don't",
    "12,345.67 890123456789",
    "   \n\n \t  x  \r\n y",
    "中文\uff0c字符。中文字",
    "é e\u0301 ﬁ Å \u212b",
    "😀❤️👩\u200d👩\u200d👧",
    "====-----====",
    "aaaaaaaabbbbabab" * 4,
]
SPECIAL = [AddedToken("<|user|>", special=True), AddedToken("<s>", special=True)]


def byte_level(*steps, normalizer=None, ignore_merges=False, added=()):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = Sequence([*steps]) if len(steps) > 1 else steps[0]
    tokenizer.post_processor = TrimOffsets(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS + ODD * 20, trainer)
    tokenizer.add_tokens([*SPECIAL, *added])
    return tokenizer


def split(pattern):
    return Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)


def sentence_piece(*, has_metaspace):
    """BPE with byte fallback: as Llama 2 (over the whole text) or as Mistral (by words)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = Metaspace()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1_000, special_tokens=["<unk>", *names], limit_alphabet=90, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if not has_metaspace:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_tokens(SPECIAL)
    return without_special_bytes(tokenizer)


def without_special_bytes(tokenizer):
    """The same tokenizer with <0x00> … in its vocabulary only, as published ones have them."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(content))


GPT2, *_ = sorted(_GPT2_PATTERNS)
LLAMA_3 = {name: next(p for p in sorted(_LLAMA_3_PATTERNS) if name in p and "(?i" in p)
           for name in (r"\p{N}{1,3}|", r"\p{N}| ")}  # fmt: skip
SPACES = [AddedToken(" " * n, normalized=True) for n in (2, 4, 8)]
KINDS = {
    "embedded": lambda: Tokenizer.from_file(str(EMBEDDED_SELECTOR / "tokenizer.json")),
    "gpt-2": lambda: byte_level(ByteLevel(add_prefix_space=False)),
    "gpt-neox": lambda: byte_level(
        ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC(), added=SPACES
    ),
    "starcoder": lambda: byte_level(Digits(individual_digits=True), ByteLevel()),
    "gpt-2 by split": lambda: byte_level(*split(GPT2)),
    "llama-3": lambda: byte_level(*split(LLAMA_3[r"\p{N}{1,3}|"]), ignore_merges=True),
    "cl100k": lambda: byte_level(*split(LLAMA_3[r"\p{N}{1,3}|"])),
    "qwen": lambda: byte_level(*split(LLAMA_3[r"\p{N}| "]), normalizer=normalizers.NFC()),
    "llama-2": lambda: sentence_piece(has_metaspace=False),
    "mistral": lambda: sentence_piece(has_metaspace=True),
}


@pytest.fixture(scope="module", params=KINDS)
def first_tokens(request):
    return FirstTokens(KINDS[request.param]())


PIECES = st.one_of(
    st.sampled_from([*ODD, *TEXTS[:20], "<|user|>", "<s>", "'", "'ll", "\0", "\u00a0", "\u180e"]),
    st.text(max_size=12),
    st.text(alphabet=" \t\n\r'", max_size=12),
    st.text(alphabet="aeb -=71中é\u0301", max_size=12),
)
REPEATED = st.tuples(PIECES, st.integers(1, 60)).map(lambda pair: pair[0] * pair[1])
LONG_TEXTS = st.lists(REPEATED, min_size=1, max_size=12).map("".join)


def assert_first_tokens_are_exact(first_tokens, text, num_tokens):
    [first] = first_tokens.encode_each([text], num_tokens)
    whole = first_tokens.tokenizer.encode(text, add_special_tokens=False)
    assert first.ids[:num_tokens] == whole.ids[:num_tokens]
    assert first.offsets[:num_tokens] == whole.offsets[:num_tokens]
    assert (len(first) > num_tokens) == (len(whole) > num_tokens)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(text=LONG_TEXTS, num_tokens=st.integers(1, 40))
@example(text="a" * 33 + "  \n" * 40 + "b", num_tokens=5)
@example(text="'r" * 9 + "'re" * 60, num_tokens=2)
@example(text="x" + " " * 100 + "\n" + " " * 30 + "y", num_tokens=3)
@example(text="-" * 300, num_tokens=7)
def test_first_tokens_are_those_of_the_whole_text(first_tokens, text, num_tokens):
    assert_first_tokens_are_exact(first_tokens, text, num_tokens)


def test_a_kind_that_is_known_is_cut(first_tokens):
    text = "It's a plain sentence, of some words. " * 2_000
    [first] = first_tokens.encode_each([text], 50)
    assert 50 < len(first) < 1_000
    assert_first_tokens_are_exact(first_tokens, text, 50)
    short = "A short one."
    together = first_tokens.encode_each([short, text, short], 50)
    assert [len(entry) for entry in together][1] == len(first)
    assert together[0].ids == together[2].ids == first_tokens.tokenizer.encode(short).ids


LONG = 1_000_000
RUNS = {
    "digits": "7" * LONG,
    "letters": "a" * LONG,
    "white space": "x" + " " * LONG,
    "line breaks": "\n" * LONG,
    "dashes": "-" * LONG,
    "apostrophes": "'" * LONG,
    "words": "word " * (LONG // 5),
    "Chinese": "中文。" * (LONG // 3),
    "emoji": "😀" * LONG,
    "zero-width": "\u200d" * LONG,
    "NUL": "\0" * LONG,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_long_run_of_anything_costs_the_embedded_selector_as_much_as_its_beginning(name):
    first_tokens = FirstTokens(KINDS["embedded"]())
    [first] = first_tokens.encode_each([RUNS[name]], 1_024)
    assert 1_024 < len(first) < 50_000
    beginning = RUNS[name][:100_000]
    whole = first_tokens.tokenizer.encode(beginning, add_special_tokens=False)
    assert first.ids[:1_024] == whole.ids[:1_024]


def written_in_python():
    tokenizer = byte_level(ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = PreTokenizer.custom(ByLines())
    return tokenizer


class ByLines:
    def pre_tokenize(self, text):
        text.split(lambda _, part: part.split("\n", "removed"))


def rejected_kinds():
    byte_pieces = ByteLevel(add_prefix_space=False)
    right_to_left = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\P{N}+"
    return {
        "unknown pattern": byte_level(*split(right_to_left)),
        "lower case": byte_level(byte_pieces, normalizer=normalizers.Lowercase()),
        "strip": byte_level(byte_pieces, normalizer=normalizers.Strip()),
        "whole words": byte_level(byte_pieces, added=[AddedToken("blue", single_word=True)]),
        "a part in Python": written_in_python(),
        "word pieces": Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        "word ends": Tokenizer(models.BPE(end_of_word_suffix="</w>")),
        "unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
    }


def test_other_kinds_are_tokenized_as_a_whole():
    for name, tokenizer in rejected_kinds().items():
        assert read_rules(tokenizer) is None, name
        if name == "unknown pattern":
            assert_first_tokens_are_exact(FirstTokens(tokenizer), "12345678" * 200 + "1", 5)
