"""Settings that name the columns of a corpus."""

import json
from pathlib import Path

import pytest

from selectmoe.config.loading import from_values, load_config, resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError

COLUMNS = {"prompt": "q", "response": "the answer"}


@pytest.mark.parametrize(
    "text", ["{prompt: q, response: 'the answer'}", "{prompt:q,response:the answer}"]
)
def test_a_mapping_is_a_setting_of_its_own(tmp_path: Path, text: str) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"dataset:\n  columns: {json.dumps(COLUMNS)}\n")
    for overrides in ([f"dataset.columns={text}"], [f"preset={preset}"]):
        config = load_config(SelectConfig, overrides)
        assert config.dataset.columns == COLUMNS
        assert from_values(SelectConfig, json.loads(json.dumps(resolved(config)))) == config
    assert load_config(SelectConfig, ["dataset.columns={}"]) == SelectConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.columns={promt: q}", "dataset.columns must map some of messages, .* got 'promt'"),
        ("dataset.columns=[q]", "dataset.columns must be a mapping of texts, as {prompt: q, "),
        ("dataset.columns={prompt: 1}", "dataset.columns must be a mapping of texts"),
        ("dataset.extra_columns=hide", "dataset.extra_columns must be one of keep, drop"),
    ],
)
def test_names_of_columns_are_checked(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SelectConfig, [override])
