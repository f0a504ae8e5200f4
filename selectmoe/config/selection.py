"""The settings of stage 2."""

from dataclasses import dataclass, field
from typing import ClassVar

from selectmoe.config.checks import require
from selectmoe.config.dataset import DatasetConfig
from selectmoe.config.engine import ScoringConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Stage 2: score a corpus and keep the best part of it."""

    stage: ClassVar[str] = "stage_2_selection"

    selection_percentage: float = 0.05
    """Share of the scored rows to keep, in (0, 1]; also --pct."""
    model: str | None = None
    """Select-MoE folder or hub name; null is the selector in the package."""
    model_checkpoint_path: str | None = None
    """Stage 1's weights: the folder of its run, full_rank_weights.safetensors or an adapter."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    per_dataset: bool = False
    """Apply the percentage within each data set instead of to the whole corpus."""
    max_rejected: float = 0.01
    """Share of rejected rows above which the run stops, in [0, 1]."""
    via: str = "actors"
    """Who scores: actors (of this run), serve (the deployment that runs on this Ray cluster) or the
    URL of a score server, whose API key is $SELECTMOE_API_KEY. The last two score with a model of
    their own, which must be model where that is given."""
    shards_in_flight: int = 4
    """With via=serve or a URL: shards that an actor has asked for at once."""
    rows_per_shard: int = 512
    """Rows of one shard: what is scored, written and resumed as a whole."""
    num_actors: int | None = None
    """Scoring actors; null is one for each GPU, or for each CPU where there is no GPU, and a single
    one where they only ask another."""
    num_threads_per_actor: int = 1
    """CPU threads of an actor; another number may change scores in their last digit."""
    output: str | None = None
    """Folder of this run; null is <output_root>/stage_2_selection/<date>/<time>."""
    output_root: str | None = None
    """Where runs are kept; null is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""
    scored: str | None = None
    """Folder of a finished run whose scores are cut again, without scoring."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    seed: int = 0
    """Kept in the manifest; scoring and selection draw nothing at random."""

    def __post_init__(self) -> None:
        share = self.selection_percentage
        require(0 < share <= 1, "selection_percentage (--pct)", "in (0, 1]", share)
        require(0 <= self.max_rejected <= 1, "max_rejected", "in [0, 1]", self.max_rejected)
        known = self.via in ("actors", "serve") or self.via.startswith(("http://", "https://"))
        require(known, "via", "actors, serve or a URL (http://HOST:PORT)", self.via)
        require(self.shards_in_flight >= 1, "shards_in_flight", "at least 1", self.shards_in_flight)
        require(self.rows_per_shard >= 1, "rows_per_shard", "at least 1", self.rows_per_shard)
        actors, threads = self.num_actors, self.num_threads_per_actor
        require(actors is None or actors >= 1, "num_actors", "at least 1", actors)
        require(threads >= 1, "num_threads_per_actor", "at least 1", threads)
        require(self.seed >= 0, "seed", "at least 0", self.seed)
