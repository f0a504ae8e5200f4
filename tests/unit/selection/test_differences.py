"""What is said of selected rows that differ from the scored ones in length or source."""

import statistics

import pytest

from selectmoe.selection.differences import Kept, MedianTokens, differences, median_of_counts


@pytest.mark.parametrize("values", [[3], [1, 2], [5, 5, 9], [1, 1, 2, 8], [4, 4, 4, 7, 9, 9]])
def test_the_median_of_counts_is_that_of_the_values(values):
    counts = {value: values.count(value) for value in values}
    assert median_of_counts(counts) == statistics.median(values)
    assert median_of_counts({}) is None


def test_short_and_long_answers_are_told():
    datasets = {"a": Kept(1_000, 50)}
    [short] = differences(datasets, MedianTokens(scored=42, selected=4))
    assert short == (
        "the selected rows have short answers: the median has 4 tokens, that of all scored rows 42"
    )
    [long] = differences(datasets, MedianTokens(scored=42, selected=64))
    assert "long answers" in long
    for similar in (30, 42, 63):
        assert differences(datasets, MedianTokens(scored=42, selected=similar)) == []
    assert differences(datasets, MedianTokens(scored=None, selected=None)) == []


def test_a_source_that_vanished_or_takes_more_than_three_times_its_share_is_told():
    same = MedianTokens(scored=42, selected=42)
    datasets = {"a": Kept(9_000, 300), "b": Kept(500, 200), "c": Kept(500, 0)}
    assert differences(datasets, same) == [
        "b has 40% of the selected rows and 5% of the scored ones",
        "no row of c is selected; by its share of the scored rows it would have 25",
    ]


def test_what_chance_does_to_small_numbers_is_not_told():
    same = MedianTokens(scored=42, selected=42)
    assert differences({"a": Kept(990, 46), "b": Kept(10, 4)}, same) == []
    assert differences({"a": Kept(980, 50), "b": Kept(20, 0)}, same) == []
