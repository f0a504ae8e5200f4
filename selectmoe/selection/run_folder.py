"""The folder of a selection run: the names of its files, and which shards are left to score.

config.json                    settings of the run, written first
model.json                     SHA-256 of the weights that score
calibration.json               of these weights when the run began, where they have one
corpus/shard-000000.parquet    normalized rows, in the order of their keys
corpus/rejected.parquet        rows that broke the input contract
corpus/summary.json            written last: the corpus is whole
scored/shard-000000.parquet    scores of the corpus shard of the same name
scored/_finished.jsonl         one line for each scored shard
selected_data.jsonl  rejected/rejected.jsonl
fates/shard-000000.parquet     with selection.write_fates: the fate of each row of the scored shard
manifest.json                  written last: the run is complete
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SELECTED_NAME = "selected_data.jsonl"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where each file of a selection run lies."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model.json"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def scored(self) -> Path:
        return self.root / "scored"

    @property
    def selected_data(self) -> Path:
        return self.root / SELECTED_NAME

    @property
    def fates(self) -> Path:
        return self.root / "fates"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def error_details(self) -> Path:
        """What stopped the scoring, in full."""
        return self.root / "scoring_error.txt"

    @property
    def pieces(self) -> Path:
        """Parts of selected_data.jsonl while they are written; gone afterwards."""
        return self.root / "pieces"

    def read_manifest(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.manifest.read_text(encoding="utf-8"))
        return content

    def corpus_shards(self) -> list[Path]:
        return sorted(self.corpus.glob("shard-*.parquet"))

    def scored_shards(self) -> list[Path]:
        return sorted(self.scored.glob("shard-*.parquet"))

    def unscored_shards(self) -> list[Path]:
        """Corpus shards without scores: what is left to do after an interruption."""
        done = {path.name for path in self.scored_shards()}
        return [path for path in self.corpus_shards() if path.name not in done]
