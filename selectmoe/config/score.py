"""The settings of `selectmoe score`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from selectmoe.config.checks import require_model_of_revision
from selectmoe.config.columns import check_columns
from selectmoe.config.engine import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Print the score of each row of a corpus, one JSON object per line."""

    stage: ClassVar[str] = "score"

    model: str | None = None
    """Selector: a Select-MoE (folder or hub name), a selector folder, or a base for which gates
    ship with the package or are given; null is the embedded selector."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, also as model=NAME@REVISION; null is main."""
    model_checkpoint_path: str | None = None
    """Stage 1 weights: the output folder of a stage 1 run, full_rank_weights.safetensors, an
    adapter, or for a base the selector folder of its gates; null is the weights of the model."""
    data: tuple[str, ...] = ()
    """Corpora: files, folders, globs, URLs, hub:NAME[:CONFIG][:SPLIT][@REVISION], or - for JSON
    lines from standard input; several are separated by commas."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, by the names of a layout: {prompt: q, response: a}. Other
    columns then make no layout."""
    scoring: EngineConfig = field(default_factory=EngineConfig)
    output: str | None = None
    """File for the scores, one JSON object per line; null prints them."""

    def __post_init__(self) -> None:
        check_columns(self.columns)
        require_model_of_revision(self.model, self.revision)
