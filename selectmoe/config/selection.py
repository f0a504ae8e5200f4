"""The settings of stage 2, selection."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal

from selectmoe.config.checks import require, require_at_least, require_model_of_revision
from selectmoe.config.columns import ColumnRules, check_columns
from selectmoe.config.engine import EngineConfig
from selectmoe.config.rank_by import (
    GATE,
    parse_rank_by,
    require_ranked_signals,
    resolve_rank_by,
)
from selectmoe.config.run import ResumableRunConfig
from selectmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Which corpora are read, and how much of them."""

    paths: tuple[str, ...] = ()
    """Corpora: files, folders, globs, URLs or hub:NAME[:CONFIG][:SPLIT][@REVISION]; several are
    separated by commas. [] is the demo corpus, unless names is set."""
    names: tuple[str, ...] = ()
    """Corpora by name. With folder, files or folders in it; without, cot, flan_v2 and oasst1 come
    from princeton-nlp/less_data and dolly from databricks/databricks-dolly-15k on the hub."""
    folder: str | None = None
    """Folder that contains the corpora of names."""
    subset_ratio: float = 1.0
    """Fraction of the rows to use, in (0, 1], chosen by a hash of their content."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, by the names of a layout: {prompt: q, response: a}. Other
    columns then make no layout."""
    extra_columns: Literal["keep", "drop"] = "keep"
    """Columns of the corpus, and keys of its messages, that are no part of a conversation: keep
    writes them to selected_data.jsonl, drop leaves them out."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "subset_ratio", "in (0, 1]", self.subset_ratio)
        check_columns(self.columns)

    @property
    def column_rules(self) -> ColumnRules:
        return ColumnRules(self.columns, keeps_extra=self.extra_columns == "keep")


DEFAULT_PERCENTAGE = 0.05


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is kept."""

    unit: Literal["fraction", "rows", "tokens"]
    amount: float  # whole for rows and tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """How rows are chosen from the scored ones."""

    duplicates: Literal["drop", "keep"] = "drop"
    """Rows with exactly the same text, which are always counted: drop scores only the first one by
    row key, keep scores all."""
    strategy: Literal["top", "sampled", "random", "longest"] = "top"
    """Selection strategy; top keeps the rows with the highest scores, sampled draws rows at random
    with a preference for high scores, random draws uniformly, longest keeps the longest answers."""
    rank_by: str = "gate"
    """What strategy=top orders rows by, highest first; gate is the score, else a stored signal
    (nll, pmi, router_entropy), -nll for the lowest first, length, weights of standardized signals
    such as '{gate: 1, pmi: 0.5}', or a weights.json of jobs/fit_weights.py."""
    temperature: float = 1.0
    """Temperature of strategy=sampled, at least 0; a row is drawn with a weight of
    exp(rank / temperature), of its standardized rank by score. 0 is top, a high one is random."""
    floor: float = 0.0
    """Fraction of the scored rows with the lowest scores that no strategy keeps, in [0, 1)."""
    rows: int | None = None
    """Number of rows to keep, instead of a percentage."""
    tokens: int | None = None
    """Maximum answer tokens to keep, instead of a percentage; rows are taken in the order of the
    strategy until the next one would exceed it."""
    min_per_dataset: int | None = None
    """Rows to keep of every dataset, where it has as many, before others compete."""
    max_per_dataset: int | None = None
    """Maximum rows to keep of a dataset."""
    seed: int = 0
    """Random seed of strategy=sampled and random."""
    write_fates: bool = False
    """Write fates/*.parquet: whether each row of scored/*.parquet is kept, and why not."""

    def __post_init__(self) -> None:
        # The weights themselves: a run then does not depend on their file.
        object.__setattr__(self, "rank_by", resolve_rank_by(self.rank_by))
        parse_rank_by(self.rank_by)
        plain = self.rank_by == GATE or self.strategy == "top"
        require(plain, "rank_by", f"gate with strategy={self.strategy}", self.rank_by)
        require_at_least(0, self, "temperature", "seed")
        require(self.seed < 2**63, "seed", "below 2**63", self.seed)
        require(0 <= self.floor < 1, "floor", "in [0, 1)", self.floor)
        require_at_least(1, self, "rows", "tokens", "min_per_dataset", "max_per_dataset")
        least, most = self.min_per_dataset, self.max_per_dataset
        if least is not None and most is not None:
            require(least <= most, "min_per_dataset", f"at most max_per_dataset={most}", least)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig(ResumableRunConfig):
    """Stage 2: score a corpus and keep exactly the best fraction of it."""

    stage: ClassVar[str] = "stage_2_selection"

    selection_percentage: float | None = None
    """Fraction of the scored rows to keep, in (0, 1]; also --pct. null is 0.05, unless
    selection.rows or selection.tokens is set."""
    model: str | None = None
    """Selector: a Select-MoE (folder or hub name), a selector folder, or a base for which gates
    ship with the package or are given; null is the embedded selector."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, also as model=NAME@REVISION; null is main."""
    model_checkpoint_path: str | None = None
    """Stage 1 weights: the output folder of a stage 1 run, full_rank_weights.safetensors, an
    adapter, or for a base the selector folder of its gates; null is the weights of the model."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    scoring: EngineConfig = field(default_factory=EngineConfig)
    per_dataset: bool = False
    """Keep the fraction, or the number of rows or tokens, of each dataset instead of the whole
    corpus."""
    via: str = "actors"
    """Scoring backend: actors, serve or the URL of a score server; actors belong to the run
    (`selectmoe select` uses threads instead), serve is the deployment on this Ray cluster. The API
    key of a server is read from $SELECTMOE_API_KEY. A served model is configured on the server, and
    a model that is set here must be the same."""
    shards_in_flight: int = 4
    """Maximum number of shards an actor requests concurrently with via=serve or a URL."""
    rows_per_shard: int = 512
    """Rows per shard, the unit that is scored, written and resumed as a whole."""
    num_actors: str | int | None = None
    """Number of scoring actors or threads, at most N or between MIN:MAX; the pool begins with those
    that the cluster has room for and grows with it. null is 1 to all that the cluster can become,
    one per GPU, or one per CPU where there is no GPU; a single actor with via=serve or a URL."""
    num_threads_per_actor: int = 1
    """CPU threads per actor; changing it may change the last digits of scores."""
    scored: str | None = None
    """Output folder of a finished run to re-select from, without scoring again."""
    report: Literal["tokens", "rows", "none"] = "tokens"
    """What report.html shows of example rows: tokens colors each token by its score, for which the
    model is loaded once more; rows shows the texts alone. none writes no report."""

    def __post_init__(self) -> None:
        ResumableRunConfig.__post_init__(self)
        require_model_of_revision(self.model, self.revision)
        self._check_budget()
        known = self.via in ("actors", "serve") or self.via.startswith(("http://", "https://"))
        require(known, "via", "actors, serve or a URL (http://HOST:PORT)", self.via)
        names = ("shards_in_flight", "rows_per_shard", "num_threads_per_actor")
        require_at_least(1, self, *names)
        if isinstance(self.num_actors, str) and self.num_actors.lstrip("-").isdigit():
            object.__setattr__(self, "num_actors", int(self.num_actors))  # as the option gives it
        lowest, highest = self.actor_bounds
        rule = "a whole number from 1 or MIN:MAX, such as 1:8"
        require(1 <= lowest <= (highest or lowest), "num_actors", rule, self.num_actors)

    def _check_budget(self) -> None:
        """Raises ConfigError unless there is exactly one budget, which the floor leaves room for.

        A percentage of null becomes the default where no other budget is set.
        """
        options = {
            "selection_percentage (--pct)": self.selection_percentage,
            "selection.rows (--rows)": self.selection.rows,
            "selection.tokens (--tokens)": self.selection.tokens,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"only one budget may be set, got {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "selection_percentage", DEFAULT_PERCENTAGE)
        share, floor = self.selection_percentage, self.selection.floor
        if share is not None:
            require(0 < share <= 1, "selection_percentage (--pct)", "in (0, 1]", share)
            if Fraction(str(share)) + Fraction(str(floor)) > 1:
                raise ConfigError(
                    "selection_percentage (--pct) must be at most 1 - selection.floor = "
                    f"{float(1 - Fraction(str(floor))):g}, got {share:g}"
                )
        if self.per_dataset and self.selection.tokens and self.selection.min_per_dataset:
            raise ConfigError(
                "selection.min_per_dataset cannot be combined with selection.tokens and "
                f"per_dataset, got {self.selection.min_per_dataset}"
            )

    def require_ranked_signals(self) -> None:
        """Raises ConfigError where rows would be scored without a signal that ranks them."""
        if self.scored is None:
            require_ranked_signals(self.selection.rank_by, self.scoring.signals)

    @property
    def budget(self) -> Budget:
        """The one that is set."""
        if self.selection.rows is not None:
            return Budget("rows", self.selection.rows)
        if self.selection.tokens is not None:
            return Budget("tokens", self.selection.tokens)
        assert self.selection_percentage is not None
        return Budget("fraction", self.selection_percentage)

    @property
    def actor_bounds(self) -> tuple[int, int | None]:
        """The least and the most actors; None for as many as there is room for."""
        if self.num_actors is None:
            return 1, None
        if isinstance(self.num_actors, int):
            return min(1, self.num_actors), self.num_actors
        lowest, colon, highest = self.num_actors.partition(":")
        rule = "a whole number from 1 or MIN:MAX, such as 1:8"
        known = bool(colon) and lowest.isdigit() and highest.isdigit()
        require(known, "num_actors", rule, self.num_actors)
        return int(lowest), int(highest)
