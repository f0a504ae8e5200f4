"""The settings of `jobs/fit_weights.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from selectmoe.config.checks import require, require_at_least, require_model_of_revision
from selectmoe.config.columns import check_columns
from selectmoe.config.engine import EngineConfig

RatedSignal = Literal["gate", "nll", "pmi", "router_entropy", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitWeightsConfig:
    """Measure how well the signals of a selector agree with rated rows, and fit weights of them."""

    stage: ClassVar[str] = "fit_weights"

    rated: tuple[str, ...] = ()
    """Rated rows: corpus files whose rows have a column label (a number, higher is better) and,
    where they come in pairs, pair_id; several are separated by commas."""
    scored: str | None = None
    """Output folder of a selection run that scored these rows; null scores them."""
    signals: tuple[str, ...] = ()
    """Two to five of gate, nll, pmi, router_entropy and length. [] is gate, nll, pmi and length;
    with scored, gate, length and what is stored."""
    evaluate_only: bool = False
    """Measure agreement without fitting weights."""
    output: str = "weights.json"
    """File for the weights; it must not exist yet."""
    model: str | None = None
    """Selector: a Select-MoE (folder or hub name), a selector folder, or a base for which gates
    ship with the package or are given; null is the embedded selector."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, also as model=NAME@REVISION; null is main."""
    model_checkpoint_path: str | None = None
    """Stage 1 weights: the output folder of a stage 1 run, full_rank_weights.safetensors, an
    adapter, or for a base the selector folder of its gates; null is the weights of the model."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, by the names of a layout: {prompt: q, response: a}. Other
    columns then make no layout."""
    scoring: EngineConfig = field(default_factory=EngineConfig)
    num_folds: int = 5
    """Folds of the cross-validation; rows of one prompt are in the same fold."""
    seed: int = 0
    """Random seed of the folds and of the bootstrap intervals."""

    def __post_init__(self) -> None:
        check_columns(self.columns)
        require_model_of_revision(self.model, self.revision)
        require_at_least(2, self, "num_folds")
        require_at_least(0, self, "seed")
        known = get_args(RatedSignal)
        for name in self.signals:
            require(name in known, "signals", f"some of {', '.join(known)}", name)
        number = len(set(self.signals))
        most = len(known)
        is_able = number == len(self.signals) and (not number or 2 <= number <= most)
        require(is_able, "signals", f"two to {most} different names", list(self.signals))
