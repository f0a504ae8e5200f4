"""Settings come from SELECTMOE_* variables; a wrong one is refused by name, rule and value."""

import pytest

from selectmoe.errors import ConfigError
from serve.settings import ServeSettings, is_loopback


def test_without_variables_the_embedded_selector_is_served_without_a_key():
    settings = ServeSettings.from_environment({})
    assert settings == ServeSettings()
    assert settings.model_name == "embedded"
    assert settings.api_key is None


def test_variables_become_values_of_the_field_s_type():
    settings = ServeSettings.from_environment(
        {
            "SELECTMOE_NUM_REPLICAS": "3",
            "SELECTMOE_NUM_GPUS_PER_REPLICA": "0.5",
            "SELECTMOE_MAX_TOKENS_PER_BATCH": "1000",
            "SELECTMOE_REVISION": "v1",
            "SELECTMOE_API_KEY": "",  # as if it were not there
            "OTHER": "x",
        }
    )
    assert (settings.num_replicas, settings.num_gpus_per_replica) == (3, 0.5)
    assert (settings.engine.max_tokens_per_batch, settings.revision) == (1_000, "v1")
    assert settings.api_key is None


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("NUM_REPLICAS", "two", "SELECTMOE_NUM_REPLICAS must be a whole number, got 'two'"),
        ("NUM_REPLICAS", "0", "SELECTMOE_NUM_REPLICAS must be at least 1, got 0"),
        ("MAX_REPLICAS", "0", "SELECTMOE_MAX_REPLICAS must be at least num_replicas, got 0"),
        ("MAX_TOKENS_PER_BATCH", "0", "SELECTMOE_MAX_TOKENS_PER_BATCH must be at least 1, got 0"),
        ("MAX_TOKENS_PER_BATCH", "x", "SELECTMOE_MAX_TOKENS_PER_BATCH must be a whole number"),
        ("REQUEST_TIMEOUT_SECONDS", "0", "must be more than 0, got 0.0"),
        ("MAX_WAIT_MILLISECONDS", "nan", "SELECTMOE_MAX_WAIT_MILLISECONDS must be at least 0"),
        ("DEVICE", "tpu", "SELECTMOE_DEVICE must be cpu or cuda, got 'tpu'"),
        ("DTYPE", "int8", "SELECTMOE_DTYPE must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_a_wrong_variable_is_refused_by_name_rule_and_value(name, value, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ServeSettings.from_environment({f"SELECTMOE_{name}": value})


@pytest.mark.parametrize(
    ("old", "new"),
    [("WEIGHTS", "MODEL_CHECKPOINT_PATH"), ("MAX_BATCH_TOKENS", "MAX_TOKENS_PER_BATCH")],
)
def test_a_renamed_variable_is_refused_with_its_new_name(old, new):
    with pytest.raises(ConfigError, match=f"SELECTMOE_{old} is now called SELECTMOE_{new}"):
        ServeSettings.from_environment({f"SELECTMOE_{old}": "8"})
    assert ServeSettings.from_environment({f"SELECTMOE_{old}": ""}) == ServeSettings()


def test_a_key_is_shown_by_no_message_and_no_repr():
    assert "hunter2" not in repr(ServeSettings(api_key="hunter2"))
    # The last as a file has it: no header can hold it, so nobody's key would ever be right.
    for key in ("schlüssel", "hunter 2", "hunter2\n"):
        with pytest.raises(ConfigError, match="SELECTMOE_API_KEY must be") as caught:
            ServeSettings(api_key=key)
        assert key not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(host):
    assert is_loopback(host)
    ServeSettings().require_key_for(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_any_other_address_needs_a_key(host):
    with pytest.raises(ConfigError, match="SELECTMOE_API_KEY must be set to serve on"):
        ServeSettings().require_key_for(host)
    ServeSettings(api_key="key").require_key_for(host)


def test_a_model_folder_is_named_but_its_place_is_not_told(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert ServeSettings(model=str(folder)).model_name == "my-model"
    assert ServeSettings(model="owner/name").model_name == "owner/name"
