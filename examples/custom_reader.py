"""Selects from a format of your own, here ShareGPT's JSON: `custom_reader.py IN.json OUT.jsonl`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import selectmoe

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def read_sharegpt(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in the layout that every command and `selectmoe.select` read."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        turns = row["conversations"]
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
        yield {"id": row["id"], "dataset": path.stem, "messages": messages}


source, target = map(Path, sys.argv[1:])
kept = selectmoe.select(read_sharegpt(source), pct=0.5).rows
target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "utf-8")
