"""A selector on any base: one score alone, in a batch, in a selection and over HTTP."""

import json
import logging

import numpy as np
import pytest

from selectmoe import select
from selectmoe.cli.main import run
from selectmoe.client import ScoreClient
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ConfigError, ModelError
from selectmoe.model.base_weights import hash_base
from selectmoe.model.gguf_file import load_gguf
from selectmoe.model.selector_files import find_selector
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Sample
from selectmoe.scoring.calibration import save_calibration, stored_calibration
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.warmup.calibration import calibrate_on
from serve.settings import ServeSettings
from tests.local_server import LocalScorers, local_server
from tests.made_gates import save_selector
from tests.tiny_bases import FAMILIES, save_tiny_base
from tests.tiny_gguf import tiny_llama, write_gguf

TOLERANCE = 1e-5  # float32; looser would hide a mask that leaks


@pytest.fixture(scope="module")
def samples():
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return rows[::40]


@pytest.fixture(scope="module")
def selector(tmp_path_factory, samples):
    """Random gates on a random Llama, with a calibration."""
    folder = tmp_path_factory.mktemp("selectors")
    base = save_tiny_base(folder / "base", max_position_embeddings=512)
    selector = save_selector(folder / "tiny-gates", base)
    engine = ScoringEngine.from_pretrained(selector, device="cpu", calibration=None)
    save_calibration(selector, calibrate_on(engine, samples))
    return selector


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, samples):
    """Every 40th row of the demo corpus, as a file."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = DEMO_CORPUS.read_text("utf-8").splitlines(keepends=True)[::40]
    file.write_text("".join(lines), "utf-8")
    return file


def scores(engine, samples):
    return np.array([scored.score for scored in engine.score(samples)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_on_any_base_does_not_depend_on_batch_mates_or_place(family, samples, tmp_path):
    base = save_tiny_base(tmp_path / "base", family, max_position_embeddings=512)
    selector = save_selector(tmp_path / "gates", base)
    engine = ScoringEngine.from_pretrained(selector, device="cpu", length="raw")
    few = samples[:12]
    together = scores(engine, few)
    assert together.std() > 100 * TOLERANCE
    alone = np.concatenate([scores(engine, [sample]) for sample in few])
    np.testing.assert_allclose(alone, together, rtol=0, atol=TOLERANCE)
    backwards = scores(engine, few[::-1])[::-1]
    np.testing.assert_allclose(backwards, together, rtol=0, atol=TOLERANCE)


def test_an_engine_describes_the_gates_of_a_base(selector):
    engine = ScoringEngine.from_pretrained(selector, device="cpu", max_sequence_length=100_000)
    assert engine.num_layers == 2
    assert engine.packed is None
    assert engine.device_and_dtype == ("cpu", "float32")
    assert engine.tokenizer.max_sequence_length == 512
    assert engine.length == "adjusted"
    assert engine.weights_hash() == find_selector(str(selector)).weights_hash()


def test_packed_batches_are_refused_for_gates_on_a_base(selector):
    with pytest.raises(ConfigError, match="row_layout must be padded for gates on a base"):
        ScoringEngine.from_pretrained(selector, device="cpu", row_layout="packed")


def test_the_packages_chat_template_is_used_and_said_where_a_tokenizer_has_none(
    samples, tmp_path, caplog
):
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=512)
    (base / "chat_template.jinja").unlink()
    selector = save_selector(tmp_path / "gates", base)
    with caplog.at_level(logging.WARNING):
        engine = ScoringEngine.from_pretrained(selector, device="cpu", length="raw")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{base}: its tokenizer has no chat template; the package's is used"]
    assert len(scores(engine, samples[:2])) == 2


def test_gates_for_another_base_are_refused_before_the_base_is_loaded(selector, tmp_path):
    other = save_tiny_base(tmp_path / "other", "qwen3")
    with pytest.raises(ModelError, match=r"model_type is llama of .*, and qwen3 of"):
        ScoringEngine.from_pretrained(other, model_checkpoint_path=selector)


def test_a_calibration_applies_to_every_form_of_the_base_that_the_gates_accept(
    selector, tmp_path, samples
):
    other = save_tiny_base(tmp_path / "other", initializer_range=0.19)
    form = save_selector(
        tmp_path / "form",
        selector.parent / "base",
        base=str(other),
        other_base_sha256={hash_base(other): "another form"},
    )
    engine = ScoringEngine.from_pretrained(selector.parent / "base", model_checkpoint_path=form)
    save_calibration(form, calibrate_on(engine, samples))
    files = find_selector(str(form))
    files.require_readable()
    assert stored_calibration(files).weights_hash == files.weights_hash()
    assert ScoringEngine.from_pretrained(form).length == "adjusted"


def test_a_selection_an_engine_and_a_server_give_the_same_scores(
    selector, corpus, samples, tmp_path
):
    engine = ScoringEngine.from_pretrained(selector, device="cpu")
    expected = dict(zip([s.sample_id for s in samples], scores(engine, samples), strict=True))

    selection = select(corpus, pct=1.0, model=selector)
    selected = {row["id"]: row["score"] for row in selection.rows}
    assert selected == pytest.approx(expected, abs=1e-6)
    scoring = selection.manifest["scoring"]
    assert scoring["weights_sha256"] == engine.weights_hash()
    assert scoring["length"] == "adjusted"

    settings = ServeSettings(model=str(selector))
    scorers = LocalScorers(settings)
    with local_server(settings, scorers) as server, ScoreClient(server.url) as client:
        results = client.score_many(samples)
        info = client.info()
    served = {s.sample_id: result.score for s, result in zip(samples, results, strict=True)}
    assert served == pytest.approx(expected, abs=1e-6)
    assert info.weights_hash == engine.weights_hash()
    assert info.model == "tiny-gates"


def test_the_commands_take_a_selector_folder_and_a_base_with_gates(
    selector, corpus, samples, tmp_path, capsys
):
    base = selector.parent / "base"
    forms = ([f"--model={selector}"], [f"--model={base}", f"--model-checkpoint-path={selector}"])
    found = []
    for form in forms:
        run(["score", *form, "--data", str(corpus)])
        found.append([json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()])
        run(["info", *form, "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert (facts["base"], facts["gates"]) == (str(base), str(selector))
        assert facts["gated_layers"] == "1, 2"
        assert facts["calibration"].startswith(f"{len(samples)} samples")
    assert found[0] == found[1]
    assert len(found[0]) == len(samples)


def test_a_base_without_gates_is_refused_before_anything_is_written(selector, corpus, tmp_path):
    base = selector.parent / "base"
    output = tmp_path / "run"
    with pytest.raises(ModelError, match=r"jobs/pretrain.py --model"):
        run(["select", "--model", str(base), "--data", str(corpus), "--output", str(output)])
    other = save_selector(tmp_path / "gates", save_tiny_base(tmp_path / "other", hidden_size=64))
    settings = [f"model_checkpoint_path={other}", f"model={base}", f"output={output}"]
    with pytest.raises(ModelError, match=f"hidden_size is 64 of {tmp_path}/other, and 32 of"):
        run(["select", "--data", str(corpus), *settings])
    assert not output.exists()


def test_calibrate_writes_beside_the_gates(selector, corpus, tmp_path, capsys):
    fresh = save_selector(tmp_path / "gates", selector.parent / "base")
    assert ScoringEngine.from_pretrained(fresh).length == "raw"
    run(["calibrate", "--model", str(fresh), "--data", str(corpus)])
    assert capsys.readouterr().out.strip() == str(fresh / "calibration.json")
    assert ScoringEngine.from_pretrained(fresh).length == "adjusted"


def test_a_base_in_a_gguf_file_scores_as_its_folder_does(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    selector = save_selector(tmp_path / "gates", file, layers=(0, 1))
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ("he", "she is")]
    by_file = ScoringEngine.from_pretrained(selector, device="cpu")
    model, tokenizer = load_gguf(file)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    folder = save_selector(tmp_path / "others", tmp_path / "folder", layers=(0, 1))
    by_folder = ScoringEngine.from_pretrained(folder, device="cpu")
    np.testing.assert_allclose(scores(by_file, rows), scores(by_folder, rows), rtol=0, atol=1e-6)
    files = find_selector(str(file), selector)
    assert files.num_parameters() == sum(p.numel() for p in tiny_llama().parameters())
    assert files.num_bytes() == 2 * files.num_parameters()
    files.require_readable()
    with pytest.raises(ModelError, match=f"{file}: a base without quality gates"):
        find_selector(str(file))
