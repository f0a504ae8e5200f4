"""serve.yaml and the RayService are what Serve, KubeRay and our settings accept."""

import re

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from selectmoe.config.engine import EngineConfig
from serve.local_ray import ENVIRONMENT
from serve.settings import PREFIX, ServeSettings

# The part of KubeRay's definition of ray.io/v1 RayService that this manifest uses; nothing else
# may stand in it, so that a key with a typing error is found here and not by an operator.
POD_TEMPLATE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["containers"],
            "properties": {
                "terminationGracePeriodSeconds": {"type": "integer", "minimum": 60},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "image", "resources", "env"],
                        "properties": {
                            "name": {"type": "string"},
                            "image": {"type": "string"},
                            "env": {"type": "array", "items": {"required": ["name"]}},
                            "ports": {
                                "type": "array",
                                "items": {
                                    "additionalProperties": False,
                                    "required": ["name", "containerPort"],
                                    "properties": {
                                        # Kubernetes' rule for the name of a port.
                                        "name": {"type": "string", "pattern": "^[a-z0-9-]{1,15}$"},
                                        "containerPort": {"type": "integer"},
                                    },
                                },
                            },
                            "resources": {
                                "additionalProperties": False,
                                "properties": {
                                    part: {"additionalProperties": {"type": "string"}}
                                    for part in ("requests", "limits")
                                },
                            },
                        },
                    },
                },
            },
        }
    },
}
START_PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
RAY_SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": {"required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["serveConfigV2", "rayClusterConfig"],
            "properties": {
                "serveConfigV2": {"type": "string"},
                "upgradeStrategy": {
                    "properties": {
                        "type": {"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}
                    }
                },
                "rayClusterConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["headGroupSpec"],
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "headGroupSpec": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["template"],
                            "properties": {
                                "rayStartParams": START_PARAMETERS,
                                "template": POD_TEMPLATE,
                            },
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["groupName", "template"],
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": {"type": "integer"},
                                    "minReplicas": {"type": "integer"},
                                    "maxReplicas": {"type": "integer"},
                                    "rayStartParams": START_PARAMETERS,
                                    "template": POD_TEMPLATE,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def serve_yaml(repository):
    return yaml.safe_load((repository / "serve" / "serve.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def ray_service(repository):
    return yaml.safe_load((repository / "serve" / "rayservice.yaml").read_text("utf-8"))


def variables(config):
    [application] = config["applications"]
    return application["runtime_env"]["env_vars"]


@pytest.mark.parametrize("place", ["serve.yaml", "rayservice.yaml"])
def test_serve_and_our_settings_accept_the_configuration(place, serve_yaml, ray_service):
    config = serve_yaml
    if place == "rayservice.yaml":
        config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    given = variables(config)
    known = {PREFIX + name.upper() for name in ServeSettings.__slots__ + EngineConfig.__slots__}
    assert set(given) <= known
    assert PREFIX + "API_KEY" not in given  # a secret stands in no file
    settings = ServeSettings.from_environment({**given, PREFIX + "API_KEY": "key"})
    settings.require_key_for(config["http_options"]["host"])


def test_every_number_of_serve_yaml_has_a_comment(repository):
    lines = (repository / "serve" / "serve.yaml").read_text("utf-8").splitlines()
    numbers = [line for line in lines if re.match(r"\s+\w+: \"?\d+\"?(\s|$)", line)]
    assert len(numbers) >= 10
    assert [line for line in numbers if "#" not in line and "port:" not in line] == []


def test_kuberay_accepts_the_manifest(ray_service):
    Draft202012Validator(RAY_SERVICE).validate(ray_service)


def test_the_manifest_serves_what_serve_yaml_serves_on_gpus(serve_yaml, ray_service):
    config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    differences = {
        name: value for name, value in variables(config).items()
        if variables(serve_yaml)[name] != value
    }  # fmt: skip
    assert differences == {"SELECTMOE_NUM_GPUS_PER_REPLICA": "1"}
    variables(config).update(variables(serve_yaml))
    assert config == serve_yaml


def test_every_pod_has_the_key_and_what_serve_run_tells_ray(ray_service):
    cluster = ray_service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert given.items() >= ENVIRONMENT.items()
        assert "SELECTMOE_API_KEY" in given


def test_the_manifest_starts_the_ray_that_is_tested(repository, ray_service):
    pinned = re.search(r"^ray==(.+)$", (repository / "constraints.txt").read_text(), re.MULTILINE)
    assert ray_service["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]
