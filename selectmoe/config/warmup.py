"""The settings of stage 1, gate warm-up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selectmoe.config.checks import require, require_at_least, require_model_of_revision
from selectmoe.config.columns import check_columns
from selectmoe.config.lora import LoraSettings
from selectmoe.config.run import ResumableRunConfig
from selectmoe.config.scaling import ScalingConfig, require_workers_for
from selectmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupDatasetConfig:
    """Which corpora the gates are trained on."""

    paths: tuple[str, ...] = ()
    """Corpora: files, folders, globs, URLs or hub:NAME[:CONFIG][:SPLIT][@REVISION]; several are
    separated by commas. [] is the clean part of the demo corpus, unless names is set."""
    names: tuple[str, ...] = ()
    """Corpora by name. With folder, files or folders in it; without, cot, flan_v2 and oasst1 come
    from princeton-nlp/less_data and dolly from databricks/databricks-dolly-15k on the hub."""
    folder: str | None = None
    """Folder that contains the corpora of names."""
    subset_ratio: float = 0.05
    """Fraction of the rows to use, in (0, 1], chosen by a hash of their content."""
    max_sequence_length: int = 1_024
    """Maximum tokens per sample; longer samples are truncated."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, by the names of a layout: {prompt: q, response: a}. Other
    columns then make no layout."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "subset_ratio", "in (0, 1]", self.subset_ratio)
        require_at_least(2, self, "max_sequence_length")
        check_columns(self.columns)


ALL_LAYERS, AUTO_LAYERS = "all", "auto"


def layer_numbers(text: str) -> tuple[int, ...]:
    """Layers that are given by number, ascending: "[12,14-16]" -> (12, 14, 15, 16)."""
    numbers: set[int] = set()
    for part in text.strip("[] ").split(","):
        first, _, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            span = range(0)
        rule = "all, auto, or a list as 12,14 or 12-17"
        require(bool(span), "layers", rule, text)
        numbers.update(span)
    return tuple(sorted(numbers))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How the gates are trained."""

    peft_mode: Literal["full_rank", "lora"] = "full_rank"
    """Trained parameters: full_rank trains the gates alone, lora adds LoRA adapters."""
    train_quality_gates: bool = True
    """Train the quality gates."""
    train_moe_gates: bool = False
    """Train the expert routers too. Gradients then flow through the whole model, which takes
    several times the time and memory."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    method: Literal["features", "steps"] | None = None
    """How gates are trained. features, for gates on a base: the base computes once what a gate
    reads of each row and of its corrupted copies, and the gates are fitted to that in seconds.
    steps: optimizer steps, each of which computes the model. null is features on a base with
    strategy=ddp, else steps."""
    layers: str | None = None
    """Layers of a base that get a gate, counted from 0: all, auto, or a list as 12,14 or 12-17;
    nothing above the last one is computed. auto (method=features only) chooses them by held-out
    copies. null is auto where it can be, else all. A Select-MoE has a gate in every layer."""
    num_copies: int = 3
    """Corrupted copies of each row with method=features; every step draws one with method=steps."""
    penalty: float | None = None
    """Penalty of the squared weights of the gates with method=features; null chooses one by
    held-out copies."""
    num_steps: int = 1_000
    """Number of optimizer steps."""
    effective_batch_size: int = 32
    """Samples per optimizer step, over all workers; corrupted copies are not counted."""
    batch_size: int | None = None
    """Maximum samples per device and forward pass, corrupted copies not counted; null leaves the
    limit to max_tokens_per_batch. Gradients accumulate up to effective_batch_size."""
    max_tokens_per_batch: int | None = None
    """Maximum tokens per device and forward pass, padding and corrupted copies included; null is
    4,096 on a CPU and 16,384 on a GPU. Whichever of this and batch_size is reached first ends a
    batch; a sample that is longer by itself is a batch of its own."""
    learning_rate: float = 5e-3
    """Peak learning rate: linear warm-up over 5 % of the steps, then cosine decay to 0. The default
    suits the gates, which are linear and start near zero; with peft_mode=lora use about 1e-4."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm (clipping)."""
    quality_loss_type: Literal[
        "sigmoid",
        "linear",
        "mse",
        "beta_moment_matching",
        "mean_variance_regularization",
        "contrastive",
    ] = "contrastive"
    """Loss of the quality gates; only contrastive learns to tell good samples from bad ones. It is
    used alone where only the quality gates are trained. Otherwise, and for every other type, it is
    added to the language-model loss."""
    quality_loss_weight: float = 1.0
    """Weight of the quality loss, at least 0."""
    corruptions: tuple[str, ...] = ()
    """Kinds of corrupted copies for the contrastive loss, separated by commas. [] is all kinds for
    a Select-MoE, and for gates on a base those 18 of 29 that taught them most."""
    label_weight: float = 0.5
    """Weight of the classification term of the contrastive loss (original or corrupted), in [0, 1];
    the rest is the weight of the pairwise ranking term."""
    full_sequence_prediction: bool = False
    """Compute the language-model loss on every token instead of assistant tokens only."""
    sample_wise_averaging: bool = True
    """Average distribution losses over the tokens of each sample first, then over samples."""
    enable_load_balancing: bool = False
    """Add OLMoE's load-balancing loss."""
    quality_gate_init_mean: float | None = None
    """Mean of the quality gates' initial weights. Setting this or one of the next two
    re-initializes the gates; null for all three keeps the model's gates."""
    quality_gate_init_std: float | None = None
    """Standard deviation of the quality gates' initial weights, at least 0."""
    quality_gate_init_bias: float | None = None
    """Initial bias of the quality gates; with zero weights a gate is open to sigmoid(bias)."""
    trash_expert_mode: Literal["zero", "noise", "custom"] | None = None
    """Output of the trash expert: zeros, noise or a trained vector (custom); null keeps the mode of
    the model."""
    strategy: str = "ddp"
    """Distribution strategy over several workers: ddp replicates the model on every worker, fsdp
    shards the frozen layers of a model too large for one device."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the frozen weights; null is bfloat16 on a GPU and float32 on a CPU. Trained weights
    are float32."""
    attn_implementation: str = "sdpa"
    """Attention implementation: eager, sdpa or flash_attention_2."""
    experts_implementation: str | None = None
    """Experts implementation: eager, grouped_mm or batched_mm; null is eager on a CPU and
    grouped_mm on a GPU."""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics."""
    save_steps: int = 100
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        counts = (
            "num_steps", "effective_batch_size", "batch_size", "max_tokens_per_batch",
            "logging_steps", "save_steps", "num_copies",
        )  # fmt: skip
        require_at_least(1, self, *counts)
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        weights = ("weight_decay", "quality_loss_weight", "quality_gate_init_std")
        require_at_least(0, self, *weights)
        penalty = self.penalty
        require(penalty is None or penalty > 0, "penalty", "above 0", penalty)
        if self.layers not in (None, ALL_LAYERS, AUTO_LAYERS):
            layer_numbers(self.layers)
        rule = "ddp or fsdp (scaling.num_workers=1 is a single worker)"
        require(self.strategy in ("ddp", "fsdp"), "strategy", rule, self.strategy)
        share = self.label_weight
        require(0 <= share <= 1, "label_weight", "in [0, 1]", share)
        trained = self.train_quality_gates or self.train_moe_gates or self.peft_mode == "lora"
        if not trained:
            raise ConfigError(
                "train_quality_gates or train_moe_gates must be true with "
                "peft_mode=full_rank: nothing would be trained"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupConfig(ResumableRunConfig):
    """Stage 1: train quality gates, of a Select-MoE or on a base (gate warm-up)."""

    stage: ClassVar[str] = "stage_1_pretrain"

    model: str | None = None
    """Select-MoE whose gates are trained, or a base that gets gates, which is any causal language
    model: a folder or hub name; null is the selector in the package."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, also as model=NAME@REVISION; null is main."""
    dataset: WarmupDatasetConfig = field(default_factory=WarmupDatasetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    seed: int = 0
    """Random seed of re-initialized gates, data order and corrupted copies."""

    def __post_init__(self) -> None:
        ResumableRunConfig.__post_init__(self)
        require_model_of_revision(self.model, self.revision)
        require_at_least(0, self, "seed")
        num_workers = self.scaling.num_workers
        rule = f"at least scaling.num_workers = {num_workers}"
        size = self.training.effective_batch_size
        require(size >= (num_workers or 1), "training.effective_batch_size", rule, size)
        require_workers_for(self.training.strategy, num_workers)
