"""The folder of the real model, which the repository does not contain."""

import os
from pathlib import Path

import pytest

DEFAULT = "models/smollm2-135m-instruct"  # of the checkout; git ignores it


@pytest.fixture(scope="session")
def smollm2(repository) -> Path:
    """SmolLM2-135M-Instruct, at $SELECTMOE_SMOLLM2 or in the checkout; skips where it is absent."""
    folder = repository / os.environ.get("SELECTMOE_SMOLLM2", DEFAULT)
    if not (folder / "config.json").is_file():
        pytest.skip(
            f"needs a model folder at {folder}: python recipes/fetch_smollm2.py makes it, "
            "SELECTMOE_SMOLLM2 names another one"
        )
    return folder
