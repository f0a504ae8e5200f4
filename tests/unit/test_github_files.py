"""The files that GitHub and citation tools read: they parse, and name what exists."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectmoe import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / ".github"
FORMS = ("bug_report.yml", "feature_request.yml")


def loaded(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict), path
    return content


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return loaded(FOLDER / "workflows" / "tests.yml")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert isinstance(table, dict)
    return table


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_workflow_may_only_read_and_ends_what_is_outdated(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true


def test_every_command_that_is_named_is_a_make_target(workflow):
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    commands = [step["run"] for step in steps_of(workflow) if "run" in step]
    assert {"make check", "make test-fast"} <= set(commands)
    template = (FOLDER / "PULL_REQUEST_TEMPLATE.md").read_text("utf-8")
    commands += re.findall(r"`(make [a-z-]+)`", template)
    assert {command.removeprefix("make ") for command in commands} <= targets


def test_actions_have_a_major_version_and_pip_is_cached(workflow):
    actions = [step for step in steps_of(workflow) if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in actions)
    setups = [step["with"] for step in actions if "setup-python" in step["uses"]]
    for setup in setups:
        assert setup["cache"] == "pip"
        for file in setup["cache-dependency-path"].split():
            assert (REPOSITORY / file).is_file()


def test_the_oldest_and_the_newest_python_are_tested(workflow, project):
    versions = workflow["jobs"]["test-fast"]["strategy"]["matrix"]["python-version"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert versions == [named[0], named[-1]]


@pytest.mark.parametrize("name", FORMS)
def test_an_issue_form_has_what_github_requires(name):
    form = loaded(FOLDER / "ISSUE_TEMPLATE" / name)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_vulnerabilities_are_reported_at_the_address_of_the_security_policy():
    [link] = loaded(FOLDER / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
    assert link["url"] in (REPOSITORY / "SECURITY.md").read_text("utf-8")


def test_the_citation_is_of_this_version_and_project(project):
    citation = loaded(REPOSITORY / "CITATION.cff")
    # What the schema of the Citation File Format requires, and its spelling of the version.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["repository-code"] == project["urls"]["Homepage"]
