"""The settings of stage 3, LoRA finetuning."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from selectmoe.config.checks import require, require_at_least, require_model_of_revision
from selectmoe.config.columns import check_columns
from selectmoe.config.lora import LoraSettings
from selectmoe.config.run import ResumableRunConfig
from selectmoe.config.scaling import ScalingConfig, require_workers_for
from selectmoe.errors import ConfigError

FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneDatasetConfig:
    """Which conversations the target model is finetuned on."""

    data_path: str | None = None
    """Training data: the output folder of a stage 2 run, its selected_data.jsonl, or any corpus
    that stage 2 reads; null is the demo corpus."""
    mode: Literal["selected", "full", "random", "random_matched", "longest"] = "selected"
    """Rows to train on. selected: the rows of selected_data.jsonl; full: the corpus they were
    selected from; random: a random sample of that corpus, as large as the selection or fraction;
    random_matched: as many random rows of each dataset as were selected, with the same number of
    answer tokens to 1 %; longest: as many rows as were selected, with the longest answers."""
    fraction: float | None = None
    """Fraction of the corpus to sample with mode=random, in (0, 1]; null samples as many rows as
    were selected."""
    max_sequence_length: int = 2_048
    """Maximum tokens per row; longer rows are truncated. The model's number of positions is an
    upper limit."""
    chat_template: Literal["model", "selectmoe"] = "model"
    """Chat template of the training data. model: the tokenizer's own; selectmoe: the package's
    (<|user|> … <|assistant|> …), for a base model without one. The template is saved with the
    adapter's tokenizer."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the corpus's own columns, by the names of a layout: {prompt: q, response: a}. Other
    columns then make no layout."""

    def __post_init__(self) -> None:
        share = self.fraction
        require(share is None or 0 < share <= 1, "fraction", "in (0, 1]", share)
        if share is not None and self.mode != "random":
            raise ConfigError(f"fraction needs dataset.mode=random, got {self.mode!r}")
        require_at_least(2, self, "max_sequence_length")
        check_columns(self.columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrainingConfig:
    """How the adapter is trained."""

    num_epochs: int = 4
    """Number of training epochs."""
    effective_batch_size: int = 32
    """Rows per optimizer step, over all workers."""
    batch_size: int = 4
    """Per-device batch size; gradients accumulate up to effective_batch_size."""
    learning_rate: float = 2e-5
    """Peak learning rate: linear warm-up, then decay to 0."""
    lr_scheduler_type: Literal["linear", "cosine"] = "linear"
    """Form of the learning rate decay."""
    warmup_ratio: float = 0.03
    """Fraction of the steps with learning rate warm-up, in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm (clipping)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the target model; null is bfloat16 on a GPU and float32 on a CPU. The adapter is
    trained in float32."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Distribution strategy over several workers: ddp replicates the model on every worker, fsdp
    shards the frozen layers of a model too large for one device."""
    attn_implementation: str = "sdpa"
    """Attention implementation: eager, sdpa or flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs time."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; null saves one after each epoch."""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics."""
    # The values published for this comparison.
    lora: LoraSettings = field(
        default_factory=lambda: LoraSettings(r=128, lora_alpha=512, lora_dropout=0.1)
    )

    def __post_init__(self) -> None:
        names = ("num_epochs", "effective_batch_size", "batch_size", "logging_steps", "save_steps")
        require_at_least(1, self, *names)
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        require_at_least(0, self, "weight_decay")
        ratio = self.warmup_ratio
        require(0 <= ratio < 1, "warmup_ratio", "in [0, 1)", ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(ResumableRunConfig):
    """Stage 3: finetune a causal language model with LoRA on selected rows."""

    stage: ClassVar[str] = "stage_3_finetune"

    model: str | None = None
    """Target model, any causal language model: a folder or hub name; null is the selector in the
    package with its gates forced open."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, also as model=NAME@REVISION; null is main."""
    dataset: FinetuneDatasetConfig = field(default_factory=FinetuneDatasetConfig)
    training: FinetuneTrainingConfig = field(default_factory=FinetuneTrainingConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    merge: bool = False
    """Also export the base model with the adapter merged into its weights, to <output>/merged."""
    seed: int = 0
    """Random seed of the adapter's initialization, dropout and data order, and of the draws of
    dataset.mode=random and random_matched."""

    def __post_init__(self) -> None:
        ResumableRunConfig.__post_init__(self)
        require_at_least(0, self, "seed")
        require_model_of_revision(self.model, self.revision)
        training, num_workers = self.training, self.scaling.num_workers
        require(
            training.effective_batch_size % (training.batch_size * (num_workers or 1)) == 0,
            "training.effective_batch_size",
            f"a multiple of batch_size * num_workers = {training.batch_size} * {num_workers or 1}",
            training.effective_batch_size,
        )
        require_workers_for(training.strategy, num_workers)
        if training.strategy == "fsdp" and any(
            name.endswith(FUSED_EXPERTS) for name in training.lora.target_modules
        ):
            raise ConfigError(
                "training.strategy=fsdp shards the fused experts, which lora.target_modules cannot "
                f"name then, got {', '.join(training.lora.target_modules)}"
            )
