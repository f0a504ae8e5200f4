"""The settings of stage 4, evaluation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from selectmoe.config.checks import require, require_at_least
from selectmoe.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(RunConfig):
    """Stage 4: evaluate a model, with or without an adapter; compare runs."""

    stage: ClassVar[str] = "stage_4_eval"

    model: str | None = None
    """Causal language model: a folder or hub name; null is the base model that the adapter names,
    and without an adapter the selector in the package."""
    adapter: str | None = None
    """PEFT adapter to load: its folder, or the output folder of a stage 3 run, whose last
    checkpoint is used. Its tokenizer and resized vocabulary are used if it has them."""
    name: str | None = None
    """Name of the run in comparison tables; null is the name of its output folder."""
    tasks: tuple[str, ...] = ("demo_answer_loss", "demo_choices")
    """Tasks, separated by commas: names from lm-eval (mmlu, arc_easy), from tasks_dir or from the
    package, or .jsonl and .jsonl.gz files of conversations or multiple-choice questions."""
    tasks_dir: str | None = None
    """Folder of custom lm-eval task files (YAML); data files are resolved relative to it."""
    num_fewshot: int | None = None
    """Number of few-shot examples; null is each task's own number."""
    limit: int | None = None
    """Maximum number of rows per task, counted from the first; null is all rows."""
    batch_size: int | None = None
    """Rows per forward pass; null is lm-eval's automatic batch size on a GPU and 16 on a CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; null is bfloat16 on a GPU and float32 on a CPU."""
    quality_gate_forced_open: bool = True
    """Force the quality gates of a Select-MoE open, to evaluate the language model it was converted
    from, as stage 3 trains it."""
    num_gpus: int | None = None
    """GPUs to request from Ray, 0 or 1; null is 1 where the cluster has any."""
    num_cpus: int = 1
    """CPUs to request from Ray; without a GPU, also the number of computing threads."""
    wait_for_nodes: bool = False
    """Wait for an autoscaling cluster to add a suitable node instead of failing at once."""
    compare: tuple[str, ...] = ()
    """Output folders of finished runs to compare in one table, instead of evaluating."""
    baseline: str = "random"
    """Name of the run that the other runs are compared with."""
    seed: int = 1_234
    """Random seed of few-shot examples and sampled answers; the default is lm-eval's."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", "at least one task", self.tasks)
        require_at_least(1, self, "limit", "batch_size", "num_cpus")
        require_at_least(0, self, "num_fewshot", "seed")
        require(self.num_gpus in (None, 0, 1), "num_gpus", "0 or 1", self.num_gpus)
