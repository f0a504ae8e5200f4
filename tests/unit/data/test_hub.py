"""Names of hub datasets in settings, and their rows from the offline cache of `datasets`."""

import json
import shutil
from pathlib import Path

import pytest

from selectmoe.data.hub import HubDataset, parse_hub
from selectmoe.data.readers import read_corpora
from selectmoe.errors import DataError
from selectmoe.records import Sample
from tests.corpus_files import write


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:a/b", HubDataset("a/b")),
        ("hub:b", HubDataset("b")),
        ("hub:a/b:test", HubDataset("a/b", None, "test")),
        ("hub:a/b:extra:test", HubDataset("a/b", "extra", "test")),
        ("hub:a/b@v1.0", HubDataset("a/b", None, "train", "v1.0")),
        ("hub:a/b:test@refs/pr/1", HubDataset("a/b", None, "test", "refs/pr/1")),
        ("hub:a/b:extra:test@main", HubDataset("a/b", "extra", "test", "main")),
        ("hub:a/b:train[:100]", HubDataset("a/b", None, "train[:100]")),
        ("hub:a/b:extra:train[10%:20%]@v1", HubDataset("a/b", "extra", "train[10%:20%]", "v1")),
    ],
)
def test_a_spec_names_configuration_split_and_revision(spec, expected):
    assert parse_hub(spec) == expected


@pytest.mark.parametrize("spec", ["hub:", "hub::test", "hub:a:", "hub:a:b:c:d", "hub:a@", "hub:@b"])
def test_a_spec_of_another_form_is_refused(spec):
    with pytest.raises(DataError) as caught:
        parse_hub(spec)
    assert str(caught.value) == f"{spec}: must be hub:NAME[:CONFIG][:SPLIT][@REVISION]"


def test_a_folder_may_have_a_colon_or_an_at_in_its_path(tmp_path):
    folder = tmp_path / "x:y@z" / "name"
    write(folder / "train.jsonl", b'{"text": "a"}\n')
    assert parse_hub(f"hub:{folder}") == HubDataset(str(folder))
    assert parse_hub(f"hub:{folder}:test@v1") == HubDataset(str(folder), None, "test", "v1")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """org/pool with two configurations, and other/pool, as `datasets` keeps them on disk."""
    import datasets

    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    for owner, config in (("org", "main"), ("org", "extra"), ("other", "default")):
        _put_into_cache(cache, tmp_path / owner / config, owner, config)


def _put_into_cache(cache: Path, scratch: Path, owner: str, config: str) -> None:
    import datasets

    for split in ("train", "test"):
        rows = [{"text": f"{owner} {config} {split} {number}"} for number in range(2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write(scratch / f"{split}.jsonl", lines.encode())
    files = {split: str(scratch / f"{split}.jsonl") for split in ("train", "test")}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(scratch))
    builder.download_and_prepare()
    target = cache / f"{owner}___pool" / config / "0.0.0" / ("0" * 40)
    target.mkdir(parents=True)
    info = json.loads((Path(builder.cache_dir) / "dataset_info.json").read_text())
    info |= {"dataset_name": "pool", "config_name": config}
    (target / "dataset_info.json").write_text(json.dumps(info))
    for split in files:
        arrow = Path(builder.cache_dir) / f"json-{split}.arrow"
        shutil.copy(arrow, target / f"pool-{split}.arrow")


def rows_of(*specs: str) -> list[tuple[str, str, str]]:
    rows = list(read_corpora(specs))
    assert all(isinstance(row, Sample) for row in rows)
    return [(row.dataset, row.sample_id, row.messages[0].content) for row in rows]


def test_configurations_and_splits_are_read_from_the_cache_without_a_network(cached):
    assert rows_of("hub:org/pool:extra:test") == [
        ("pool/extra", "pool/extra:test:1", "org extra test 0"),
        ("pool/extra", "pool/extra:test:2", "org extra test 1"),
    ]
    assert rows_of("hub:other/pool")[1] == ("pool", "pool:2", "other default train 1")
    revision = "0" * 40
    [first, _] = rows_of(f"hub:org/pool:main:train@{revision}")
    assert first == ("pool/main", f"pool/main@{revision}:1", "org main train 0")


def test_two_datasets_of_one_name_are_told_apart_and_one_given_twice_is_read_once(cached):
    rows = rows_of("hub:org/pool:main:train", "hub:other/pool", "hub:other/pool:train")
    assert [dataset for dataset, _, _ in rows] == ["pool/main"] * 2 + ["pool"] * 2


def test_rows_of_the_hub_are_normalized_with_those_of_files(cached, tmp_path):
    from selectmoe.corpus.normalize import write_corpus

    copy = write(tmp_path / "copy.jsonl", b'{"id": "c", "text": "other default train 1"}\n')
    specs = ["hub:org/pool:extra:train", "hub:other/pool", str(copy)]
    summary = write_corpus(specs, tmp_path / "c", rows_per_shard=9)
    assert (summary.num_read, summary.num_duplicates, summary.num_rows) == (5, 1, 4)
    assert summary.read_by_dataset == {"copy": 1, "pool": 2, "pool/extra": 2}
    assert summary.files["num_read"] == 3
