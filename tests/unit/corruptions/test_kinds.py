"""Corrupted copies: deterministic, only of what the assistant says, and never the same again."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt
from selectmoe.corruptions.text_pieces import join_pieces, split_sentences, split_words
from selectmoe.records import Message, Sample

PROSE = (
    "The harbour froze in January. Nobody could leave, so the crews played cards. "
    "By March the ice was thin; two ships tried the channel. Only one came through!\n\n"
    "The other waited for the 14th of April."
)
ANSWERS = {
    "prose": PROSE,
    "one word": "Seventeen",
    "one letter": "B",
    "two words": "Ice cream.",
    "one word again and again": "ha ha ha ha ha ha ha ha ha",
    "one sentence again and again": "It is. It is. It is. It is.",
    "numbers": "3, 14, 159, 2653 and 58979",
    "Arabic digits": "\u0661\u0662 \u0663 \u0664\u0665\u0666 \u0667",
    "list": "- apples\n- pears\n- plums\n- quinces\n",
    "numbered list": "1. Boil the water.\n2. Add the leaves.\n3. Wait for four minutes.",
    "code": "```python\ndef area(r):\n    return 3.14 * r ** 2\n\n\nprint(area(2))\n```",
    "indented code": "    for n in range(9):\n        print(n)\n    done()",
    "Chinese": "河水在冬天结冰。船不能走\uff01春天冰化了。",
    "Thai": "แม่น้ำแข็งในฤดูหนาว",
    "Arabic": "تجمد النهر في الشتاء. لم تغادر أي سفينة؟ بلى.",
    "Hindi": "नदी जम गई। कोई जहाज नहीं गया। फिर वसंत आया।",
    "Cyrillic": "Река замёрзла. Корабли ждали. Весной лёд растаял.",
    "emoji": "😀🚀 👨\u200d👩\u200d👧 🇩🇪 🧊 🚢",
    "signs": "... --- ... !!! ??? *** /// +++",
    "accents and quotes": "“Café” \u2013 a naïve façade… isn\u2019t it so, dear Zoë?",
    "white space around": "\n\n   The ice broke,\tat last.   Then they sailed. All of them. \n",
    "invisible": "a\u200bb \u00a0 c\ufeff d\u2028e \0 f",
    "long word": "x" * 5_000,
}
DONORS = [
    Sample(
        "d",
        f"donor-{n}",
        (Message("user", f"What happened on day {n}?"), Message("assistant", answer)),
    )
    for n, answer in enumerate(
        (
            "Bees dance to tell Karl where the flowers are. The angle is that to the sun.",
            "Copper. It conducts better than iron does, says Faraday.",
            "No.",
            "A sonnet of Shakespeare has fourteen lines. Its last two often turn the thought.",
            " \n",
            *(f"On day {n} we saw {n} seals, {n} gulls and no ship at all. " * 3 for n in range(9)),
        )
    )
]


def sample_of(
    answer: str, *, question: str = "What happened in the winter of that year?"
) -> Sample:
    return Sample("d", "1", (Message("user", question), Message("assistant", answer)), "f:1")


def two_turns(first: str, second: str) -> Sample:
    """Answers of two questions in one conversation."""
    roles = ("user", "assistant", "user", "assistant")
    texts = ("What happened in the winter?", first, "And on the day after it?", second)
    return Sample("d", "2", tuple(map(Message, roles, texts)), "f:2")


def copies(kind: str, answer: str, *, num_seeds: int = 12) -> list[str]:
    """The worse answers that `num_seeds` seeds give."""
    sample = sample_of(answer)
    made = [corrupt(sample, kind=kind, seed=n, donors=DONORS) for n in range(num_seeds)]
    return [copy.messages[-1].content for copy in made if copy is not None]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_copy_says_something_else_and_something_at_all(kind):
    for name, answer in ANSWERS.items():
        for worse in copies(kind, answer):
            assert worse.split(), name
            assert worse.split() != answer.split(), name  # other white space makes nothing worse
            worse.encode()


# What needs no chance at all, or chooses among few: scripts, donors, sentences.
FEWEST_WAYS = {
    "echoed_question": 1,
    "similar_answer": 1,
    "shortened": 2,
    "wrong_script": 3,
    "swapped_names": 3,
    "other_answer": 5,
    "wrong_conclusion": 5,
    "preamble": 8,
    "refusal": 12,
}


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"other_turn"}))
def test_every_kind_makes_prose_worse_in_many_ways(kind):
    made = copies(kind, PROSE, num_seeds=40)
    assert len(made) == 40
    assert len(set(made)) >= FEWEST_WAYS.get(kind, 15)


def answers_of(sample: Sample) -> list[str]:
    return [message.content for message in sample.messages if message.role == "assistant"]


def test_another_turn_comes_from_the_same_conversation():
    sample = two_turns(PROSE, "The ice broke.")
    copy = corrupt(sample, kind="other_turn", seed=0, donors=DONORS)
    assert answers_of(copy) == ["The ice broke.", PROSE]
    assert corrupt(sample_of(PROSE), kind="other_turn", seed=0, donors=DONORS) is None


def test_a_similar_answer_is_that_of_the_question_with_most_words_in_common():
    questions = ("How is bread baked?", "How do bakers bake sourdough bread?", "Who was Ada?")
    donors = [replace(sample_of(f"Answer {n}.", question=q), sample_id=f"{n}")
              for n, q in enumerate(questions, start=7)]  # fmt: skip
    sample = sample_of("With flour.", question="Which flour do bakers use for sourdough bread?")
    copy = corrupt(sample, kind="similar_answer", seed=0, donors=donors)
    assert answers_of(copy) == ["Answer 8."]
    unlike = sample_of("With flour.", question="Where?")
    assert corrupt(unlike, kind="similar_answer", seed=0, donors=donors) is None


def test_a_shortened_answer_is_its_own_beginning_and_ends_with_a_sentence():
    for worse in copies("shortened", PROSE):
        assert PROSE.startswith(worse)
        assert worse.endswith(".")
        assert len(worse) < len(PROSE)


def test_a_wrong_conclusion_keeps_all_but_the_last_sentence():
    kept, _, last = PROSE.rpartition("\n\n")
    for worse in copies("wrong_conclusion", PROSE):
        assert worse.startswith(kept)
        assert last not in worse


def test_a_rambling_answer_says_all_that_it_had_to_say_first():
    for worse in copies("rambling", PROSE):
        assert worse.startswith(PROSE)
        assert len(worse) > len(PROSE)


def test_a_swapped_name_is_the_same_one_wherever_the_name_stood():
    answer = "It was Ada who wrote it. So Ada is the author, not Babbage."
    for worse in copies("swapped_names", answer):
        name = worse.split()[2]
        assert name != "Ada"
        assert worse.split()[7] == name
        assert "Babbage" not in worse


def test_chance_does_not_leave_a_short_answer_as_it_was():
    for kind in ("typos", "gibberish"):
        assert len(copies(kind, "Copernicus", num_seeds=40)) == 40
    for kind in ("shuffled_words", "dropped_words", "markup_noise"):
        # One of the 24 orders of four words is their own.
        assert len(copies(kind, "Not before this autumn", num_seeds=200)) == 200
    assert len(copies("mojibake", "Not before he", num_seeds=40)) == 40


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_only_assistant_turns_change(kind):
    sample = Sample(
        "cot",
        "7",
        (
            Message("system", PROSE),
            Message("user", PROSE + " What happened?"),
            Message("assistant", PROSE + " It was 1843."),
            Message("user", "And what happened in the 2 years after it?"),
            Message("assistant", PROSE + " It was 1845."),
        ),
        "f:7",
    )
    copy = corrupt(sample, kind=kind, seed=0, donors=DONORS)
    assert (copy.dataset, copy.sample_id, copy.source) == ("cot", f"7#{kind}", "f:7")
    changed = [a != b for a, b in zip(sample.messages, copy.messages, strict=True)]
    assert changed == [False, False, True, False, True]
    assert [m.role for m in copy.messages] == [m.role for m in sample.messages]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_order_of_the_donors_does_not_matter_and_the_seed_and_the_sample_do(kind):
    sample = two_turns(PROSE[::-1], PROSE)
    first, turned = (
        [answers_of(corrupt(sample, kind=kind, seed=n, donors=donors)) for n in range(4)]
        for donors in (DONORS, DONORS[::-1])
    )
    assert turned == first
    if kind in ("shuffled_words", "gibberish", "typos", "mojibake"):
        assert len(set(map(tuple, first))) == 4
        other = corrupt(replace(sample, sample_id="3"), kind=kind, seed=0, donors=DONORS)
        assert answers_of(other) != first[0]


def digest_of_all_copies() -> str:
    made = [
        copies(kind, answer, num_seeds=3) for kind in CORRUPTIONS for answer in ANSWERS.values()
    ]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def test_copies_are_the_same_in_every_process():
    """Python gives strings another hash in every process, and sets of them another order."""
    digests = {digest_of_all_copies()}
    for hash_seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", f"import runpy; print(runpy.run_path({__file__!r})"
             "['digest_of_all_copies']())"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip
        digests.add(process.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize("split", [split_words, split_sentences])
def test_words_and_sentences_joined_are_the_text(split):
    for answer in ANSWERS.values():
        assert join_pieces(*split(answer)) == answer.lstrip()


def test_sentences_end_where_readers_end_them():
    assert split_sentences(PROSE)[0][1:3] == [
        "Nobody could leave, so the crews played cards.",
        "By March the ice was thin; two ships tried the channel.",
    ]
    assert [len(split_sentences(ANSWERS[name])[0]) for name in ("Chinese", "Hindi", "Arabic")] == [
        3
    ] * 3
    assert split_sentences('He said "No." Pi is 3.14...\nYes')[0] == [
        'He said "No."',
        "Pi is 3.14...",
        "Yes",
    ]


def layout(text: str) -> str:
    return re.sub(r"\S+", "x", text)


@pytest.mark.parametrize("kind", ["shuffled_words", "gibberish", "typos", "wrong_numbers"])
@pytest.mark.parametrize("name", ["prose", "numbered list", "code"])
def test_lines_stay_where_they_were(kind, name):
    for worse in copies(kind, ANSWERS[name]):
        assert layout(worse) == layout(ANSWERS[name])


def test_shuffled_words_are_the_same_words():
    for name in ("prose", "Chinese", "Arabic", "code"):
        for worse in copies("shuffled_words", ANSWERS[name]):
            assert Counter(split_words(worse)[0]) == Counter(split_words(ANSWERS[name])[0])


def test_shuffled_sentences_are_the_same_sentences():
    for worse in copies("shuffled_sentences", PROSE):
        assert sorted(split_sentences(worse)[0]) == sorted(split_sentences(PROSE)[0])


@pytest.mark.parametrize("name", ["list", "numbered list", "code", "indented code"])
def test_the_lines_of_lists_and_code_are_no_sentences_to_shuffle(name):
    assert copies("shuffled_sentences", ANSWERS[name]) == []


def test_dropped_words_are_about_a_third():
    words = split_words(PROSE)[0]
    for worse in copies("dropped_words", PROSE):
        left = Counter(split_words(worse)[0])
        assert left <= Counter(words)
        assert left.total() == len(words) - round(0.3 * len(words))


def test_a_truncated_answer_is_its_beginning_and_stops_in_the_middle():
    made = copies("truncated", PROSE, num_seeds=60)
    for worse in made:
        assert PROSE.startswith(worse)
        assert 0.1 < len(worse) / len(PROSE) < 0.6
        assert worse[-1] not in ".!?"
    inside = sum(PROSE[len(worse)].isalpha() for worse in made)
    assert 10 < inside < 50  # about half of them stop inside a word


def test_a_repeated_phrase_takes_the_place_of_the_rest():
    for worse in copies("repeated", PROSE):
        assert re.search(r"(.{6,}?)\1\1", worse + " ", re.DOTALL)
        assert worse[:5] == PROSE[:5]


def test_another_answer_is_one_of_another_question():
    twin = replace(
        DONORS[0], sample_id="twin", messages=(sample_of("").messages[0], DONORS[0].messages[1])
    )
    answers = {donor.messages[1].content for donor in DONORS[1:]} - {" \n"}
    for seed in range(20):
        donors = [twin, *DONORS[1:], sample_of(PROSE), replace(sample_of(PROSE), sample_id="2")]
        copy = corrupt(sample_of(PROSE), kind="other_answer", seed=seed, donors=donors)
        assert copy.messages[1].content in answers
    assert corrupt(sample_of(PROSE), kind="other_answer", seed=0, donors=[twin]) is None
    assert corrupt(sample_of(PROSE), kind="other_answer", seed=0, donors=[]) is None


def test_mixed_answers_keep_half_of_their_sentences():
    sentences = set(split_sentences(PROSE)[0])
    foreign = {s for donor in DONORS for s in split_sentences(donor.messages[1].content)[0]}
    for worse in copies("mixed_answers", PROSE):
        made = split_sentences(worse)[0]
        assert set(made) <= sentences | foreign
        assert sum(sentence in sentences for sentence in made) == 3  # of six, or of five
    assert corrupt(sample_of(PROSE), kind="mixed_answers", seed=0, donors=[]) is None


def test_wrong_numbers_have_as_many_digits_and_none_in_its_place():
    for name in ("numbers", "Arabic digits"):
        answer = ANSWERS[name]
        for worse in copies("wrong_numbers", answer):
            for before, after in zip(answer, worse, strict=True):
                assert before.isdecimal() == after.isdecimal()
                assert (before != after) == before.isdecimal()
                assert before.isascii() == after.isascii()
    assert copies("wrong_numbers", "No number here.") == []


def test_a_wrong_script_leaves_no_latin_letter_and_needs_some():
    for worse in copies("wrong_script", PROSE):
        assert not re.search("[a-zA-Z]", worse)
        assert "14" in worse
    assert copies("wrong_script", ANSWERS["Cyrillic"]) == []


def test_damaged_encoding_can_be_repaired_beyond_ascii():
    damaged = copies("mojibake", ANSWERS["Cyrillic"], num_seeds=1)[0]
    # Some bytes have no letter in Windows-1252; what is left of the text proves the rest.
    repaired = damaged.encode("cp1252", "ignore").decode("utf-8", "ignore")
    assert "\u0435" in repaired
    assert any("\u00c3" in worse or "\u00e2" in worse for worse in copies("mojibake", PROSE))


def test_typos_touch_some_long_words_by_a_letter():
    words = PROSE.split()
    for worse in copies("typos", PROSE):
        pairs = [(a, b) for a, b in zip(words, worse.split(), strict=True) if a != b]
        assert 2 <= len(pairs) <= 7
        for before, after in pairs:
            assert len(before) >= 4
            assert before[0] == after[0]
            more, fewer = (Counter(word) for word in sorted((before, after), key=len, reverse=True))
            assert (more - fewer).total() <= 1  # none where two letters changed places


def test_an_echo_needs_a_question():
    text = Sample("d", "1", (Message("assistant", PROSE),))
    assert corrupt(text, kind="echoed_question", seed=0, donors=DONORS) is None
    [echo] = set(copies("echoed_question", PROSE))
    assert echo == sample_of("").messages[0].content


def test_a_run_on_answer_has_no_capitals_and_no_punctuation():
    for worse in copies("run_on", PROSE):
        assert re.fullmatch(r"[a-z0-9 ]+", worse)


def test_markup_stands_between_the_words():
    for worse in copies("markup_noise", PROSE):
        left = Counter(worse.split())
        assert Counter(PROSE.split()) - left == Counter()
        assert left.total() > len(PROSE.split())


@pytest.mark.parametrize("kind", ["shuffled_words", "truncated", "other_turn"])
def test_an_answer_that_is_not_trained_on_stays_as_it_is(kind):
    untrained = Message("assistant", PROSE, '{"weight": 0}')
    trained = Message("assistant", f"And then: {PROSE}", '{"thinking": "Hm."}')
    question = Message("user", "What happened?")
    sample = Sample("d", "1", (question, untrained, question, trained))
    copy = corrupt(sample, kind=kind, seed=0, donors=[])
    assert copy.messages[1] == untrained
    assert copy.messages[3].content != trained.content
    assert copy.messages[3].fields == trained.fields
    alone = replace(sample, messages=(question, untrained))
    assert corrupt(alone, kind=kind, seed=0, donors=[]) is None
