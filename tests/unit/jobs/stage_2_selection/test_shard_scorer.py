import gc

import pytest

from jobs.stage_2_selection.shard_scorer import without_garbage_collection


@pytest.fixture(autouse=True)
def collect_as_before():
    yield
    gc.unfreeze()


def test_garbage_is_collected_again_after_imports_even_if_they_fail():
    with pytest.raises(ImportError, match="not there"), without_garbage_collection():
        raise ImportError("of a package that is not there" if not gc.isenabled() else "")
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
