"""Print what a selection run dropped: the rows with the lowest scores, and what of each dataset.

python recipes/dropped_rows.py outputs/stage_2_selection/DATE/TIME
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

WIDTH = 100  # characters of a text that are printed


def scored_rows(run: Path) -> pa.Table:
    """Dataset, id, score and messages of every row that has a score, the lowest score first."""
    scored = pq.read_table(run / "scored", columns=["row_key", "dataset", "id", "score"])
    files = sorted((run / "corpus").glob("shard-*.parquet"))
    texts = pa.concat_tables(pq.read_table(f, columns=["row_key", "messages"]) for f in files)
    texts = texts.append_column("position", pa.array(range(len(texts))))
    # A join takes no column of lists.
    joined = scored.join(texts.drop_columns(["messages"]), "row_key").sort_by("score")
    joined = joined.filter(pc.is_valid(joined["score"]))
    return joined.append_column("messages", texts["messages"].take(joined["position"]))


def share_lines(rows: pa.Table, *, num_kept: int) -> list[str]:
    """How many rows each dataset has among all scored ones, the kept ones and the lowest fifth."""
    parts = (rows, rows.slice(len(rows) - num_kept), rows.slice(0, len(rows) // 5))
    counts = [_counts(part) for part in parts]
    lines = [f"{'dataset':<24} {'scored':>8} {'best':>8} {'worst 20 %':>12}"]
    for name, total in sorted(counts[0].items()):
        best, worst = (count.get(name, 0) for count in counts[1:])
        lines.append(f"{name:<24} {total:>8,} {best:>8,} {worst:>12,}")
    return lines


def _counts(rows: pa.Table) -> dict[str, int]:
    entries = pc.value_counts(rows["dataset"]).to_pylist()
    return {str(entry["values"]): int(entry["counts"]) for entry in entries}


def shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a selection run")
    parser.add_argument("--num-rows", type=int, default=10, help="rows to print")
    args = parser.parse_args(arguments)
    rows = scored_rows(args.run)
    with (args.run / "selected_data.jsonl").open("rb") as selected:
        num_kept = sum(1 for _ in selected)
    print("\n".join(share_lines(rows, num_kept=num_kept)))
    print(f"\nthe {args.num_rows} rows with the lowest scores:")
    for row in rows.slice(0, args.num_rows).to_pylist():
        print(f"\n{row['score']:.4f}  {row['dataset']}  {row['id']}")
        for message in row["messages"]:
            print(f"  {message['role']}: {shortened(message['content'])}")


if __name__ == "__main__":
    main()
