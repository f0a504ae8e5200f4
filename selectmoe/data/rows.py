"""The input contract: parses a row of a corpus into a Sample, or rejects it with a reason."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectmoe.config.columns import LAYOUT_COLUMNS, ColumnRules
from selectmoe.data.json_text import NoJsonError, is_encodable, json_text
from selectmoe.data.layouts import read_conversation
from selectmoe.data.message_fields import is_missing
from selectmoe.data.row_errors import RowError, abridge
from selectmoe.records import RejectedRow, Sample

# Names are kept in numpy arrays, which are as wide as the longest and drop a NUL at its end.
MAX_NAME_CHARACTERS = 4_096
NAME_COLUMNS = ("dataset", "id")
READ_ALL = ColumnRules()


@dataclass(frozen=True, slots=True)
class RowLocation:
    """Where a row was read, and the dataset it belongs to unless it names one itself."""

    file: str
    row: int  # from 1
    dataset: str
    name: str = ""  # the file as ids have it; empty: its own name

    @property
    def default_id(self) -> str:
        """The id of a row that has none."""
        return f"{self.name or self.file.rpartition('/')[2]}:{self.row}"

    def reject(self, reason: str, detail: str, *, sample_id: str = "") -> RejectedRow:
        return RejectedRow(self.file, self.row, self.dataset, sample_id, reason, detail)


def parse_row(
    row: object, location: RowLocation, rules: ColumnRules = READ_ALL
) -> Sample | RejectedRow:
    """A row in any layout of `data/layouts.py` as a Sample.

    "dataset" and "id" are taken from the row where it has them; all other columns are kept as the
    sample's extra columns.
    """
    # An ABC takes its time to say that a dictionary is a Mapping.
    if type(row) is not dict and not isinstance(row, Mapping):
        return location.reject("not_an_object", f"a row must be a JSON object, got {abridge(row)}")
    own_dataset, own_id = _name(row, "dataset", rules), _name(row, "id", rules)
    dataset, sample_id = own_dataset or location.dataset, own_id or location.default_id
    try:
        conversation = read_conversation(row, rules)
        extra_columns = _extra_columns(row, conversation.columns, rules)
    except RowError as error:
        return RejectedRow(
            location.file, location.row, dataset, sample_id, error.reason, str(error)
        )
    return Sample(
        dataset,
        sample_id,
        conversation.messages,
        f"{location.file}:{location.row}",
        conversation.tools,
        extra_columns,
        own_dataset is None or own_id is None,
    )


def _name(row: Mapping[str, Any], key: str, rules: ColumnRules) -> str | None:
    """A name as text: 7 is "7", 1.0 is "1.0", true is "true". Empty where there is none; None for
    one that no file can hold or that is a list or an object: it costs the row its name only."""
    value = row.get(rules.names.get(key, key) if rules.names else key)
    if value is None:
        return ""
    name = value if type(value) is str else _scalar_text(value)
    if name is None or len(name) > MAX_NAME_CHARACTERS or "\0" in name:
        return None
    return name if is_encodable(name) else None


def _scalar_text(value: Any) -> str | None:  # noqa: ANN401 (what a row holds)
    """As JSON has it; what JSON does not have (a date, a decimal) as Python writes it."""
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if value is None or value != value:
        return ""  # NaN is what pandas writes for no value
    if isinstance(value, list | tuple | Mapping | bytes):
        return None
    try:
        return json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    except ValueError:  # a number of 5,000 digits
        return None


def _extra_columns(row: Mapping[str, Any], read: frozenset[str], rules: ColumnRules) -> str:
    """The columns that nothing has read, as JSON; without what a layout that is not used has not.

    {"id": "a", "text": "Hi.", "category": "greeting", "prompt": null} -> {"category": "greeting"}
    """
    if not rules.keeps_extra:
        return ""
    names: Sequence[str] = NAME_COLUMNS
    if rules.names:
        names = [rules.names.get(name, name) for name in NAME_COLUMNS]
    if len(row) == len(read) + (names[0] in row) + (names[1] in row):
        return ""  # as in most corpora
    extra = {
        column: value
        for column, value in row.items()
        if column not in read
        and column not in names
        and not (column in LAYOUT_COLUMNS and _is_nothing(value))
    }
    try:
        return json_text(extra) if extra else ""
    except NoJsonError as error:
        raise RowError(
            "column_unusable",
            f"a column that is no part of the conversation has no form in JSON: {error}; "
            "dataset.extra_columns=drop leaves such columns out",
        ) from None


def _is_nothing(value: object) -> bool:
    return is_missing(value) or (isinstance(value, str | list) and not value)
