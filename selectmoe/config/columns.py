"""How the columns of a corpus are read: under which names, and what becomes of unknown ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from selectmoe.errors import ConfigError

LAYOUT_COLUMNS = (
    "messages", "conversations", "conversation", "instruction", "prompt", "question", "query",
    "input", "context", "output", "response", "completion", "answer", "text", "system",
    "system_prompt", "history", "tools", "dataset", "id",
)  # fmt: skip
"""The columns that a row is read from; `data/layouts.py` says which of them make a row."""


@dataclass(frozen=True, slots=True)
class ColumnRules:
    """Which columns of a row are read as what."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The corpus's own name of a column, by the name in LAYOUT_COLUMNS."""
    keeps_extra: bool = True
    """Whether samples keep the columns, and the keys of messages, that are not read."""

    def wanted_columns(self) -> frozenset[str] | None:
        """The columns of a table that are read at all; None is all of them."""
        return None if self.keeps_extra else frozenset((*LAYOUT_COLUMNS, *self.names.values()))


def check_columns(names: Mapping[str, str]) -> None:
    """Raises ConfigError for a name that is no column of a layout."""
    for name in names:
        if name not in LAYOUT_COLUMNS:
            known = ", ".join(LAYOUT_COLUMNS)
            raise ConfigError(f"columns must map some of {known} to columns, got {name!r}")
