"""What ships inside the package."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_SELECTOR = ASSETS / "tiny_selector"
DEMO_CORPUS = ASSETS / "demo_corpus.jsonl"
