"""The layouts of a row: which of its columns are the turns of a conversation.

A row is read whole. Where two layouts have values in one row, the first of LAYOUTS counts, and the
columns of the other are extra columns.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectmoe.config.columns import ColumnRules
from selectmoe.data.json_text import NoJsonError, raw_json
from selectmoe.data.message_fields import is_missing
from selectmoe.data.messages import TurnReader, as_list, from_json, join_parts, require_answer
from selectmoe.data.row_errors import RowError, abridge, abridge_keys, require_encodable
from selectmoe.records import Message

TURN_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("instruction", "prompt", "question", "query", "input")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
# The first ones, which the first version knew, stay first: a row that has several layouts is read
# as it was then.
_FIRST = (
    ("messages",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("text",),
)
LAYOUTS: tuple[tuple[str, ...], ...] = tuple(
    dict.fromkeys(
        (
            *_FIRST,
            *((column,) for column in TURN_COLUMNS),
            *itertools.product(QUESTION_COLUMNS, ANSWER_COLUMNS),
        )
    )
)
"""The columns that must be there: one with all turns, or a question and its answer."""
CONTEXT_COLUMNS = ("input", "context")  # belong to the question, after a blank line
SYSTEM_COLUMNS = ("system", "system_prompt")
HISTORY_COLUMN = "history"  # [[question, answer], …] before the question
TOOLS_COLUMN = "tools"
_BESIDE = frozenset((*SYSTEM_COLUMNS, TOOLS_COLUMN))
_COLUMNS = {layout: frozenset(layout) for layout in LAYOUTS}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a row, and what it was read from."""

    messages: tuple[Message, ...]
    tools: str  # as JSON; empty without any
    columns: frozenset[str]  # that were read


def read_conversation(row: Mapping[str, Any], rules: ColumnRules) -> Conversation:
    """Raises RowError for a row in no known layout, or whose conversation breaks a rule."""
    named = rename_columns(row, rules.names)
    layout = find_layout(named, row, rules.names)
    reader = _RowReader(named, rules.keeps_extra)
    messages = reader.messages(layout)
    require_answer(messages)
    if not reader.also_read and not rules.names:
        return Conversation(messages, reader.tools, _COLUMNS[layout])
    columns = (rules.names.get(column, column) for column in (*layout, *reader.also_read))
    return Conversation(messages, reader.tools, frozenset(columns))


def rename_columns(row: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with the columns that `names` names as layouts name them.

    Where a column of a layout has a name of its own, no other column makes a layout.
    """
    if not names:
        return row
    renamed = {name: row[column] for name, column in names.items() if column in row}
    if set(names) <= {"dataset", "id"}:
        return {**row, **renamed}
    return renamed


def find_layout(
    named: Mapping[str, Any], row: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[str, ...]:
    if not is_missing(named.get("messages")):
        return LAYOUTS[0]
    # A table of several layouts has the columns of all in every row, null in the unused ones. Only
    # if no layout has values does one count whose keys exist: its error message is the clearest.
    for is_there in (lambda key: not is_missing(named.get(key)), lambda key: key in named):
        for layout in LAYOUTS:
            if all(map(is_there, layout)):
                return layout
    got = f"got the keys {abridge_keys(row)}"
    if names:
        given = ", ".join(f"{name}: {column}" for name, column in names.items())
        raise RowError("unknown_layout", f"a row must have the columns of {{{given}}}, {got}")
    raise RowError(
        "unknown_layout",
        f"a row must have {', '.join(TURN_COLUMNS)} or text, or a question "
        f"({', '.join(QUESTION_COLUMNS)}) with its answer ({', '.join(ANSWER_COLUMNS)}), {got}; "
        "dataset.columns={prompt: COLUMN, response: COLUMN} names other columns",
    )


def without_null_keys(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a table, without what its objects lack: there all have the keys of all others.

    Only objects in which a null changes what a template writes: tools, and turns with more keys
    than their role and content.
    """
    for column in (*TURN_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, TOOLS_COLUMN):
        value = row.get(column)
        if not isinstance(value, list) or not value or not isinstance(value[0], dict):
            continue
        if column == TOOLS_COLUMN or len(value[0]) != 2:
            row = {**row, column: _without_nulls(value)}
    return row


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


@dataclass(slots=True)
class _RowReader:
    """Reads one row; remembers which columns it has read beside those of the layout."""

    row: Mapping[str, Any]
    keeps_extra: bool
    also_read: tuple[str, ...] = ()
    tools: str = ""

    def messages(self, layout: tuple[str, ...]) -> tuple[Message, ...]:
        if layout == ("text",):
            return (_message("assistant", self.row["text"], "text"),)
        if len(layout) == 1:
            turns = TurnReader(layout[0], self.keeps_extra).read(self.row[layout[0]])
            if not turns:
                raise RowError("messages_empty", f"{layout[0]!r} must not be empty")
        else:
            turns = self._question_and_answer(*layout)
        if _BESIDE.isdisjoint(self.row):  # as in most corpora
            return turns
        self.tools = self._read_tools()
        return with_system(self._texts(SYSTEM_COLUMNS), turns)

    def _question_and_answer(self, question: str, answer: str) -> tuple[Message, ...]:
        asked = self._side(question, "user")
        added = self._texts([column for column in CONTEXT_COLUMNS if column != question])
        if added:
            last = asked[-1]
            content = "\n\n".join([last.content, *added])
            asked = (*asked[:-1], Message(last.role, content, last.fields))
        return (*self._history(), *asked, *self._side(answer, "assistant"))

    def _side(self, column: str, role: str) -> tuple[Message, ...]:
        """A text, text parts, or the list of messages that TRL writes there."""
        value = self.row[column]
        if isinstance(value, list | tuple) and _has_turns(value):
            return TurnReader(column, self.keeps_extra).read(value)
        return (_message(role, value, column),)

    def _history(self) -> Iterable[Message]:
        if not self._read(HISTORY_COLUMN):
            return
        pairs = as_list(self.row[HISTORY_COLUMN], HISTORY_COLUMN)
        if _has_turns(pairs):
            yield from TurnReader(HISTORY_COLUMN, self.keeps_extra).read(pairs)
            return
        for index, pair in enumerate(pairs):
            texts = pair.tolist() if hasattr(pair, "tolist") else pair
            if not isinstance(texts, list | tuple) or len(texts) != 2:
                raise RowError(
                    "history_wrong_type",
                    f"'history' must be pairs of question and answer, got {abridge(pair)} at "
                    f"[{index}]",
                )
            for role, text in zip(("user", "assistant"), texts, strict=True):
                yield _message(role, text, f"history[{index}]")

    def _texts(self, columns: Sequence[str]) -> list[str]:
        """The texts of these columns that are not empty; a list of texts counts as several."""
        texts = []
        for column in filter(self._read, columns):
            value = self.row[column]
            value = value.tolist() if hasattr(value, "tolist") else value
            parts = value if _is_texts(value) else [_message("user", value, column).content]
            texts += [part for part in parts if part]
        for text in texts:
            require_encodable(text, " or ".join(columns))
        return list(dict.fromkeys(texts))

    def _read_tools(self) -> str:
        if not self._read(TOOLS_COLUMN):
            return ""
        tools = [from_json(tool) for tool in as_list(self.row[TOOLS_COLUMN], TOOLS_COLUMN)]
        for index, tool in enumerate(tools):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise RowError(
                    "tools_wrong_type",
                    f"'tools' must be functions with a name, got {abridge(tool)} at [{index}]",
                )
        try:
            text = raw_json(tools) if tools else ""
        except NoJsonError as error:
            raise RowError("column_unusable", f"'tools' has no form in JSON: {error}") from None
        require_encodable(text, "'tools' as JSON")
        return text

    def _read(self, column: str) -> bool:
        """Whether the row has a value in this column, which then counts as read."""
        value = self.row.get(column)
        if is_missing(value) or (isinstance(value, str) and not value):
            return False
        self.also_read = (*self.also_read, column)
        return True


def with_system(texts: Sequence[str], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns after a system turn of these texts, which becomes a part of one that is there."""
    if turns and turns[0].role == "system":
        first = turns[0]
        missing = [text for text in texts if text != first.content]
        content = "\n\n".join([*missing, first.content])
        return (Message("system", content, first.fields), *turns[1:])
    return (Message("system", "\n\n".join(texts)), *turns) if texts else turns


def _message(role: str, value: object, name: str) -> Message:
    text, _ = join_parts(value, repr(name))
    if not isinstance(text, str):
        raise RowError("messages_wrong_type", f"{name!r} must be text, got {abridge(text)}")
    require_encodable(text, repr(name))
    return Message(role, text)


def _has_turns(value: Sequence[object]) -> bool:
    return bool(value) and all(
        isinstance(entry, Mapping) and ("role" in entry or "from" in entry) for entry in value
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
