"""The settings of stage 3."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selectmoe.config.checks import require
from selectmoe.config.scaling import ScalingConfig
from selectmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneDatasetConfig:
    """Which conversations the target learns from."""

    data_path: str | None = None
    """selected_data.jsonl or the folder of a stage 2 run; a corpus as stage 2 reads one will do,
    too. null is the demo corpus."""
    mode: Literal["selected", "full", "random"] = "selected"
    """selected: the rows of selected_data.jsonl; full: all of the corpus that they were selected
    from; random: as many of that corpus as were selected, or a fraction of it."""
    fraction: float | None = None
    """With mode=random: share of the corpus, in (0, 1]; null is as many rows as the selection."""
    max_sequence_length: int = 2_048
    """Tokens of a row that are read, at most as many as the model has positions for; of a longer
    row, the first so many."""
    chat_template: Literal["model", "selectmoe"] = "model"
    """Layout in which the target sees conversations. model: its tokenizer's own; selectmoe: the
    package's, <|user|> … <|assistant|> …, for a base model without one. The tokenizer that is saved
    with the adapter has it."""

    def __post_init__(self) -> None:
        share = self.fraction
        require(share is None or 0 < share <= 1, "dataset.fraction", "in (0, 1]", share)
        if share is not None and self.mode != "random":
            raise ConfigError(f"dataset.fraction needs dataset.mode=random, got {self.mode!r}")
        length = self.max_sequence_length
        require(length >= 2, "dataset.max_sequence_length", "at least 2", length)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneLoraConfig:
    """The adapter that is trained; the defaults are those published for this comparison."""

    r: int = 128
    """Rank."""
    lora_alpha: int = 512
    """What the adapter adds is scaled by lora_alpha / r."""
    lora_dropout: float = 0.1
    """Share of the adapter's inputs that is dropped in training, in [0, 1)."""
    target_modules: tuple[str, ...] = ()
    """Modules that get an adapter, by the end of their names; [] is the attention projections,
    by the model's own names. Fused experts too (mlp.experts.gate_up_proj), without dropout."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "training.lora.r", "at least 1", self.r)
        require(self.lora_alpha >= 1, "training.lora.lora_alpha", "at least 1", self.lora_alpha)
        dropout = self.lora_dropout
        require(0 <= dropout < 1, "training.lora.lora_dropout", "in [0, 1)", dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrainingConfig:
    """How the adapter is trained."""

    num_epochs: int = 4
    """Passes over the rows."""
    effective_batch_size: int = 32
    """Rows of one optimizer step, over all workers."""
    batch_size: int = 4
    """Rows that a worker computes at a time; gradients are added up to effective_batch_size."""
    learning_rate: float = 2e-5
    """Peak of the schedule: a linear warm-up, then linearly down to 0."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises, in [0, 1)."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the target's numbers; null is bfloat16 on a GPU and float32 on a CPU. The adapter's
    own are float32."""
    attn_implementation: str = "sdpa"
    """eager, sdpa or flash_attention_2."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again in backward: less memory, more
    time."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; null is one after each epoch."""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics."""
    lora: FinetuneLoraConfig = field(default_factory=FinetuneLoraConfig)

    def __post_init__(self) -> None:
        for name in ("num_epochs", "effective_batch_size", "batch_size", "logging_steps"):
            value = getattr(self, name)
            require(value >= 1, f"training.{name}", "at least 1", value)
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, f"training.{name}", "above 0", getattr(self, name))
        require(self.weight_decay >= 0, "training.weight_decay", "at least 0", self.weight_decay)
        ratio = self.warmup_ratio
        require(0 <= ratio < 1, "training.warmup_ratio", "in [0, 1)", ratio)
        steps = self.save_steps
        require(steps is None or steps >= 1, "training.save_steps", "at least 1", steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Stage 3: finetune a target model with LoRA on what was selected."""

    stage: ClassVar[str] = "stage_3_finetune"

    model: str | None = None
    """Folder or hub name of any causal language model; null is the selector in the package with
    its gates forced open."""
    dataset: FinetuneDatasetConfig = field(default_factory=FinetuneDatasetConfig)
    training: FinetuneTrainingConfig = field(default_factory=FinetuneTrainingConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    output: str | None = None
    """Folder of this run; null is <output_root>/stage_3_finetune/<date>/<time>."""
    output_root: str | None = None
    """Where runs are kept; null is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    max_rejected: float = 0.01
    """Share of rows that cannot be learned from, above which the run stops, in [0, 1]."""
    seed: int = 0
    """Of the adapter's first weights, its dropout, the order of the rows and the random draw."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        require(0 <= self.max_rejected <= 1, "max_rejected", "in [0, 1]", self.max_rejected)
        training, num_workers = self.training, self.scaling.num_workers
        rows_at_a_time = training.batch_size * num_workers
        require(
            training.effective_batch_size % rows_at_a_time == 0,
            "training.effective_batch_size",
            f"a multiple of batch_size * num_workers = {training.batch_size} * {num_workers}",
            training.effective_batch_size,
        )
