"""A model folder reaches a repository of the hub, by huggingface_hub's own client."""

import os
import subprocess
import sys

import pytest

from selectmoe.errors import ConfigError
from selectmoe.model.hub_upload import require_hub_login
from tests.fake_hub import fake_hub

PROGRAM = (
    "import sys; from pathlib import Path; from selectmoe.model import hub_upload as h;"
    "h.require_hub_login(sys.argv[2]); print(h.push_folder(Path(sys.argv[1]), sys.argv[2]))"
)


def push(hub, repository, home, folder, name, **variables):
    """In a process of its own: the client reads its environment when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), name],
        cwd=repository, env=kept | own | {"HF_TOKEN": hub.token} | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    return made


def test_every_file_of_the_folder_is_in_a_new_private_repository(repository, tmp_path, folder):
    with fake_hub() as hub:
        finished = push(hub, repository, tmp_path / "home", folder, "me/selector")
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.strip() == f"{hub.address}/me/selector"
        settings = hub.repositories["me/selector"]  # older clients send `private`
        assert settings.get("visibility") == "private" or settings["private"] is True
        assert hub.files == {
            "config.json": b"{}",
            "model.safetensors": bytes(range(256)),
        }
        again = push(hub, repository, tmp_path / "home", folder, "me/selector")
        assert again.returncode == 0, again.stderr


def test_a_token_that_the_hub_does_not_accept_is_one_line(repository, tmp_path, folder):
    with fake_hub() as hub:
        refused = push(hub, repository, tmp_path, folder, "me/selector", HF_TOKEN="hf_wrong")
    last_line = refused.stderr.splitlines()[-1]
    assert last_line.startswith(f"selectmoe.errors.ModelError: {folder} is complete, but could not")
    assert "401" in last_line


def test_a_name_or_login_that_cannot_work_is_refused_first(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="push_to_hub must be NAME or OWNER/NAME"):
        require_hub_login("a/b/c")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"needs a token .* 'hf auth login' or set HF_TOKEN"):
        require_hub_login("me/selector")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with pytest.raises(ConfigError, match="does not answer or HF_HUB_OFFLINE is set"):
        require_hub_login("me/selector")
