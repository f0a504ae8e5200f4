"""What `selection.rank_by` says: a signal, or weights of signals, also from a file."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selectmoe.errors import ConfigError

GATE = "gate"
NEEDS_NO_SIGNAL = (GATE, "length")  # every scored row has them
RANKED_SIGNALS = (*NEEDS_NO_SIGNAL, "nll", "pmi", "router_entropy")
_ENTRY = re.compile(r"\s*['\"]?(\w+)['\"]?\s*:\s*([^\s/]+)\s*(?:/\s*(\S+)\s*)?")


@dataclass(frozen=True, slots=True)
class RankWeight:
    """A signal counts with weight / deviation."""

    weight: float
    deviation: float | None  # None: of the scored rows of the corpus


def parse_rank_by(rank_by: str) -> dict[str, RankWeight]:
    """Weights by signal.

    "pmi" is {pmi: 1}, and "-nll" is {nll: -1}. In "{gate: 1, pmi: 0.5/0.31}" the gate is divided
    by its standard deviation in the corpus, and pmi by 0.31.
    Raises ConfigError for what is neither a signal nor weights.
    """
    text = rank_by.strip()
    if not text.startswith("{"):
        name = text.removeprefix("-")
        return {_known(name, rank_by): RankWeight(-1.0 if name != text else 1.0, None)}
    entries = [_ENTRY.fullmatch(entry) for entry in text.strip("{}").split(",")]
    triples = [entry.groups() for entry in entries if entry]
    if len(triples) < len(entries) or len({name for name, *_ in triples}) < len(triples):
        raise _no_rank(rank_by)
    weights = {
        _known(name, rank_by): RankWeight(
            _number(weight, rank_by), None if deviation is None else _number(deviation, rank_by)
        )
        for name, weight, deviation in triples
    }
    if any(w.deviation is not None and w.deviation <= 0 for w in weights.values()):
        raise _no_rank(rank_by)
    if not any(entry.weight for entry in weights.values()):
        raise ConfigError(f"rank_by must have a weight other than 0, got {rank_by!r}")
    return weights


def resolve_rank_by(rank_by: str) -> str:
    """The weights in a file of `jobs/fit_weights.py` as text, so that a run does not depend on the
    file; anything else as it is. Raises ConfigError where the file cannot be read."""
    path = Path(rank_by).expanduser()
    if path.suffix != ".json":
        return rank_by
    try:
        signals = json.loads(path.read_text("utf-8"))["signals"]
        entries = [
            f"{name}: {float(entry['weight'])!r}/{float(entry['deviation'])!r}"
            for name, entry in signals.items()
        ]
    except OSError as error:
        raise ConfigError(f"rank_by: {path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"rank_by: {path} must be a weights.json of jobs/fit_weights.py, with weight and "
            "deviation of each of its signals"
        ) from error
    return f"{{{', '.join(entries)}}}"


def require_ranked_signals(rank_by: str, stored: Mapping[str, object] | tuple[str, ...]) -> None:
    """Raises ConfigError for a signal that is not among the stored ones of the rows."""
    for name in parse_rank_by(rank_by):
        if name not in NEEDS_NO_SIGNAL and name not in stored:
            raise ConfigError(
                f"selection.rank_by={rank_by} needs the signal {name}, which the scored rows do "
                f"not have; score them with scoring.signals=[{name}]"
            )


def _known(name: str, rank_by: str) -> str:
    if name not in RANKED_SIGNALS:
        raise _no_rank(rank_by)
    return name


def _number(text: str, rank_by: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise _no_rank(rank_by) from None
    if not math.isfinite(number):
        raise _no_rank(rank_by)
    return number


def _no_rank(rank_by: str) -> ConfigError:
    return ConfigError(
        f"rank_by must be one of {', '.join(RANKED_SIGNALS)}, weights of them such as "
        f"{{gate: 1, pmi: 0.5}}, or a file weights.json, got {rank_by!r}"
    )
