import gc
import json

import numpy as np
import pytest

from jobs.stage_2_selection.ray_runner import scoring_error
from jobs.stage_2_selection.shard_scorer import (
    ScoringFailure,
    ShardScorer,
    without_garbage_collection,
)
from selectmoe.errors import ModelError, StorageError
from selectmoe.selection.run_folder import RunFolder


@pytest.fixture(autouse=True)
def collect_as_before():
    yield
    gc.unfreeze()


def test_garbage_is_collected_again_after_imports_even_if_they_fail():
    with pytest.raises(ImportError, match="not there"), without_garbage_collection():
        raise ImportError("of a package that is not there" if not gc.isenabled() else "")
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def failure_of(folder: RunFolder, open_scorer) -> Exception:
    """The error that ends the run where an actor of it fails."""
    actor = ShardScorer(open_scorer, folder.scored, shards_in_flight=1)
    row = actor({"shard": np.array([str(folder.corpus / "shard-000000.parquet")])})
    return scoring_error(ScoringFailure(**json.loads(row["failure"][0])), folder)


def test_an_exception_in_an_actor_is_told_as_it_is(tmp_path):
    def open_scorer():
        return [][601]

    folder = RunFolder(tmp_path)
    folder.corpus.mkdir()
    (folder.corpus / "shard-000000.parquet").touch()
    assert str(failure_of(folder, open_scorer)) == (
        f"scoring stopped with 1 shards left: IndexError: list index out of range; details: "
        f"{folder.error_details}; resume with --resume {tmp_path}"
    )
    assert "in open_scorer" in folder.error_details.read_text()


def test_a_mistake_in_an_actor_is_its_message_alone(tmp_path):
    def open_scorer():
        raise ModelError("model: lacks a tensor")

    assert str(failure_of(RunFolder(tmp_path), open_scorer)) == "model: lacks a tensor"


def test_a_full_disk_in_an_actor_is_told_with_how_to_resume(tmp_path):
    def open_scorer():
        with open("/dev/full", "w") as file:
            file.write("x")

    error = failure_of(RunFolder(tmp_path), open_scorer)
    assert isinstance(error, StorageError)
    assert str(error) == (
        f"No space left on device; free some space, then resume with --resume {tmp_path}"
    )
