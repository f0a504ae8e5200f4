"""What a selection has kept, in words, for the report and the table of a run."""

from collections.abc import Mapping
from typing import Any


def describe_rule(selection: Mapping[str, Any], *, num_datasets: int) -> str:
    """ "The best 5 % of the corpus by gate score".

    selection: of a manifest. num_datasets: that have a budget of their own with `per_dataset`.
    """
    of = f"of each of {num_datasets} datasets" if selection["per_dataset"] else "of the corpus"
    budget = selection["budget"]
    amount = {
        "fraction": f"{100 * budget['amount']:g} %",
        "rows": f"{budget['amount']:,g} rows",
        "tokens": "rows",
    }[budget["unit"]]
    seed, temperature = selection.get("seed"), selection.get("temperature")
    kept = {
        "top": f"The best {amount} {of} by {_ranked_by(selection)}",
        "sampled": (
            f"A random sample of {amount} {of} that prefers high gate scores "
            f"(temperature {temperature}, seed {seed})"
        ),
        "random": f"A random sample of {amount} {of} (seed {seed})",
        "longest": f"The {amount} {of} with the longest answers",
    }[selection["strategy"]]
    return ", ".join([kept, *_limits(selection)])


def _ranked_by(selection: Mapping[str, Any]) -> str:
    rank_by: str = selection.get("rank_by", "gate")
    return "gate score" if rank_by == "gate" else rank_by


def _limits(selection: Mapping[str, Any]) -> list[str]:
    limits = []
    if selection["budget"]["unit"] == "tokens":
        limits.append(f"at most {selection['budget']['amount']:,} answer tokens")
    if floor := selection["floor"]:
        limits.append(f"without the worst {100 * floor:g} % by gate score")
    if least := selection["min_per_dataset"]:
        limits.append(f"at least {least:,} rows of a dataset")
    if most := selection["max_per_dataset"]:
        limits.append(f"at most {most:,} rows of a dataset")
    return limits


def is_plain(selection: Mapping[str, Any]) -> bool:
    """True for the best rows by score alone, for which a threshold says everything."""
    by_score = _ranked_by(selection) == "gate score"
    return selection["strategy"] == "top" and by_score and not _limits(selection)
