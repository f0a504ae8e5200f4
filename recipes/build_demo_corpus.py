"""Make the demo corpus: our own conversations, and corrupted copies of them with the kind recorded.

    python recipes/build_demo_corpus.py

Reads recipes/demo_conversations.jsonl and writes selectmoe/assets/demo_corpus.jsonl. Clean rows
belong to the data set "demo", copies to "demo_corrupted"; the kind of a copy stands in its row and
in its id. Each kind has about as many copies as any other.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# A script knows its own folder only; the package lies beside it.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt  # noqa: E402
from selectmoe.data.readers import read_corpus  # noqa: E402
from selectmoe.data.writers import write_jsonl  # noqa: E402
from selectmoe.records import Sample  # noqa: E402

SOURCE = ROOT / "recipes" / "demo_conversations.jsonl"
TARGET = ROOT / "selectmoe" / "assets" / "demo_corpus.jsonl"
NUM_ROWS = 600
SEED = 0


def corrupted_copies(samples: list[Sample], num_copies: int) -> Iterator[tuple[str, Sample]]:
    """Yields (kind, copy) of the first samples: the kind that has had the fewest copies so far."""
    num_made: Counter[str] = Counter(dict.fromkeys(CORRUPTIONS, 0))
    for sample in samples[:num_copies]:
        for kind, _ in reversed(num_made.most_common()):
            copy = corrupt(sample, kind=kind, seed=SEED, donors=samples)
            if copy is not None:
                num_made[kind] += 1
                yield kind, replace(copy, dataset="demo_corrupted")
                break
        else:
            raise SystemExit(f"no kind makes {sample.sample_id} worse")


def as_row(sample: Sample, kind: str) -> dict[str, object]:
    messages = [{"role": m.role, "content": m.content} for m in sample.messages]
    return {"dataset": sample.dataset, "id": sample.sample_id, "kind": kind, "messages": messages}


def main() -> None:
    samples = [row for row in read_corpus(str(SOURCE)) if isinstance(row, Sample)]
    kinds = [json.loads(line)["kind"] for line in SOURCE.read_text("utf-8").splitlines()]
    copies = list(corrupted_copies(samples, NUM_ROWS - len(samples)))
    rows = [as_row(sample, kind) for sample, kind in zip(samples, kinds, strict=True)]
    rows += [as_row(copy, kind) for kind, copy in copies]
    write_jsonl(TARGET, rows)
    print(f"{len(samples)} clean rows, {len(copies)} copies: {Counter(kind for kind, _ in copies)}")


if __name__ == "__main__":
    main()
