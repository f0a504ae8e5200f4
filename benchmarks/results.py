"""What every benchmark says of itself, and where its numbers go: benchmarks/results/."""

import contextlib
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from benchmarks.result_text import as_text
from selectmoe.errors import SelectMoeError

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user got wrong ends the run in one line."""
    try:
        yield
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except SelectMoeError as error:
        sys.exit(f"error: {error}")


def describe_run() -> dict[str, object]:
    """Date, commit, command and machine of this run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """The short hash of HEAD, with a plus where the tree has changes."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"],
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or "unknown"


def print_result(result: dict[str, object]) -> None:
    """All there is of a quick run, whose numbers are not to be kept."""
    print(as_text(result), end="\n\n", flush=True)


def write_result(name: str, result: dict[str, object], *, printed: bool = True) -> None:
    """Prints the numbers and keeps them in benchmarks/results/<name>.json."""
    if printed:
        print_result(result)
    text = json.dumps(result, indent=1)
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
