"""Kinds of corruption that nothing is trained on: they change only the answer."""

import pytest

from benchmarks.quality_warmups import LEFT_OUT
from benchmarks.unseen_corruptions import UNSEEN_CORRUPTIONS
from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt
from selectmoe.records import Message, Sample

ANSWER = (
    "The harbour was frozen in January. Nobody could leave, so the crews played cards. "
    "By March the ice was thin; two ships tried the channel."
)
QUESTION = "What happened in the winter of that year?"
DONOR = Sample(
    "d", "2", (Message("user", "And bees?"), Message("assistant", "Bees dance. Bees sing."))
)


def worse(kind: str, answer: str = ANSWER) -> str | None:
    sample = Sample("d", "1", (Message("user", QUESTION), Message("assistant", answer)))
    copy = corrupt(sample, kind=kind, seed=0, donors=[DONOR], kinds=UNSEEN_CORRUPTIONS)
    return None if copy is None else copy.messages[-1].content


@pytest.mark.parametrize("kind", UNSEEN_CORRUPTIONS)
def test_a_copy_has_another_answer(kind):
    assert worse(kind).split()
    assert worse(kind).split() != ANSWER.split()


@pytest.mark.parametrize("kind", UNSEEN_CORRUPTIONS)
def test_a_corruption_never_returns_the_answer_itself(kind):
    for answer in ("Seventeen", "B", "- a\n- b", "河水在冬天结冰。"):
        assert worse(kind, answer) != answer


def test_what_each_kind_does():
    assert ANSWER.endswith(worse("missing_start"))
    assert worse("doubled_sentences").count("played cards.") == 2
    assert worse("html_escaped").startswith("&amp;lt;p&amp;gt;The harbour")
    assert worse("all_caps") == ANSWER.upper()
    assert worse("hyphenated").replace("- ", "") == ANSWER
    assert worse("interleaved").startswith("The harbour was frozen in January. Bees")
    assert ANSWER in worse("leaked_prompt")
    assert worse("dropped_stop_words").startswith("harbour frozen January.")
    assert "was not frozen" in worse("negated")
    assert worse("negated", "It is not cold there.") is None


def test_the_warm_up_does_not_know_these_kinds():
    assert not set(UNSEEN_CORRUPTIONS) & set(CORRUPTIONS)


def test_every_kind_of_the_warm_up_is_left_out_once():
    assert sorted(kind for kinds in LEFT_OUT.values() for kind in kinds) == sorted(CORRUPTIONS)
