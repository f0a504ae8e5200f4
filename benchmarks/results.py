"""What all benchmarks share: description of the run, printing, files in benchmarks/results/."""

import contextlib
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import transformers

from benchmarks.result_text import as_text
from selectmoe.errors import SelectMoeError

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the run with a one-line message on an error that the user can fix."""
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
    """The short hash of HEAD, with a plus if the working tree has changes."""
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"],
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def report(name: str, measured: Mapping[str, object], *, quick: bool) -> None:
    """Prints the measurements and writes them to benchmarks/results/<name>.json.

    quick: prints only, since the numbers of a quick run are too noisy to keep.
    """
    result = {**describe_run(), **measured}
    print(as_text(result), end="\n\n", flush=True)
    if not quick:
        write_result(name, result)


def write_result(name: str, result: Mapping[str, object]) -> None:
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
