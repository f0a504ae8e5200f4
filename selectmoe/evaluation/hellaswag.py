"""Cleans the text of HellaSwag rows as lm-eval's own task does, so that accuracies are comparable.

>>> clean_row({"activity_label": "Baking", "ctx": "[header] Bake. the man", "choices": ["eats."]})
{'query': 'Baking: Bake. The man', 'choices': ['eats.']}
"""

import re
from collections.abc import Mapping
from typing import Any

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def is_hellaswag(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(key), str) for key in ("ctx", "activity_label"))


def with_choices(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with 'choices' and 'answer', which the hub's dataset names 'endings' and 'label'."""
    if "choices" in row or "endings" not in row:
        return dict(row)
    label = row.get("label")
    is_number = isinstance(label, str) and label.isdecimal()
    answer = int(str(label)) if is_number else label
    return {**row, "choices": row["endings"], "answer": answer}


def clean_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval asks: the cleaned text before the choices, and the cleaned choices."""
    row = with_choices(row)
    cleaned = {
        "query": clean(f"{row['activity_label']}: {_context(row)}"),
        "choices": [clean(choice) for choice in row["choices"]],
    }
    return cleaned | ({"answer": row["answer"]} if "answer" in row else {})


def clean(text: str) -> str:
    """Without the marks of WikiHow: " [title]" ends a sentence, and other brackets are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _context(row: Mapping[str, Any]) -> str:
    """'ctx' with its unfinished last sentence capitalized, which begins in lower case."""
    before, last = row.get("ctx_a"), row.get("ctx_b")
    if isinstance(before, str) and isinstance(last, str):
        return f"{before} {last.capitalize()}"
    *_, last = _SENTENCE_END.split(str(row["ctx"]))
    if not last[:1].islower():
        return str(row["ctx"])
    return str(row["ctx"]).removesuffix(last) + last.capitalize()
