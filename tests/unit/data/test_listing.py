"""Which files several corpora have together, how they are named, and what is left over."""

import json
import os
from pathlib import Path

import pytest

from selectmoe.config.conversion import ConvertConfig
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.config.warmup import WarmupConfig
from selectmoe.data.folders import is_output
from selectmoe.data.listing import list_corpora
from selectmoe.data.readers import read_corpora, require_readable
from tests.corpus_files import ids, jsonl, refusal, write

TEXT = b'{"text": "Because."}\n'


def names(*specs: object) -> list[tuple[str, str]]:
    """The dataset and the id of every row."""
    return [(row.dataset, row.sample_id) for row in read_corpora([str(spec) for spec in specs])]


def corpus(root: Path, *paths: str) -> Path:
    for path in paths:
        write(root / path, TEXT)
    return root


def test_datasets_are_named_by_the_path_below_what_was_given(tmp_path):
    corpus(tmp_path, "gsm/train.jsonl", "math/train.jsonl", "dolly.jsonl")
    whole = [
        ("dolly", "dolly.jsonl:1"),
        ("gsm/train", "gsm/train.jsonl:1"),
        ("math/train", "math/train.jsonl:1"),
    ]
    assert names(tmp_path) == whole
    assert names(tmp_path / "*") == names(f"{tmp_path}/**/*.jsonl") == whole
    assert names(tmp_path / "*/train.jsonl") == names(f"{tmp_path}/{{gsm,math}}/*") == whole[1:]
    assert names(tmp_path / "gsm") == names(tmp_path / "gsm/train.jsonl")
    assert names(tmp_path / "gsm") == [("train", "train.jsonl:1")]
    assert names(tmp_path / "dolly.jsonl") == [("dolly", "dolly.jsonl:1")]


def test_two_corpora_whose_files_have_one_name_are_told_apart(tmp_path):
    corpus(tmp_path, "x/gsm/train.jsonl", "x/gsm/test.jsonl", "x/math/train.jsonl", "y/a.jsonl")
    expected = ["gsm/test", "gsm/train", "math/train"]
    for specs in (
        ("x/gsm", "x/math"),
        ("x/gsm/*.jsonl", "x/math/train.jsonl"),
        ("x/gsm/test.jsonl", "x/gsm/train.jsonl", "x/math/*"),
    ):
        found = names(*(tmp_path / spec for spec in specs), tmp_path / "y")
        assert [dataset for dataset, _ in found] == [*expected, "a"]
        assert found[1] == ("gsm/train", "gsm/train.jsonl:1")
    corpus(tmp_path, "z/gsm/train.jsonl")
    found = names(tmp_path / "x/gsm/train.jsonl", tmp_path / "z/gsm/train.jsonl")
    assert [dataset for dataset, _ in found] == ["x/gsm/train", "z/gsm/train"]


def test_shards_of_one_dataset_have_its_name_and_ids_of_their_own(tmp_path):
    shards = [f"sft/train-{n:05d}-of-00002.jsonl" for n in range(2)]
    corpus(tmp_path, *shards, "sft/test-00000-of-00001-0123456789abcdef.jsonl", "00000-of-00001.pq")
    (tmp_path / "00000-of-00001.pq").unlink()
    train = [("train", f"train-{n:05d}-of-00002.jsonl:1") for n in range(2)]
    assert names(tmp_path / "sft")[1:] == names(*(tmp_path / shard for shard in shards)) == train
    assert names(tmp_path)[0][0] == "sft/test"
    corpus(tmp_path, "only/00000-of-00002.jsonl", "only/00001-of-00002.jsonl")
    assert {dataset for dataset, _ in names(tmp_path / "only")} == {"only"}


def test_a_row_that_names_its_dataset_keeps_it(tmp_path):
    write(tmp_path / "a/b.jsonl", b'{"text": "a", "dataset": "c", "id": "d"}\n')
    assert names(tmp_path) == [("c", "d")]


def test_a_file_that_is_reached_twice_is_read_once_and_told(tmp_path, caplog):
    corpus(tmp_path, "k/a.jsonl", "k/y/b.jsonl")
    (tmp_path / "k" / "c.jsonl").symlink_to(tmp_path / "k" / "a.jsonl")
    os.link(tmp_path / "k" / "a.jsonl", tmp_path / "k" / "d.jsonl")
    (tmp_path / "k" / "z").symlink_to(tmp_path / "k" / "y")
    specs = [str(tmp_path / "k"), str(tmp_path / "k/y"), str(tmp_path / "k/y/b.jsonl")]
    assert names(*specs) == [("a", "a.jsonl:1"), ("y/b", "y/b.jsonl:1")]
    with caplog.at_level("INFO"):
        listing = require_readable(specs)
    assert listing.num_files == 2
    [line] = caplog.messages
    assert line == (
        f"4 paths are reached twice and read once: z, c.jsonl, d.jsonl, y/b.jsonl (in {tmp_path}/k)"
    )


def test_two_snapshots_of_a_hub_dataset_are_one(tmp_path):
    blob = write(tmp_path / "blobs" / "0123", TEXT)
    for commit in ("aaaa", "bbbb"):
        folder = tmp_path / "snapshots" / commit / "data"
        folder.mkdir(parents=True)
        (folder / "train-00000-of-00001.jsonl").symlink_to(blob)
    assert len(names(tmp_path / "snapshots")) == 1


def test_what_is_left_over_in_a_folder_is_told_and_listed(tmp_path, caplog):
    corpus(
        tmp_path, "a.jsonl", "README.md", "s/b.jsonl.gz.part", "c.jsonl.crc", "_d.jsonl", ".git/x"
    )
    write(tmp_path / "dataset_info.json", b"{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with caplog.at_level("INFO"):
        listing = require_readable([str(tmp_path)])
    [line] = caplog.messages
    assert line.startswith("6 files are not read, by their names: ")
    assert line.endswith(f" (in {tmp_path})")
    found = {path.removeprefix(f"{tmp_path}/") for path in listing.passed_over.left_over}
    assert found == {
        "README.md", "s/b.jsonl.gz.part", "c.jsonl.crc", "_d.jsonl", "dataset_info.json",
        "pipe.jsonl",
    }  # fmt: skip
    assert ids(tmp_path) == ["a.jsonl:1"]


def run_folder(folder: Path, config: object) -> Path:
    write(folder / "config.json", json.dumps(resolved(config)).encode())
    return corpus(folder, "corpus/x.jsonl", "selected_data.jsonl", "metrics.jsonl")


def test_outputs_of_runs_and_models_below_a_corpus_are_passed_over_and_told(tmp_path, caplog):
    corpus(tmp_path, "raw/a.jsonl")
    run = run_folder(tmp_path / "outputs" / "stage_2" / "1", SelectConfig())
    run_folder(tmp_path / "outputs" / "stage_1" / "1", WarmupConfig())
    write(tmp_path / "model" / "config.json", b'{"model_type": "select_moe"}')
    write(tmp_path / "model" / "tokenizer.json", b"{}")
    with caplog.at_level("INFO"):
        listing = require_readable([str(tmp_path)])
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "3 folders of runs or models are not read"
    ]
    assert str(run) in listing.passed_over.outputs
    for spec in (tmp_path, f"{tmp_path}/**/*.jsonl", f"{tmp_path}/*"):
        assert ids(spec) == ["raw/a.jsonl:1"], spec
    # What is named is meant.
    assert ids(run / "selected_data.jsonl") == ["selected_data.jsonl:1"]
    assert len(ids(f"{tmp_path}/outputs/*/*/selected_data.jsonl")) == 2
    assert "is the folder of a run or of a model" in refusal(run)
    assert "folders of runs are passed over" in refusal(tmp_path / "outputs")


@pytest.mark.parametrize(
    "config", [SelectConfig(), WarmupConfig(), FinetuneConfig(), EvaluateConfig()], ids=type
)
def test_the_config_of_every_stage_is_known_as_one(config):
    assert is_output(resolved(config))
    assert not is_output({"prompt": "a", "response": "b"})
    assert not is_output([resolved(config)])
    assert "quality_gate_init_mean" in resolved(ConvertConfig(base="a", save_path="b"))


def test_a_corpus_that_another_one_covers_is_not_empty(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("1"))
    listing = list_corpora([str(tmp_path), str(tmp_path / "a.jsonl")])
    assert [len(corpus.files) for corpus in listing.corpora] == [1, 0]
    assert [row.sample_id for row in read_corpora([str(tmp_path), str(tmp_path / "a.jsonl")])] == [
        "1"
    ]


def test_a_name_with_a_line_feed_is_told_in_one_line(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("1"))
    write(tmp_path / "b\nc\x1b.txt", b"")
    [line] = list_corpora([str(tmp_path)]).passed_over.lines()
    assert line == f"1 file is not read, by its name: b\\nc\\x1b.txt (in {tmp_path})"
