"""The settings of each command: frozen dataclasses, where every default stands once, beside its
explanation. `config_loading.py` puts presets, options and `key=value` overrides over them.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selectmoe.errors import ConfigError


def require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """What is read, and how much of it."""

    paths: tuple[str, ...] = ()
    """Corpora, separated by commas: files, folders, globs, URLs or hub:NAME[:split]; [] is the demo
    corpus."""
    subset_ratio: float = 1.0
    """Share of the rows to use, in (0, 1], chosen by a hash of their content."""
    max_sequence_length: int = 1_024
    """Tokens of a sample that are read; of a longer one, the first so many."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "dataset.subset_ratio", "in (0, 1]", self.subset_ratio)
        length = self.max_sequence_length
        require(length >= 1, "dataset.max_sequence_length", "at least 1", length)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How the model is run and its gates are averaged."""

    formula: Literal[
        "original",
        "answer_probability",
        "answer_margin",
        "answer_margin_second_half",
        "answer_margin_last",
    ] = "answer_margin"
    """Which tokens and layers a score averages, and whether as probabilities or margins."""
    max_tokens_per_batch: int | None = None
    """Tokens of one forward pass, padding included; null is 4,096 on a CPU and 65,536 on a GPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the model's numbers; null is bfloat16 on a GPU and float32 on a CPU."""
    attn_implementation: str = "sdpa"
    """eager, sdpa or flash_attention_2."""
    experts_implementation: str | None = None
    """eager, grouped_mm or batched_mm; null is eager on a CPU and grouped_mm on a GPU."""

    def __post_init__(self) -> None:
        tokens = self.max_tokens_per_batch
        require(tokens is None or tokens >= 1, "scoring.max_tokens_per_batch", "at least 1", tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How the gates are warmed up."""

    num_steps: int = 1_000
    """Optimizer steps."""
    batch_size: int = 32
    """Samples of one optimizer step, over all workers; corrupted copies are not counted."""
    learning_rate: float = 5e-3
    """Peak of the schedule. Gates are linear and start near zero: they bear a large one."""
    quality_loss_type: Literal[
        "sigmoid",
        "linear",
        "mse",
        "beta_moment_matching",
        "mean_variance_regularization",
        "contrastive",
    ] = "contrastive"
    """What the gates learn from; only contrastive tells good samples from bad ones."""
    quality_loss_weight: float = 1.0
    """Factor of that loss, at least 0."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "training.num_steps", "at least 1", self.num_steps)
        require(self.batch_size >= 1, "training.batch_size", "at least 1", self.batch_size)
        require(self.learning_rate > 0, "training.learning_rate", "above 0", self.learning_rate)
        weight = self.quality_loss_weight
        require(weight >= 0, "training.quality_loss_weight", "at least 0", weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Stage 0: an OLMoE checkpoint becomes a Select-MoE."""

    stage: ClassVar[str] = "stage_0_convert"

    base: str
    """OLMoE folder or hub name."""
    save_path: str
    """Folder of the new checkpoint: new or empty, and outside base."""
    verify: bool = False
    """Compare the logits of both models and store the parity report."""
    verify_only: bool = False
    """The same for the checkpoint that save_path already holds, converting nothing."""
    quality_gate_init_mean: float | None = None
    """Mean of the gates' first weights; null is the model's own default."""
    quality_gate_init_std: float | None = None
    """Their standard deviation, at least 0; null is the model's own default."""
    quality_gate_init_bias: float | None = None
    """What opens them: good is sigmoid(bias) at weights of 0; null is the model's own default."""
    quality_gate_forced_open: bool | None = None
    """Take good as 1 whatever the gates say: the model then computes what base computes."""
    trash_expert_mode: Literal["zero", "noise", "custom"] | None = None
    """What the trash expert returns; null is the model's own default."""
    seed: int = 0
    """Of the gates' first weights."""

    def __post_init__(self) -> None:
        deviation = self.quality_gate_init_std
        valid = deviation is None or deviation >= 0
        require(valid, "quality_gate_init_std", "at least 0", deviation)
        require(self.seed >= 0, "seed", "at least 0", self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupConfig:
    """Stage 1: teach the gates to tell a sample from a worse copy."""

    stage: ClassVar[str] = "stage_1_pretrain"

    model: str | None = None
    """Select-MoE folder or hub name; null is the selector in the package."""
    dataset: DatasetConfig = field(default_factory=lambda: DatasetConfig(subset_ratio=0.05))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: str | None = None
    """Folder of this run; null is <output_root>/stage_1_pretrain/<date>/<time>."""
    output_root: str | None = None
    """Where runs are kept; null is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""
    seed: int = 0
    """Of the order of the samples and their corruptions."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Stage 2: score a corpus and keep the best part of it."""

    stage: ClassVar[str] = "stage_2_selection"

    selection_percentage: float = 0.05
    """Share of the scored rows to keep, in (0, 1]; also --pct."""
    model: str | None = None
    """Select-MoE folder or hub name; null is the selector in the package."""
    model_checkpoint_path: str | None = None
    """Stage 1's weights: full_rank_weights.safetensors or the folder that holds it."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    per_dataset: bool = False
    """Apply the percentage within each data set instead of to the whole corpus."""
    max_rejected: float = 0.01
    """Share of rejected rows above which the run stops, in [0, 1]."""
    rows_per_shard: int = 512
    """Rows of one shard: what is scored, written and resumed as a whole."""
    num_actors: int | None = None
    """Scoring actors; null is one for each GPU, or for each CPU where there is no GPU."""
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
        require(self.rows_per_shard >= 1, "rows_per_shard", "at least 1", self.rows_per_shard)
        actors, threads = self.num_actors, self.num_threads_per_actor
        require(actors is None or actors >= 1, "num_actors", "at least 1", actors)
        require(threads >= 1, "num_threads_per_actor", "at least 1", threads)
        require(self.seed >= 0, "seed", "at least 0", self.seed)
