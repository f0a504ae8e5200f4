"""report.html of finished runs: its numbers are the manifest's, and texts stay texts."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from selectmoe.config.selection import DatasetConfig, SelectConfig
from selectmoe.errors import ConfigError, DataError, SelectMoeError
from selectmoe.records import Message, RejectedRow, Sample
from selectmoe.report.selection_report import write_report
from selectmoe.report.token_scores import token_scorer
from tests.calibrations import raw_calibration
from tests.selection_run import finished_run, sample

NUM_ROWS = 60


class Page(HTMLParser):
    """What a browser reads: elements, their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def scores(num_rows: int = NUM_ROWS) -> list[float]:
    return [(number + 1) / (num_rows + 1) for number in range(num_rows)]


def samples(num_rows: int = NUM_ROWS, **facts) -> list[Sample]:
    return [sample(number, "word " * (number + 1), **facts) for number in range(num_rows)]


def report_of(run) -> str:
    return write_report(run.root, open_scorer=None).file.read_text("utf-8")


def cells(report: str, key: str) -> list[list[str]]:
    """The rows of the table beneath a chart."""
    figure = report.split(f'<figure id="{key}">')[1].split("</figure>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", figure, flags=re.S)[1:]
    return [
        [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in rows
    ]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_tables_have_the_numbers_of_the_manifest(tmp_path):
    run = finished_run(tmp_path, samples(), scores())
    report = report_of(run)
    assert "12 of 60 rows kept" in report
    assert "The best 20 % of the corpus by gate score: 12 of 60 scored rows are kept" in report
    by_score = cells(report, "scores")
    assert sum(number(row[1]) for row in by_score) == 48
    assert sum(number(row[2]) for row in by_score) == 12
    # The threshold is an edge between two bars: none holds dropped and kept rows.
    assert not any(number(row[1]) and number(row[2]) for row in by_score)
    assert cells(report, "sources") == [["corpus", "60", "12", "100 %", "100 %"]]
    lengths = cells(report, "lengths")
    assert sum(number(row[1]) for row in lengths) == 60
    assert lengths[-1][0] == "33 to 64"
    assert lengths[-1][2] == "12"
    assert cells(report, "turns") == [["1", "60", "12", "100 %", "100 %"]]


def test_every_chart_has_marks_and_a_table_and_the_file_asks_for_nothing(tmp_path):
    report = report_of(finished_run(tmp_path, samples(), scores()))
    page = Page(report)
    assert page.count("svg") == page.count("figure") == 6
    for figure in report.split("<figure")[1:]:
        drawn = figure.split("</svg>")[0]
        assert drawn.count("<path") + drawn.count("<use") > 5
        assert "<table>" in figure
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", figure)  # the stand-ins of matplotlib
    ids = [facts["id"] for _, facts in page.elements if "id" in facts]
    assert len(ids) == len(set(ids))
    assert page.count("script") == 0
    links = [v for _, facts in page.elements for k, v in facts.items() if k in ("href", "src")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "default-src 'none'" in report


def test_text_of_a_corpus_is_never_read_as_html(tmp_path):
    attack = '<script>alert(1)</script><img src=x onerror="alert(2)">\x00\x1b[2J {{ 7 * 7 }} $x$'
    rows = [
        Sample(
            f"{attack}-{number % 2}",
            f"{attack}-{number}",
            (Message("user", attack), Message("assistant", attack)),
            f"{attack}:1",
        )
        for number in range(12)
    ]
    rejected = [RejectedRow(f"{attack}.jsonl", 3, attack, attack, "invalid_json", attack)]
    run = finished_run(tmp_path, [*rows, *rejected], scores(12))
    report = report_of(run)
    page = Page(report)
    assert page.count("script") == 0
    assert page.count("img") == 0
    assert "<script>alert(1)</script>" in "".join(page.texts)
    assert "{{ 7 * 7 }}" in "".join(page.texts)
    assert "\x00" not in report
    assert "\x1b" not in report
    assert "␀␛[2J" in report


def test_a_row_of_any_size_in_any_script_leaves_the_report_small(tmp_path):
    texts = [
        "x" * 100_000,
        "كلمة " * 20_000,
        "\u202e reversed " * 10_000,
        "<&>" * 30_000,
        "漢字かな交じり文" * 12_000,
    ]
    rows = [sample(number, texts[number % 5] + f" {number}") for number in range(50)]
    run = finished_run(tmp_path, rows, scores(50))
    report = write_report(run.root, open_scorer=None)
    assert report.file.stat().st_size < 2_000_000
    text = report.file.read_text("utf-8")
    assert "more characters" in text
    assert "characters at the end are not in the report" in text
    scripts = {row[0] for row in cells(text, "scripts")}
    assert {"Latin", "Arabic", "Japanese"} <= scripts


def test_rejected_rows_are_counted_by_reason_with_the_first_of_them(tmp_path):
    rejected = [
        RejectedRow("part-1.jsonl", line, "corpus", "", "invalid_json", f"line {line} is not JSON")
        for line in range(1, 8)
    ]
    rejected.append(RejectedRow("part-2.jsonl", 9, "corpus", "x", "unknown_role", "role 'bot'"))
    report = report_of(finished_run(tmp_path, [*samples(), *rejected], scores()))
    assert "rejected/rejected.jsonl" in report
    section = report.split('id="rejected"')[1].split("</section>")[0]
    assert re.search(r"invalid_json</th><td>7</td>", section)
    assert section.index("invalid_json") < section.index("unknown_role")
    assert "part-1.jsonl:1: line 1 is not JSON" in section
    assert "part-1.jsonl:4" not in section


def test_a_run_without_rejected_rows_says_so(tmp_path):
    report = report_of(finished_run(tmp_path, samples(), scores()))
    assert "<p>None.</p>" in report.split('id="rejected"')[1].split("</section>")[0]


def test_a_run_of_one_row_has_a_report(tmp_path):
    report = report_of(finished_run(tmp_path, samples(1), [0.5]))
    assert "1 of 1 rows kept" in report
    assert report.count("<article>") == 1


def test_rows_that_all_have_one_score_have_a_report(tmp_path):
    report = report_of(finished_run(tmp_path, samples(), [0.5] * NUM_ROWS))
    kept = [number(row[2]) for row in cells(report, "scores")]
    assert sum(kept) == 12


def test_thresholds_of_several_datasets_are_named_as_a_range(tmp_path):
    rows = [*samples(30, dataset="a"), *[sample(n, "b", dataset="b") for n in range(30, 60)]]
    config = SelectConfig(selection_percentage=0.1, per_dataset=True)
    run = finished_run(tmp_path, rows, scores(), config=config)
    report = report_of(run)
    assert "of each of 2 datasets by gate score: 6 of 60" in report
    assert "from scores 0.4590 to 0.9508 upwards" in report
    assert cells(report, "sources") == [
        ["a", "30", "3", "50 %", "50 %"],
        ["b", "30", "3", "50 %", "50 %"],
    ]
    above = report.split('id="last_kept"')[1].split("<h3")[0]
    assert above.count("<article>") == 0 or "0.4590" in above


def test_percentiles_are_those_of_the_calibration_of_the_run(tmp_path):
    warm_up = raw_calibration(np.linspace(0.0, 0.5, 200))
    report = report_of(finished_run(tmp_path, samples(), scores(), calibration=warm_up))
    assert "percentile 100.0 of 200 rows of the warm-up corpus" in report


def test_examples_are_the_best_the_worst_and_those_at_the_threshold(tmp_path):
    report = report_of(finished_run(tmp_path, samples(200), scores(200), config=SelectConfig()))
    found = {}
    for key in ("best", "last_kept", "first_dropped", "worst", "random_kept"):
        part = report.split(f'<h3 id="{key}">')
        text = part[1].split("<h3 id=")[0].split("</section>")[0] if len(part) > 1 else ""
        found[key] = [int(n) for n in re.findall(r"id <bdi>row-(\d+)</bdi>", text)]
    assert found["best"] == [*range(199, 189, -1)]
    assert found["first_dropped"] == [*range(189, 179, -1)]
    assert found["worst"] == [*range(10)]
    # Ten rows are kept: they are shown among the best, and no row twice.
    assert found["last_kept"] == found["random_kept"] == []


def test_signals_beside_the_score_have_figures_of_their_own(tmp_path):
    signals = {"pmi": [-score for score in scores()], "unknown": [float("nan")] * NUM_ROWS}
    report = report_of(finished_run(tmp_path, samples(), scores(), signals=signals))
    assert "Score against pmi" in report
    assert "Rank correlation (Spearman): \N{MINUS SIGN}1.00." in report
    assert "Score against unknown" not in report


def test_rows_on_which_a_signal_and_the_score_disagree_are_examples(tmp_path):
    pmi = [-score for score in scores(200)]  # agrees in the other direction, as a loss does
    pmi[100], pmi[101] = -1.0, 0.0
    run = finished_run(tmp_path, samples(200), scores(200), signals={"pmi": pmi})
    report = report_of(run)
    part = report.split('<h3 id="disagreements">')[1].split("</section>")[0]
    first = re.findall(r"id <bdi>row-(\d+)</bdi>", part)[:2]
    assert sorted(first) == ["100", "101"]
    assert "disagreements" not in report_of(finished_run(tmp_path / "2", samples(), scores()))


def test_a_selection_from_stored_scores_has_the_texts_of_the_scored_run(tmp_path):
    run = finished_run(tmp_path / "scored", samples(), scores())
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads(run.manifest.read_text("utf-8"))
    manifest["config"]["scored"] = str(run.root)
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "selected_data.jsonl").write_bytes(run.selected_data.read_bytes())
    report = write_report(other, open_scorer=None)
    assert report.file == other / "report.html"
    assert "question 59" in report.file.read_text("utf-8")


def test_a_folder_that_is_no_finished_selection_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="a report needs a finished run"):
        write_report(tmp_path, open_scorer=None)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not the manifest of a selection"):
        write_report(tmp_path, open_scorer=None)


def test_a_run_whose_corpus_was_deleted_is_refused_in_one_line(tmp_path):
    run = finished_run(tmp_path, samples(), scores())
    for shard in run.corpus_shards():
        shard.unlink()
    with pytest.raises(DataError, match="needs the folders corpus and scored"):
        write_report(run.root, open_scorer=None)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'selectmoe[report]'")):
        write_report(finished_run(tmp_path, samples(), scores()).root, open_scorer=None)
    assert not (tmp_path / "report.html").exists()


def test_a_model_that_is_not_at_hand_leaves_texts_and_the_reason(tmp_path):
    def open_scorer(manifest):
        raise ConfigError(f"no model of {len(manifest['datasets'])} dataset")

    run = finished_run(tmp_path, samples(), scores())
    report = write_report(run.root, open_scorer=open_scorer).file.read_text("utf-8")
    assert "Without scores of tokens: no model of 1 dataset." in report
    assert "question 59" in report


def test_tokens_have_no_scores_where_the_weights_have_changed_or_the_model_is_elsewhere(tmp_path):
    run = finished_run(tmp_path, samples(), scores())
    manifest = run.read_manifest()
    with pytest.raises(SelectMoeError, match=r"the weights have changed since the run: .* abc…"):
        token_scorer(manifest, on_gpu=False)
    manifest["config"]["via"] = "serve"
    with pytest.raises(SelectMoeError, match="a Ray Serve deployment gives a run no token scores"):
        token_scorer(manifest, on_gpu=False)
    large = tmp_path / "large"
    large.mkdir()
    with (large / "model.safetensors").open("wb") as file:
        file.truncate(1_500_000_000)  # a sparse file: takes no space, and is not read
    manifest["config"] |= {"via": "actors", "model": str(large)}
    with pytest.raises(SelectMoeError, match=r"has 1\.5 GB of weights, which takes minutes"):
        token_scorer(manifest, on_gpu=False)


def test_the_size_of_shards_changes_nothing_that_is_shown(tmp_path):
    shown = []
    for size in (7, 512):
        config = SelectConfig(selection_percentage=0.2, rows_per_shard=size)
        # Four rows each have one score: ties are broken by row key.
        tied = [number // 4 / 20 for number in range(NUM_ROWS)]
        report = report_of(finished_run(tmp_path / str(size), samples(), tied, config=config))
        shown.append(report.split("<main>")[1].split('id="configuration"')[0])
    assert shown[0] == shown[1]


def test_exact_duplicates_are_counted_and_the_first_of_them_named(tmp_path):
    copies = [Sample("copies", f"copy-{row.sample_id}", row.messages) for row in samples(12)]
    run = finished_run(tmp_path, [*samples(), *copies], [*scores(), *scores(12)])
    report = report_of(run)
    section = report.split('id="duplicates"')[1].split("</section>")[0]
    assert "12 rows have exactly the text of another row" in section
    assert section.count('<th scope="row">') == 10
    assert 'id="duplicates"' not in report_of(finished_run(tmp_path / "2", samples(), scores()))


def test_a_corpus_of_thousands_of_paths_leaves_the_report_short(tmp_path):
    paths = tuple(f"/data/corpus/part-{number:05}.jsonl" for number in range(20_000))
    config = SelectConfig(selection_percentage=0.2, dataset=DatasetConfig(paths=paths))
    report = report_of(finished_run(tmp_path, samples(), scores(), config=config))
    assert "selectmoe select --pct 0.2 --data CORPUS<" in report
    assert "CORPUS stands for the 20,000 paths" in report
    assert "and 19,980 more paths" in report
    assert len(report) < 400_000
