"""What the documents refer to exists: files, modules, links and headings."""

import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("recipes/*.md"),
        *REPOSITORY.glob("selectmoe/assets/*/*.md"),
    )
)
# Dated entries keep the commands and paths of their day.
UNDATED = [name for name in DOCUMENTS if name not in ("docs/experiments.md", "CHANGELOG.md")]
FOLDERS = "selectmoe|jobs|serve|recipes|benchmarks|tools|tests|docs|examples"
PATH = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*)")
MODULE = re.compile(r"`((?:selectmoe|jobs|serve)(?:\.(?!yaml)[A-Za-z_]\w*)+)[`(:]")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Words for which the field has a term; see "Code style" in CONTRIBUTING.md.
BANNED = re.compile(
    r"\b(rectangles?|end to end|worse cop(y|ies)|roll call|a coin|data sets?|tokenis\w+|"
    r"normalis\w+|row edges|row starts|thrown away|cut again|goes? on)\b"
)
HEADING = re.compile(r"^#+ (.+)$", re.M)


@cache
def read(name: str) -> str:
    return (REPOSITORY / name).read_text("utf-8")


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(read(name)))
    return {title.replace(" ", "-") for title in titles}


def without_links_out(text: str) -> str:
    return re.sub(r"https?://\S+", "", text)


@pytest.mark.parametrize("name", UNDATED)
def test_every_path_in_a_document_exists(name):
    paths = {path.rstrip(".") for path in PATH.findall(without_links_out(read(name)))}
    missing = [path for path in sorted(paths) if not any(REPOSITORY.glob(path.rstrip("/")))]
    assert not missing


def module_text(module: str) -> str:
    """The source of a module or package; empty if there is none."""
    path = REPOSITORY / module.replace(".", "/")
    files = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
    return files[0].read_text("utf-8") if files else ""


@pytest.mark.parametrize("name", UNDATED)
def test_every_module_and_name_in_a_document_exists(name):
    missing = []
    for dotted in sorted(set(MODULE.findall(read(name)))):
        parent, _, last = dotted.rpartition(".")
        if not module_text(dotted) and last not in module_text(parent):
            missing.append(dotted)
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_and_anchor_resolves(name):
    broken = []
    for link in LINK.findall(read(name)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = ((REPOSITORY / name).parent / target if target else REPOSITORY / name).resolve()
        found = path.exists()
        if found and anchor:
            found = anchor in anchors(path.relative_to(REPOSITORY).as_posix())
        if not found:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "docs/architecture.md"])
def test_documents_use_the_terms_of_the_field(name):
    assert [match.group() for match in BANNED.finditer(read(name))] == []
