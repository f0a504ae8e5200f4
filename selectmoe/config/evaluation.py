"""The settings of stage 4, evaluation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from selectmoe.config.checks import require, require_at_least, require_model_of_revision
from selectmoe.config.run import RunConfig
from selectmoe.errors import ConfigError

# Arguments of lm-eval's model that are settings here, or that this stage decides.
SETTINGS_OF_MODEL_ARGS = {
    "pretrained": "model", "peft": "adapter", "dtype": "dtype", "batch_size": "batch_size",
    "device": "num_gpus", "tokenizer": "model (the tokenizer is in its folder)",
    "revision": "revision",
    "parallelize": "num_gpus (a model is on one GPU)",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(RunConfig):
    """Stage 4: evaluate a model, with or without an adapter; compare runs."""

    stage: ClassVar[str] = "stage_4_eval"

    model: str | None = None
    """Causal language model: a folder or hub name; null is the base model that the adapter names,
    and without an adapter the selector in the package."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, also as model=NAME@REVISION; null is
    main, or what the adapter names."""
    adapter: str | None = None
    """PEFT adapter to load: its folder, or the output folder of a stage 3 run. Its tokenizer and
    resized vocabulary are used if it has them."""
    name: str | None = None
    """Name of the run in comparison tables; null is the name of its output folder."""
    tasks: tuple[str, ...] = ("demo_answer_loss", "demo_choices")
    """Tasks, separated by commas: names from lm-eval (mmlu, arc_easy), from tasks_dir or from the
    package, or files of conversations or multiple-choice questions, in any format of a corpus."""
    tasks_dir: str | None = None
    """Folder of custom lm-eval task files (YAML); data files are resolved relative to it."""
    num_fewshot: str | int | None = None
    """Number of few-shot examples, of all tasks (5) or by name of a task, group or subtask
    (mmlu=5,hellaswag=10); null is each task's own number."""
    apply_chat_template: bool = False
    """Format the prompts of lm-eval's tasks with the tokenizer's chat template, few-shot examples
    as earlier turns."""
    model_args: str | None = None
    """Further arguments of the model, as lm-eval's --model_args (max_length=4096,
    attn_implementation=eager): lm-eval's own, else those of transformers' from_pretrained."""
    limit: int | None = None
    """Maximum number of rows per task, counted from the first; null is all rows."""
    batch_size: str | int | None = None
    """Rows per forward pass, or auto; null and auto are lm-eval's automatic batch size on a GPU and
    16 on a CPU. auto:N determines it N times, for rows of different lengths."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; null is bfloat16 on a GPU and float32 on a CPU."""
    quality_gate_forced_open: bool = True
    """Force the quality gates of a Select-MoE open, to evaluate the language model it was converted
    from, as stage 3 trains it."""
    num_workers: int | None = None
    """Number of replicas of the model, which divide the rows of every task; null is one per free
    GPU of the cluster, and 1 without GPUs."""
    num_gpus: int | None = None
    """GPUs to request from Ray for each replica, 0 or 1; null is 1 where the cluster has any."""
    num_cpus: int = 1
    """CPUs to request from Ray for each replica; without a GPU, also the number of computing
    threads."""
    wait_for_nodes: bool = False
    """Wait for an autoscaling cluster to add a suitable node instead of failing at once."""
    compare: tuple[str, ...] = ()
    """Output folders of finished runs to compare in one table, instead of evaluating."""
    baseline: str = "random"
    """Name of the run that the other runs are compared with."""
    seed: int = 1_234
    """Random seed of few-shot examples and sampled answers; the default is lm-eval's."""

    def __post_init__(self) -> None:
        for name in ("num_fewshot", "batch_size"):  # "5" on the command line is the number 5
            if re.fullmatch(r"\d+", str(getattr(self, name))):
                object.__setattr__(self, name, int(getattr(self, name)))
        require(bool(self.tasks), "tasks", "at least one task", self.tasks)
        require_at_least(1, self, "limit", "num_cpus", "num_workers")
        require_at_least(0, self, "seed")
        require_model_of_revision(self.model or self.adapter, self.revision)
        size = str(self.batch_size)
        is_valid = self.batch_size is None or re.fullmatch(r"[1-9]\d*|auto(:[1-9]\d*)?", size)
        rule = "a whole number, at least 1, or auto or auto:N"
        require(bool(is_valid), "batch_size", rule, self.batch_size)
        fewshot_numbers(self.num_fewshot)
        parse_model_args(self.model_args)
        require(self.num_gpus in (None, 0, 1), "num_gpus", "0 or 1", self.num_gpus)


def fewshot_numbers(value: str | int | None) -> tuple[int | None, Mapping[str, int]]:
    """(number of few-shot examples of all tasks, numbers by name of a task).

    >>> fewshot_numbers("mmlu=5,hellaswag=10")
    (None, {'mmlu': 5, 'hellaswag': 10})

    Raises ConfigError for anything else than numbers, at least 0.
    """
    if value is None:
        return None, {}
    for_all, by_name = None, {}
    for entry in str(value).split(","):
        name, _, number = entry.replace(":", "=").strip().rpartition("=")
        if not re.fullmatch(r"\d+", number.strip()) or (not name and for_all is not None):
            raise ConfigError(
                "num_fewshot must be a whole number, at least 0, or numbers by task "
                f"(mmlu=5,hellaswag=10), got {value!r}"
            )
        if name:
            by_name[name.strip()] = int(number)
        else:
            for_all = int(number)
    return for_all, by_name


def parse_model_args(text: str | None) -> dict[str, Any]:
    """The arguments of `name=value,name=value`, with numbers, True, False and None as such.

    Raises ConfigError for another form, or an argument that is a setting of its own.
    """
    found: dict[str, Any] = {}
    for entry in (text or "").split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not entry.strip():
            continue
        if not equals or not name.isidentifier():
            raise ConfigError(f"model_args must have the form name=value,name=value, got {text!r}")
        if name in SETTINGS_OF_MODEL_ARGS:
            raise ConfigError(
                f"model_args: {name} is not accepted here; use the setting "
                f"{SETTINGS_OF_MODEL_ARGS[name]}"
            )
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:  # noqa: ANN401 (a number, a truth value, None or text)
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("'\"")
