"""How nested results are formatted."""

from benchmarks.result_text import as_text


def test_numbers_are_lines_and_groups_of_groups_are_tables():
    result = {
        "command": "python a.py",
        "num_rows": 1_200,
        "seconds": [0.5, 12_345.678912],
        "differences": {"naive": 0.0, "engine": 1.78e-07},
        "implementations": {
            "naive": {"tokens": 6_017, "exact": True},
            "engine": {"tokens": 32_416, "exact": False},
            "none": {"tokens": None},
        },
    }
    assert as_text(result).splitlines() == [
        "command   python a.py",
        "num rows  1,200",
        "seconds   0.5, 12,345.6789",
        "differences:",
        "  naive   0.0",
        "  engine  1.8e-07",
        "implementations:",
        "          tokens  exact",
        "  naive    6,017    yes",
        "  engine  32,416     no",
        "  none         -",
    ]


def test_the_longer_side_of_a_table_becomes_its_rows():
    parts = {"seconds": 1, "peak": {"driver": 2, "all": 3}}
    assert as_text({"sizes": {"5": parts, "10": {"failure": "killed"}}}).splitlines() == [
        "sizes:",
        "                5      10",
        "  seconds       1",
        "  peak: driver  2",
        "  peak: all     3",
        "  failure          killed",
    ]


def test_an_empty_group_is_a_line():
    assert as_text({"found": {}}) == "found:"


def test_a_list_of_groups_is_a_table_by_number():
    runs = [{"start": 1.5, "end": 2}, {"start": 1.25, "end": 3}]
    assert as_text({"seconds_until": runs}).splitlines() == [
        "seconds until:",
        "     start  end",
        "  1    1.5    2",
        "  2   1.25    3",
    ]
