"""Corpora by name: from a folder, or from where each is published."""

import zipfile

import pytest

from selectmoe.config.selection import DatasetConfig
from selectmoe.config.warmup import WarmupDatasetConfig
from selectmoe.data.named_corpora import KNOWN_CORPORA, corpus_specs
from selectmoe.errors import ConfigError, DataError
from tests.corpus_files import ids, jsonl


@pytest.mark.parametrize("config", [DatasetConfig, WarmupDatasetConfig])
def test_names_are_files_or_folders_below_the_folder(tmp_path, config):
    (tmp_path / "cot").mkdir()
    for name in ("dolly.jsonl", "flan_v2.parquet", "oasst1.JSON.zst", "two.csv", "two.json"):
        (tmp_path / name).touch()
    names = ("cot", "dolly", "flan_v2", "oasst1")
    dataset = config(paths=("/more.jsonl",), names=names, folder=str(tmp_path))
    assert corpus_specs(dataset) == (
        "/more.jsonl",
        str(tmp_path / "cot"),
        str(tmp_path / "dolly.jsonl"),
        str(tmp_path / "flan_v2.parquet"),
        str(tmp_path / "oasst1.JSON.zst"),
    )
    with pytest.raises(DataError, match=r"'mine' must be a folder or one file in .* contains cot"):
        corpus_specs(config(names=("mine",), folder=str(tmp_path)))
    with pytest.raises(DataError, match=r"got two\.csv and two\.json"):
        corpus_specs(config(names=("two",), folder=str(tmp_path)))


@pytest.mark.parametrize("config", [DatasetConfig, WarmupDatasetConfig])
def test_without_a_folder_the_four_names_are_on_the_hub(config):
    specs = corpus_specs(config(names=("cot", "dolly", "flan_v2", "oasst1")))
    assert specs == tuple(KNOWN_CORPORA.values())
    with pytest.raises(ConfigError, match="among cot, dolly, flan_v2, oasst1 unless"):
        corpus_specs(config(names=("mine",)))


def test_a_file_in_an_archive_is_read_by_such_a_url(tmp_path):
    member = KNOWN_CORPORA["cot"].removeprefix("zip://").partition("::")[0]
    with zipfile.ZipFile(tmp_path / "less-data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, jsonl("1", "2"))
    assert ids(f"zip://{member}::file://{tmp_path}/less-data.zip") == ["1", "2"]
