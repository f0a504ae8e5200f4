"""report.html of a real selection, opened in Chromium: wide, narrow, light, dark and printed."""

import json
import re

import numpy as np
import pytest

import selectmoe
from selectmoe.cli import report_command, select_command
from selectmoe.config.selection import SelectConfig
from serve.settings import ServeSettings
from tests.local_server import LocalScorers, local_server

pytestmark = pytest.mark.timeout(180)

ATTACK = '<script>document.title = "run"</script><img src="http://example.com/x.png">'
NUM_ROWS = 60


def corpus_rows():
    """Short and long rows in several scripts; the first ones are hostile or huge."""
    answers = [
        ATTACK,
        "x" * 100_000,
        "هذا جواب قصير عن سؤال بسيط.",
        "Das Licht streut an Molekülen, das blaue mehr als das rote.",
    ]
    for number in range(NUM_ROWS):
        answer = (
            answers[number] if number < len(answers) else f"Water boils at {number} degrees. " * 3
        )
        yield {
            "id": f"row-{number}",
            "dataset": "facts" if number % 3 else "<b>odd</b>",
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": answer},
            ],
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command in this process, with a row that is rejected."""
    folder = tmp_path_factory.mktemp("selection")
    lines = [json.dumps(row, ensure_ascii=False) for row in corpus_rows()]
    (folder / "corpus.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n", "utf-8")
    arguments = ["--data", str(folder / "corpus.jsonl"), "--output", str(folder / "run")]
    select_command.main([*arguments, "--pct", "0.2", "--max-rejected", "0.5", "num_actors=1"])
    return folder / "run"


def tokens(report):
    """Score and text of each token that is colored."""
    return re.findall(r"<i class=h\d title=([\d.]+)>(.*?)</i>", report, flags=re.S)


def test_a_server_gives_the_same_tokens_and_scores(run, tmp_path):
    settings = ServeSettings()
    output = tmp_path / "asked"
    with local_server(settings, LocalScorers(settings)) as server:
        arguments = ["--data", str(run.parent / "corpus.jsonl"), "--output", str(output)]
        arguments += ["--pct", "0.2", "--max-rejected", "0.5", "--via", server.url]
        select_command.main(arguments)
    own, asked = ((folder / "report.html").read_text("utf-8") for folder in (run, output))
    assert "Without scores of tokens" not in asked
    ours, theirs = tokens(own), tokens(asked)
    assert [text for _, text in theirs] == [text for _, text in ours]
    scores = [[float(score) for score, _ in shown] for shown in (theirs, ours)]
    # Other batch mates change the last digits of float32, and so the third decimal that is shown.
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=2e-3)


@pytest.fixture
def open_page(browser, run):
    """Opens the report, and lets no request leave the page."""
    opened, requests, problems = [], [], []

    def open_at(width, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(f"file://{run}/report.html")
        opened.append(page)
        return page

    yield open_at
    for page in opened:
        page.close()
    assert all(url.startswith(("file://", "data:")) for url in requests)
    assert problems == []


def test_a_selection_ends_with_a_report_whose_tokens_have_scores(run):
    report = (run / "report.html").read_text("utf-8")
    assert len(report) < 3_000_000
    assert "12 of 60 rows kept" in report
    assert "Without scores of tokens" not in report
    assert "invalid_json" in report
    engine = selectmoe.ScoringEngine.from_pretrained()
    best = max(
        map(json.loads, (run / "selected_data.jsonl").read_text("utf-8").splitlines()),
        key=lambda row: row["score"],
    )
    sample = selectmoe.Sample(
        best["dataset"], best["id"], tuple(selectmoe.Message(**m) for m in best["messages"])
    )
    [tokenized] = engine.tokenizer.tokenize([sample])
    [scored] = engine.score_each_token([tokenized])
    expected = scored.token_scores[tokenized.answer_mask]
    first = report.split('<h3 id="best">')[1].split("</article>")[0]
    shown = [float(text) for text in re.findall(r"<i class=h\d title=([\d.]+)>", first)]
    # Three decimals are shown; batch mates may change the last digits of float32.
    assert len(shown) <= len(expected)
    np.testing.assert_allclose(shown, expected[: len(shown)], rtol=0, atol=6e-4)


def test_report_of_an_old_run_is_written_again_with_the_same_content(run, capsys):
    def content():
        return re.sub(r"Made in [\d.]+ s", "", (run / "report.html").read_text("utf-8"))

    before = content()
    (run / "report.html").unlink()
    report_command.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert content() == before


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1200, "dark")])
def test_axe_finds_no_accessibility_problem(open_page, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Tables and folded texts too.
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []


def test_text_of_the_corpus_stays_text(open_page):
    page = open_page(1200)
    assert page.title() == "12 of 60 rows kept | Select-MoE"
    assert page.locator("script, img, iframe, b").count() == 0
    assert page.get_by_text('document.title = "run"').count() >= 1


def test_charts_are_drawn_in_the_colors_of_the_scheme(open_page):
    seen = set()
    for scheme in ("light", "dark"):
        page = open_page(360, scheme)
        boxes = [chart.bounding_box() for chart in page.locator("svg.chart").all()]
        assert len(boxes) == 6
        assert all(box["width"] > 280 and box["height"] > 60 for box in boxes)
        seen.add(page.evaluate("getComputedStyle(document.querySelector('#scores text')).fill"))
    assert len(seen) == 2


def test_tables_and_folded_texts_open_by_keyboard(open_page):
    page = open_page(360)
    summary = page.locator("#scores summary")
    summary.focus()
    table = page.locator("#scores table")
    assert not table.is_visible()
    page.keyboard.press("Enter")
    assert table.is_visible()
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_the_page_prints_with_folded_texts_and_light_colors(open_page):
    page = open_page(1200, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    folded = page.locator("article details .text").first
    assert folded.bounding_box()["height"] > 100
    assert len(page.pdf()) > 50_000


def test_report_none_writes_no_report(run, tmp_path):
    scored = ["--scored", str(run), "--output", str(tmp_path / "again"), "--pct", "0.1"]
    select_command.main([*scored, "max_rejected=0.5", "report=none"])
    assert (tmp_path / "again" / "manifest.json").is_file()
    assert not (tmp_path / "again" / "report.html").exists()


def test_the_command_in_the_report_gives_the_same_settings(run):
    page = (run / "report.html").read_text("utf-8")
    command = re.search(r"<pre tabindex=\"0\">selectmoe select (.*?)</pre>", page)[1].split()
    again = select_command.parse([*command, f"output={run}"], prog="selectmoe select")
    config = json.loads((run / "manifest.json").read_text("utf-8"))["config"]
    assert isinstance(again, SelectConfig)
    assert (again.selection_percentage, again.max_rejected) == (0.2, 0.5)
    assert list(again.dataset.paths) == config["dataset.paths"]
