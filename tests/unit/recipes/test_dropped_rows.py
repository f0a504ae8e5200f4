"""What a selection run dropped, as `make demo-real` prints it."""

import selectmoe
from recipes.dropped_rows import main


def test_the_rows_with_the_lowest_scores_are_printed_with_their_texts(tmp_path, capsys):
    rows = [
        {"dataset": "made", "id": str(number), "prompt": f"What is {number}?", "response": answer}
        for number, answer in enumerate(["It is a number that follows another one.", "a b a b"] * 5)
    ]
    selection = selectmoe.select(rows, pct=0.2, output=tmp_path / "run")
    assert len(selection.rows) == 2
    main([str(tmp_path / "run"), "--num-rows", "3"])
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("made")]
    assert line.split() == ["made", "10", "2", "2"]
    assert printed.count("assistant: ") == 3
