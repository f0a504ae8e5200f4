"""docs/architecture.md says of the code what is so: its tree, its steps and its private names."""

import ast
import re
from pathlib import Path

import pytest

from tools.draw_architecture import BEGIN, END, FOLDERS, PAGE, REPOSITORY, caption, with_tree


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def names_in(file: str) -> set[str]:
    """Functions and classes of a file; of a method `Class.method`, too."""
    tree = ast.parse((REPOSITORY / file).read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in tree.body if isinstance(node, kinds)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, kinds)}
    return names


def test_the_tree_is_that_of_today(page):
    assert page == with_tree(page), "run `make architecture`"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_has_a_caption_that_is_a_sentence(folder):
    captions = {path: caption(path) for path in (REPOSITORY / folder).rglob("*.py")}
    assert [path for path, text in captions.items() if not text.endswith((".", "?"))] == []


def test_every_step_names_a_function_that_exists(page):
    steps = re.findall(r"`([\w/]+\.py):([\w.]+)`", page)
    assert len(steps) > 20
    assert [f"{file}:{name}" for file, name in steps if name not in names_in(file)] == []


def test_every_private_interface_is_used_where_the_page_says(page):
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    assert len(rows) > 10
    for name, files in rows:
        for file in re.findall(r"`([\w/]+\.py)`", files):
            assert name.rpartition(".")[2] in (REPOSITORY / file).read_text("utf-8"), (name, file)


def test_every_private_name_that_is_used_is_on_the_page(page):
    files = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    texts = [path.read_text("utf-8") for path in files]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    ours |= {node.attr for node in attributes if ast.unparse(node.value) == "self"}
    used = {node.attr for node in attributes} - ours
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    private = {
        name for name in used | set(".".join(modules).split(".")) if re.match("_[a-z]", name)
    }
    private |= set(re.findall(r"RAY_(?:SERVE|TRAIN|DATA|ACCEL)_[A-Z_]+", "".join(texts)))
    assert "_yaml_loader" in private
    assert [name for name in sorted(private) if name not in page] == []


def test_a_caption_is_the_first_sentence_without_its_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text('"""Reads .jsonl and\n.parquet, e.g. a.jsonl. And more.\n\nDetails."""\n')
    assert caption(file) == "Reads .jsonl and .parquet, e.g. a.jsonl."


def test_what_is_written_by_hand_is_kept(monkeypatch):
    monkeypatch.setattr("tools.draw_architecture.FOLDERS", ("serve",))
    page = with_tree(f"Before\n{BEGIN}old tree\n{END}After\n")
    assert page.startswith(f"Before\n{BEGIN}")
    assert page.endswith(f"{END}After\n")
    assert "old tree" not in page
    assert "\nserve/ " in page
