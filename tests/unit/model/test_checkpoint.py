"""What a model folder is, and what is said about one that is something else."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import (
    hash_weights,
    model_folder,
    read_model_config,
    require_olmoe,
    require_select_moe,
)


def model(folder: Path, model_type: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def refusal(function, argument: str) -> str:
    with pytest.raises(ModelError) as refused:
        function(argument)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_folder_is_itself_and_gives_its_configuration(tmp_path):
    folder = model(tmp_path / "m", "olmoe")
    assert model_folder(folder) == tmp_path / "m"
    assert read_model_config(folder) == {"model_type": "olmoe"}


def test_only_an_olmoe_can_be_converted(tmp_path):
    require_olmoe(model(tmp_path / "olmoe", "olmoe"))
    assert "is a Select-MoE already" in refusal(require_olmoe, model(tmp_path / "s", "select_moe"))
    assert "model_type is 'llama'" in refusal(require_olmoe, model(tmp_path / "l", "llama"))


def test_only_a_select_moe_can_score(tmp_path):
    require_select_moe(model(tmp_path / "s", "select_moe"))
    olmoe = model(tmp_path / "olmoe", "olmoe")
    assert f"jobs/convert.py --base {olmoe}" in refusal(require_select_moe, olmoe)
    assert "got 'llama'" in refusal(require_select_moe, model(tmp_path / "l", "llama"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
    ],
)
def test_a_folder_without_a_readable_configuration_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert message in refusal(read_model_config, str(tmp_path))


@pytest.mark.parametrize("name", ["missing", "./a/b", "/no/such/folder", "a/b/c"])
def test_what_can_be_no_hub_name_is_a_folder_that_does_not_exist(name):
    assert refusal(read_model_config, name) == f"model folder {name} does not exist"


@pytest.mark.parametrize("function", [read_model_config, model_folder])
@pytest.mark.parametrize("name", ["nobody/nothing", "no body/no thing"])
def test_a_hub_name_that_is_not_to_be_had_is_one_line(function, name):
    # The tests run offline, so even a good name is not to be had; the second is not a name at all.
    assert refusal(function, name).startswith(f"model {name}: no such folder, and it could not be")


def test_a_hub_that_does_not_answer_is_not_tried_for_long(tmp_path, repository):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        code = "from selectmoe.model.checkpoint import read_model_config as f; f('nobody/nothing')"
        started = time.perf_counter()
        # A process of its own: the hub's client reads the environment when it is imported.
        finished = subprocess.run(
            [sys.executable, "-c", code], cwd=repository, env=kept | own, stderr=subprocess.PIPE
        )
    # 1 s on an idle machine; the client alone waits 1 + 2 + 4 + 8 + 8 s between its tries.
    assert time.perf_counter() - started < 15
    last_line = finished.stderr.decode().splitlines()[-1]
    assert "nobody/nothing: no such folder" in last_line
    assert "not in the cache, and the hub does not answer" in last_line


def test_the_hash_follows_the_weights_and_nothing_else(tmp_path):
    folder = model(tmp_path / "m", "select_moe")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(b"one")
    first = hash_weights(folder, None)
    (tmp_path / "m" / "parity_report.json").write_text("{}")
    assert hash_weights(folder, None) == first
    weights.write_bytes(b"two")
    assert hash_weights(folder, None) != first
    assert hash_weights(folder, weights) != hash_weights(folder, None)
