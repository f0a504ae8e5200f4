"""Files that ship inside the package: the embedded selector, gates for bases, the demo corpus."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_SELECTOR = ASSETS / "tiny_selector"
SHIPPED_GATES = ASSETS / "gates"  # a selector folder for each base
DEMO_CORPUS = ASSETS / "demo_corpus.jsonl"


def model_or_embedded(model: str | None, revision: str | None = None) -> str:
    """The folder or hub name that is given, else the folder of the embedded selector.

    A hub name with a revision is NAME@REVISION, which `model.checkpoint` takes everywhere.
    """
    if model is None:
        return str(EMBEDDED_SELECTOR)
    return f"{model}@{revision}" if revision else model
