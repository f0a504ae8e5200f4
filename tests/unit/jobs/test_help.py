"""The --help of all commands: quick, and in sentences that stand by themselves."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPTS = tuple(
    f"jobs/{stage}.py"
    for stage in ("convert", "pretrain", "select", "finetune", "evaluate", "fit_weights")
)
COMMANDS = (
    *SCRIPTS,
    "selectmoe select",
    "selectmoe score",
    "selectmoe calibrate",
    "selectmoe convert",
)
HEAVY = ("torch", "transformers", "ray", "hydra", "omegaconf", "datasets", "lm_eval")
# Words for which the libraries that a reader knows have terms of their own.
BANNED = (
    "row edges", "row starts", "place", "places", "rectangle", "end to end", "who scores", "roll",
    "cut", "added up", "shares out", "passes over", "worse", "mark", "note", "numbers",
    "the longest that is read", "tokenise", "data set", "go on",
)  # fmt: skip


@functools.cache
def help_and_modules(command: str) -> tuple[str, set[str]]:
    """What `COMMAND --help` prints, and which heavy modules it loads."""
    run = f"run_path('{command}', " if command in SCRIPTS else "run_module('selectmoe', "
    script = (
        "import runpy, sys\n"
        f"sys.argv = [*{command.split()!r}, '--help']\n"
        "try:\n"
        f"    runpy.{run}run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        f"print(*({set(HEAVY)!r} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout, set(done.stderr.split())


def texts(command: str) -> dict[str, str]:
    """The help of each option and setting, by its name."""
    printed, _ = help_and_modules(command)
    found: dict[str, str] = {}
    name = ""
    for line in printed.partition("\npositional arguments:\n")[2].splitlines():
        if re.match(r"  \S", line):
            name, text = (*re.split(r"\s{2,}", line.strip(), maxsplit=1), "")[:2]
            found[name] = text
        elif line.startswith("   "):
            found[name] = f"{found[name]} {line.strip()}".strip()
    del found["-h, --help"]  # argparse's own
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_heavy_module(command: str) -> None:
    printed, loaded = help_and_modules(command)
    assert printed.startswith("usage: ")
    assert loaded == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_is_a_sentence_or_a_noun_phrase_by_itself(command: str) -> None:
    found = texts(command)
    assert len(found) >= 10
    for name, text in found.items():
        assert text[0].isupper(), f"{name}: {text}"
        assert text.endswith("."), f"{name}: {text}"
        assert not text.startswith("Of "), f"{name}: {text}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_the_words_of_the_field(command: str) -> None:
    printed, _ = help_and_modules(command)
    words = " ".join(printed.split()).lower()
    assert [term for term in BANNED if re.search(rf"\b{re.escape(term)}\b", words)] == []
