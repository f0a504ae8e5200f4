"""Imports go down only, and looking at the package costs no torch (DESIGN: "The house").

jobs | serve  ->  cli  ->  warmup | finetune | evaluation | report | ratings
              ->  training | scoring | selection | client
              ->  corpus | corruptions | model | data  ->  config | records | errors | paths
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Top to bottom; a room or flat module of `selectmoe` imports from its own layer and lower ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("jobs", "serve"),
    ("selectmoe.cli", "selectmoe.__main__", "selectmoe.registration"),
    (
        "selectmoe.warmup",
        "selectmoe.finetune",
        "selectmoe.evaluation",
        "selectmoe.report",
        "selectmoe.ratings",
    ),
    ("selectmoe.training", "selectmoe.scoring", "selectmoe.selection", "selectmoe.client"),
    ("selectmoe.corpus", "selectmoe.corruptions", "selectmoe.model", "selectmoe.data"),
    ("selectmoe.config", "selectmoe.records", "selectmoe.errors", "selectmoe.paths"),
)
MAX_ROOMS = 17
PURE = ("selectmoe.model.quality_losses", "selectmoe.scoring.formulas", "selectmoe.selection.top_k")
NOT_IN_THE_PACKAGE = ("ray", "fastapi", "jobs", "serve")
TOKENIZING = (
    "selectmoe.warmup.rows",
    "selectmoe.finetune.supervised_data",
    "selectmoe.model.tokenizer_loading",
)
WITHOUT_TORCH = (
    "selectmoe",
    "selectmoe.cli.command_line",
    "selectmoe.client",
    "selectmoe.scoring.calibration",
    "selectmoe.config.loading",
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


def rooms() -> dict[str, set[str]]:
    """Each room of `selectmoe`, and the other rooms that its files import."""
    found: dict[str, set[str]] = {}
    for module, names in imports_by_module("selectmoe").items():
        if (REPOSITORY / "selectmoe" / (own := room_of(module))).is_dir() and own:
            others = {room_of(name) for name in names if is_within(name, "selectmoe")}
            found.setdefault(own, set()).update(others - {own, ""})
    return found


def room_of(module: str) -> str:
    """selectmoe.data.chat -> data; selectmoe -> "" """
    return ".".join(module.split(".")[1:2])


def test_rooms_are_few_and_form_no_circle() -> None:
    found = rooms()
    assert 10 < len(found) <= MAX_ROOMS
    TopologicalSorter(found).prepare()  # raises CycleError, which names the circle


def test_a_circle_of_rooms_would_be_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter(rooms() | {"data": {"scoring"}}).prepare()


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for package in ("selectmoe", "jobs", "serve"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(module_name(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


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


@pytest.mark.parametrize("module", TOKENIZING)
def test_what_only_tokenizes_imports_no_code_of_a_model(module: str) -> None:
    """It would cost the driver of a training and every ingress replica two CPU seconds."""
    imported = imports_by_module("selectmoe")
    reached, left = set(), {module}
    while left:
        reached |= left
        left = {name for one in left for name in imported[one] & imported.keys()} - reached
    assert "selectmoe.model.modeling_select_moe" not in reached
    assert "selectmoe.model.configuration_select_moe" in reached  # imports are followed


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
