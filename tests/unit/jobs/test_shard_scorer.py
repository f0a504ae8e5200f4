import gc

import pytest

from jobs.shard_scorer import without_garbage_collection


@pytest.fixture(autouse=True)
def collect_as_before():
    yield
    gc.unfreeze()


def test_garbage_is_collected_again_after_imports_even_if_they_fail():
    with pytest.raises(ImportError), without_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
