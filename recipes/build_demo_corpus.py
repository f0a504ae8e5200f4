"""Build the demo corpus: conversations written for it, and corrupted copies of some of them.

    python recipes/build_demo_corpus.py

Reads recipes/demo_conversations.jsonl and writes selectmoe/assets/demo_corpus.jsonl. The dataset of
clean rows is "demo", that of corrupted copies "demo_corrupted"; `kind` and the id of a copy name
the kind of corruption. All kinds have about the same number of copies.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.held_out_rows import messages_of, read_samples  # noqa: E402
from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt  # noqa: E402
from selectmoe.data.writers import write_jsonl  # noqa: E402
from selectmoe.records import Sample  # noqa: E402

SOURCE = ROOT / "recipes" / "demo_conversations.jsonl"
TARGET = ROOT / "selectmoe" / "assets" / "demo_corpus.jsonl"
# The kinds that existed when the corpus was made. Results in docs/experiments.md depend on it, so
# later kinds are not added.
KINDS = tuple(CORRUPTIONS)[:16]
NUM_ROWS = 600
SEED = 0


def corrupted_copies(samples: list[Sample], num_copies: int) -> Iterator[tuple[str, Sample]]:
    """Yields (kind, copy) for the first samples, each by the kind with the fewest copies so far."""
    num_made: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for sample in samples[:num_copies]:
        for kind, _ in reversed(num_made.most_common()):
            copy = corrupt(sample, kind=kind, seed=SEED, donors=samples)
            if copy is not None:
                num_made[kind] += 1
                yield kind, replace(copy, dataset="demo_corrupted")
                break
        else:
            raise SystemExit(f"no kind of corruption applies to {sample.sample_id}")


def as_row(sample: Sample, kind: str) -> dict[str, object]:
    messages = messages_of(sample)
    return {"dataset": sample.dataset, "id": sample.sample_id, "kind": kind, "messages": messages}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args(arguments)
    samples = read_samples([str(SOURCE)])
    kinds = [json.loads(line)["kind"] for line in SOURCE.read_text("utf-8").splitlines()]
    copies = list(corrupted_copies(samples, NUM_ROWS - len(samples)))
    rows = [as_row(sample, kind) for sample, kind in zip(samples, kinds, strict=True)]
    rows += [as_row(copy, kind) for kind, copy in copies]
    write_jsonl(args.output, rows)
    num_copies = Counter(kind for kind, _ in copies)
    print(f"{len(samples)} clean rows, {len(copies)} corrupted copies: {num_copies}")


if __name__ == "__main__":
    main()
