"""cluster.yaml is what Ray's launcher reads, and says of the project what is so."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from selectmoe.cli.output_folder import OUTPUT_ROOT_VARIABLE

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def ray_schema() -> dict[str, Any]:
    # find_spec and not an import: the schema is a file, and ray takes seconds to import.
    ray = find_spec("ray")
    if ray is None or ray.origin is None:
        pytest.skip("needs ray, for the launcher's schema")
    schema = Path(ray.origin).parent / "autoscaler" / "ray-schema.json"
    return dict(json.loads(schema.read_text(encoding="utf-8")))


def test_ray_accepts_the_file(cluster: dict[str, Any], ray_schema: dict[str, Any]) -> None:
    jsonschema.validate(cluster, ray_schema)


def test_the_schema_would_refuse_a_misspelt_key(
    cluster: dict[str, Any], ray_schema: dict[str, Any]
) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**cluster, "max_worker": 1}, ray_schema)


def test_head_and_workers_are_named_types(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    workers = [types[name] for name in types if name != cluster["head_node_type"]]
    assert sum(worker["max_workers"] for worker in workers) == cluster["max_workers"]
    # jobs/select.py chooses between GPU and CPU actors when it starts.
    assert sum(worker["min_workers"] for worker in workers) >= 1


def test_every_node_starts_ray_with_token_authentication(cluster: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        starts = [cmd for cmd in cluster[f"{role}_start_ray_commands"] if "ray start" in cmd]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)


def test_outputs_lie_on_storage_that_every_node_mounts(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    [root] = [option.split("=", 2)[2] for option in options if OUTPUT_ROOT_VARIABLE in option]
    [volume] = [option.split("=")[1] for option in options if option.startswith("--volume=")]
    on_the_machine, in_the_container = volume.split(":")
    assert root.startswith(in_the_container + "/")
    mounts = [cmd for cmd in cluster["initialization_commands"] if "sudo mount " in cmd]
    assert [command.split()[-1] for command in mounts] == [on_the_machine]


def test_the_image_has_the_ray_of_the_constraints(cluster: dict[str, Any]) -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^ray==(\S+)", constraints, flags=re.MULTILINE)
    assert pinned is not None
    assert f":{pinned[1]}-" in cluster["docker"]["image"]


def test_nodes_install_the_checkout_without_environments_and_outputs(
    cluster: dict[str, Any],
) -> None:
    [remote] = [remote for remote, local in cluster["file_mounts"].items() if local == "."]
    assert f"cd {remote} &&" in cluster["setup_commands"][0]
    assert {".venv", ".git", "outputs"} <= set(cluster["rsync_exclude"])


def test_every_number_has_a_comment(cluster: dict[str, Any]) -> None:
    lines = (REPOSITORY / "cluster.yaml").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.search(r":\s+\d[\d.]*\s*(#|$)", line):
            assert "#" in line or lines[number - 1].lstrip().startswith("#"), line
