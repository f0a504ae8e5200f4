"""The settings of stage 4."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Stage 4: what a model, or a model with an adapter, scores on lm-eval's tasks and our own."""

    stage: ClassVar[str] = "stage_4_eval"

    name: str | None = None
    """What the run is called in a table of runs; null is the name of its folder."""
    tasks: tuple[str, ...] = ("demo_answer_loss", "demo_choices")
    """Tasks, separated by commas: names of lm-eval's (mmlu, arc_easy), of tasks_dir's or of the
    package's, or .jsonl and .jsonl.gz files of conversations or of questions with choices."""
    tasks_dir: str | None = None
    """Folder of lm-eval task files (YAML) of your own; files of rows are named relative to it."""
    model: str | None = None
    """Folder or hub name of any causal language model; null is the selector in the package."""
    adapter: str | None = None
    """PEFT adapter to put on it: its folder, or a stage 3 run's, whose last checkpoint is taken."""
    quality_gate_forced_open: bool = True
    """Of a Select-MoE, evaluate the language model that it was made from, as stage 3 trains it."""
    num_fewshot: int | None = None
    """Solved examples in front of each question; null is as each task has it."""
    limit: int | None = None
    """Rows of each task that are used, the first so many; null is all."""
    batch_size: int | None = None
    """Rows of a forward pass; null is what lm-eval finds to fit on a GPU, and 16 on a CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the model's numbers; null is bfloat16 on a GPU and float32 on a CPU."""
    num_gpus: int | None = None
    """GPUs that the run asks Ray for, 0 or 1; null is 1 where the cluster has any."""
    num_cpus: int = 1
    """CPUs that it asks for and, without a GPU, computes on."""
    wait_for_nodes: bool = False
    """Wait for a GPU that the cluster has not yet, as one that grows may, instead of refusing."""
    compare: tuple[str, ...] = ()
    """Folders of finished runs to put into one table, instead of evaluating."""
    baseline: str = "random"
    """Name of the run that the others are compared with."""
    output: str | None = None
    """Folder of this run; null is <output_root>/stage_4_eval/<date>/<time>."""
    output_root: str | None = None
    """Where runs are kept; null is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""
    seed: int = 1_234
    """Of solved examples and of answers that are drawn; the default is lm-eval's own."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", "at least one task", self.tasks)
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        shots = self.num_fewshot
        require(shots is None or shots >= 0, "num_fewshot", "at least 0", shots)
        require(self.num_gpus in (None, 0, 1), "num_gpus", "0 or 1", self.num_gpus)
        require(self.num_cpus >= 1, "num_cpus", "at least 1", self.num_cpus)
        require(self.seed >= 0, "seed", "at least 0", self.seed)
