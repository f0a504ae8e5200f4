import importlib
import re

import selectmoe.errors
from selectmoe.errors import SelectMoeError


def depths_below(error, depth=0):
    """The classes of the project that are `error` or derive from it, by name, with their depth."""
    found = {error.__name__: depth}
    for subclass in error.__subclasses__():
        if subclass.__module__.split(".")[0] in ("selectmoe", "jobs", "serve"):
            found |= depths_below(subclass, depth + 1)
    return found


def test_the_tree_in_the_docstring_has_every_error_at_its_place(repository):
    for package in ("selectmoe", "jobs", "serve"):
        for file in (repository / package).rglob("*.py"):
            if re.search(r"^class \w+Error\(", file.read_text("utf-8"), re.MULTILINE):
                name = file.relative_to(repository).with_suffix("")
                importlib.import_module(".".join(name.parts))
    drawn = re.findall(r"^((?: {4}|│   |├── |└── )+)(\w+Error)\b", selectmoe.errors.__doc__, re.M)
    # Every level is drawn four columns wide, and the root stands four columns in.
    assert {name: len(lines) // 4 - 1 for lines, name in drawn} == depths_below(SelectMoeError)
