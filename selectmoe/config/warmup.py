"""The settings of stage 1, the gate warm-up."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selectmoe.config.checks import require
from selectmoe.config.scaling import ScalingConfig
from selectmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupDatasetConfig:
    """What the gates learn from."""

    paths: tuple[str, ...] = ()
    """Corpora, separated by commas: files, folders, globs, URLs or hub:NAME[:split]; [] is the
    clean part of the demo corpus, unless names are given."""
    names: tuple[str, ...] = ()
    """Corpora by their names below folder, such as cot,dolly,flan_v2,oasst1: a .jsonl, .jsonl.gz
    or .parquet file of that name, or a folder of such files."""
    folder: str | None = None
    """Where names are looked for."""
    subset_ratio: float = 0.05
    """Share of the rows to use, in (0, 1], chosen by a hash of their content."""
    max_sequence_length: int = 1_024
    """Tokens of a sample that are read; of a longer one, the first so many."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "dataset.subset_ratio", "in (0, 1]", self.subset_ratio)
        length = self.max_sequence_length
        require(length >= 2, "dataset.max_sequence_length", "at least 2", length)
        if self.names and self.folder is None:
            raise ConfigError(f"dataset.names needs dataset.folder, got {','.join(self.names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupLoraConfig:
    """The adapters of training.peft_mode=lora."""

    r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """What the adapters add is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs that is dropped in training, in [0, 1)."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Modules that get an adapter, by the end of their names. Fused experts too
    (mlp.experts.gate_up_proj), without dropout."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "training.lora.r", "at least 1", self.r)
        require(self.lora_alpha >= 1, "training.lora.lora_alpha", "at least 1", self.lora_alpha)
        dropout, modules = self.lora_dropout, self.target_modules
        require(0 <= dropout < 1, "training.lora.lora_dropout", "in [0, 1)", dropout)
        require(bool(modules), "training.lora.target_modules", "at least one module", modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How the gates are warmed up."""

    peft_mode: Literal["full_rank", "lora"] = "full_rank"
    """full_rank trains the gates alone; lora trains adapters beside them."""
    train_quality_gates: bool = True
    """Train the quality gates."""
    train_moe_gates: bool = False
    """Train the routers of the experts too. Gradients then pass through the whole model: several
    times the time and memory."""
    lora: WarmupLoraConfig = field(default_factory=WarmupLoraConfig)
    num_steps: int = 1_000
    """Optimizer steps."""
    batch_size: int = 32
    """Samples of one optimizer step, over all workers; corrupted copies are not counted."""
    max_tokens_per_forward: int | None = None
    """Tokens that a worker computes at a time, padding included; the gradients of a step are added
    up. null is 4,096 on a CPU and 16,384 on a GPU."""
    learning_rate: float = 5e-3
    """Peak of the schedule: 5 % of the steps upwards, then a cosine down to 0. Gates are linear and
    start near zero: they bear a large one. The adapters of peft_mode=lora want about 1e-4."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this."""
    quality_loss_type: Literal[
        "sigmoid",
        "linear",
        "mse",
        "beta_moment_matching",
        "mean_variance_regularization",
        "contrastive",
    ] = "contrastive"
    """What the gates learn from; only contrastive tells good samples from bad ones. The others
    stand beside the language-model loss; contrastive does where more than the gates is trained."""
    quality_loss_weight: float = 1.0
    """Factor of that loss, at least 0."""
    corruptions: tuple[str, ...] = ()
    """Kinds of worse copies for the contrastive loss; [] is all of them."""
    label_weight: float = 0.5
    """Share of the contrastive loss that labels samples real or worse, in [0, 1]; the rest ranks a
    sample above its own copy."""
    full_sequence_prediction: bool = False
    """Language-model loss on every token instead of the assistant's alone."""
    sample_wise_averaging: bool = True
    """Average a distribution loss over the tokens of a sample first, then over samples."""
    enable_load_balancing: bool = False
    """Add OLMoE's load-balancing loss."""
    quality_gate_init_mean: float | None = None
    """Start the gates anew from a normal distribution with this mean; null keeps the model's gates
    unless one of the two below is given."""
    quality_gate_init_std: float | None = None
    """Its standard deviation, at least 0."""
    quality_gate_init_bias: float | None = None
    """What opens new gates: good is sigmoid(bias) at weights of 0."""
    trash_expert_mode: Literal["zero", "noise", "custom"] | None = None
    """What the trash expert returns; null is as the model says. custom learns a vector."""
    strategy: Literal["single", "ddp", "fsdp"] | None = None
    """single is one worker; ddp gives each worker the whole model; fsdp shares the frozen layers
    out over the workers, for a model that is too large for one. null is ddp."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the frozen model's numbers; null is bfloat16 on a GPU and float32 on a CPU. What is
    trained is float32."""
    attn_implementation: str = "sdpa"
    """eager, sdpa or flash_attention_2."""
    experts_implementation: str | None = None
    """eager, grouped_mm or batched_mm; null is eager on a CPU and grouped_mm on a GPU."""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics."""
    save_steps: int = 100
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "logging_steps", "save_steps"):
            require(getattr(self, name) >= 1, f"training.{name}", "at least 1", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, f"training.{name}", "above 0", getattr(self, name))
        for name in ("weight_decay", "quality_loss_weight"):
            value = getattr(self, name)
            require(value >= 0, f"training.{name}", "at least 0", value)
        tokens, deviation = self.max_tokens_per_forward, self.quality_gate_init_std
        valid = tokens is None or tokens >= 1
        require(valid, "training.max_tokens_per_forward", "at least 1", tokens)
        valid = deviation is None or deviation >= 0
        require(valid, "training.quality_gate_init_std", "at least 0", deviation)
        share = self.label_weight
        require(0 <= share <= 1, "training.label_weight", "in [0, 1]", share)
        trained = self.train_quality_gates or self.train_moe_gates or self.peft_mode == "lora"
        if not trained:
            raise ConfigError(
                "training.train_quality_gates or training.train_moe_gates must be true with "
                "training.peft_mode=full_rank: nothing would be trained"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupConfig:
    """Stage 1: teach the gates to tell a sample from a worse copy."""

    stage: ClassVar[str] = "stage_1_pretrain"

    model: str | None = None
    """Select-MoE folder or hub name; null is the selector in the package."""
    dataset: WarmupDatasetConfig = field(default_factory=WarmupDatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    output: str | None = None
    """Folder of this run; null is <output_root>/stage_1_pretrain/<date>/<time>."""
    output_root: str | None = None
    """Where runs are kept; null is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    max_rejected: float = 0.01
    """Share of rows that cannot be learned from, above which the run stops, in [0, 1]."""
    seed: int = 0
    """Of new gates, the order of the samples and their corruptions."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        require(0 <= self.max_rejected <= 1, "max_rejected", "in [0, 1]", self.max_rejected)
        size, num_workers = self.training.batch_size, self.scaling.num_workers
        rule = f"at least scaling.num_workers = {num_workers}"
        require(size >= num_workers, "training.batch_size", rule, size)
        strategy = self.training.strategy
        if (strategy == "single" and num_workers > 1) or (strategy == "fsdp" and num_workers < 2):
            rule = "1" if strategy == "single" else "at least 2"
            raise ConfigError(
                f"training.strategy={strategy} needs scaling.num_workers {rule}, got {num_workers}"
            )
