"""Imports go down only, and looking at the package costs no torch (DESIGN: "The house").

jobs | serve  ->  training | evaluation | scoring  ->  data | model | the pure modules
              ->  records | config | errors
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# A module may import from its own layer (where SIDEWAYS does not forbid it) and from lower ones.
# Top to bottom; a name stands for the module or for the package and all in it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("jobs", "serve"),
    (
        "selectmoe.training",
        "selectmoe.evaluation",
        "selectmoe.scoring",
        "selectmoe.scoring_model",
        "selectmoe.packed_scoring",
        "selectmoe.scored_shards",
        "selectmoe.score_blocks",
        "selectmoe.score_passes",
        "selectmoe.selected_data",
        "selectmoe.client",
    ),
    (
        "selectmoe.data",
        "selectmoe.model",
        "selectmoe.registration",
        "selectmoe.quality_losses",
        "selectmoe.gate_scores",
        "selectmoe.selection",
        "selectmoe.calibration",
        "selectmoe.score_requests",
    ),
    (
        "selectmoe.records",
        "selectmoe.config",
        "selectmoe.config_loading",
        "selectmoe.target_config",
        "selectmoe.errors",
        "selectmoe.hub_access",
        "selectmoe.paths",
    ),
)
PURE = ("selectmoe.quality_losses", "selectmoe.gate_scores", "selectmoe.selection")
NOT_IN_THE_PACKAGE = ("ray", "fastapi", "jobs", "serve")
WITHOUT_TORCH = (
    "selectmoe",
    "selectmoe.calibration",
    "selectmoe.client",
    "selectmoe.config_loading",
    "selectmoe.errors",
    "selectmoe.records",
)


def module_name(path: Path, *, root: Path = REPOSITORY) -> str:
    """jobs/select.py -> jobs.select; selectmoe/data/__init__.py -> selectmoe.data"""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, *, package: str) -> set[str]:
    """Absolute names of everything imported anywhere in a file, inside functions too.

    `from selectmoe import scoring` gives both selectmoe and selectmoe.scoring.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imports_by_module(*packages: str) -> dict[str, set[str]]:
    found = {}
    for path in sorted(path for name in packages for path in (REPOSITORY / name).rglob("*.py")):
        name = module_name(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[name] = imported_modules(tree, package=package)
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> int | None:
    """The layer's number from the top; None for what is no module of ours, or in no layer."""
    for number, members in enumerate(LAYERS):
        if any(is_within(name, member) for member in members):
            return number
    return None


def breaches(importers: dict[str, set[str]], *, of: tuple[str, ...]) -> list[str]:
    return sorted(
        f"{module} imports {name}"
        for module, names in importers.items()
        for name in names
        if any(is_within(name, forbidden) for forbidden in of)
    )


def test_the_package_never_imports_ray_http_or_the_rims() -> None:
    assert breaches(imports_by_module("selectmoe"), of=NOT_IN_THE_PACKAGE) == []


def test_jobs_and_serve_do_not_import_each_other() -> None:
    assert breaches(imports_by_module("jobs"), of=("serve",)) == []
    assert breaches(imports_by_module("serve"), of=("jobs",)) == []


def test_every_module_of_the_package_has_a_layer() -> None:
    modules = imports_by_module("selectmoe")
    assert [name for name in modules if name != "selectmoe" and layer_of(name) is None] == []


def test_imports_go_down_only() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, names in imports_by_module("selectmoe", "jobs", "serve").items()
        for name in names
        if (own := layer_of(module)) is not None
        and (other := layer_of(name)) is not None
        and other < own
    ]
    assert upwards == []


def test_the_model_files_that_travel_to_the_hub_know_nothing_else_of_the_package() -> None:
    travelling = ("configuration_select_moe", "modeling_select_moe")
    imported = imports_by_module("selectmoe/model")
    assert [
        f"{module} imports {name}"
        for module, names in imported.items()
        for name in names
        if module.endswith(travelling)
        and is_within(name, "selectmoe")
        and not is_within(name, "selectmoe.model")
    ] == []


def test_the_pure_modules_see_no_file_logger_or_setting() -> None:
    impure = ("os", "pathlib", "logging", "selectmoe.config", "selectmoe.data", "selectmoe.model")
    pure = {name: names for name, names in imports_by_module("selectmoe").items() if name in PURE}
    assert breaches(pure, of=impure) == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_loads_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'ray', 'datasets'}"
    # A fresh process: in this one another test has long imported torch.
    script = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n    import ray.data", {"ray.data"}),
        ("from selectmoe import scoring", {"selectmoe", "selectmoe.scoring"}),
        ("from . import chat", {"selectmoe.data", "selectmoe.data.chat"}),
        ("from ..scoring import x", {"selectmoe.scoring", "selectmoe.scoring.x"}),
    ],
)
def test_an_import_is_found_in_every_form(source: str, expected: set[str]) -> None:
    assert imported_modules(ast.parse(source), package="selectmoe.data") == expected
