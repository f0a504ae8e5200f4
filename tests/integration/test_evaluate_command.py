"""jobs/evaluate.py as a user runs it, from another folder than the checkout."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from selectmoe import register_select_moe
from selectmoe.errors import ConfigError
from selectmoe.evaluation.lm_eval_run import LmEvalTasks
from selectmoe.evaluation.local_tasks import plan_tasks
from selectmoe.evaluation.run_files import read_run
from selectmoe.paths import EMBEDDED_SELECTOR

pytestmark = [
    pytest.mark.timeout(300),
    # PEFT asks transformers by a name that it has given up; nothing of ours causes it.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]


class Command:
    def __init__(self, repository: Path, folder: Path) -> None:
        self.command = [sys.executable, str(repository / "jobs" / "evaluate.py")]
        self.folder = folder

    def run(self, *arguments: str | Path, status: int = 0) -> tuple[str, str]:
        """What it prints on each stream; `status` is what it must end with."""
        finished = subprocess.run(
            [*self.command, *map(str, arguments)],
            cwd=self.folder, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert finished.returncode == status, finished.stdout + finished.stderr
        assert "Traceback" not in finished.stderr
        assert "not a git repository" not in finished.stdout + finished.stderr
        return finished.stdout, finished.stderr


@pytest.fixture
def command(repository, tmp_path):
    return Command(repository, tmp_path)


@pytest.fixture
def evaluate_here(command_here):
    return command_here("evaluate")


@pytest.fixture
def adapter(tmp_path):
    register_select_moe()
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "stage_3" / "checkpoint-3")
    return tmp_path / "stage_3"


@pytest.mark.usefixtures("shared_ray")
def test_two_runs_and_a_table_of_them(command, evaluate_here, adapter, tmp_path):
    printed, told = command.run("--name", "random", "--output", "base_run", "--limit", "20")
    assert "demo_answer_loss: nll_per_token" in printed
    assert "demo_choices: acc" in printed
    assert [line.split(":")[0] for line in told.splitlines()] == [
        "output", "Ray is ready", "evaluating demo_answer_loss, demo_choices on 1 CPU(s)"
    ]  # fmt: skip
    assert str(tmp_path / "base_run" / "results.json") in printed
    evaluate_here.run("--adapter", "stage_3", "--name", "selected", "--output", "new", "limit=20")
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["adapter"] == str(adapter / "checkpoint-3")
    assert content["model"] == str(EMBEDDED_SELECTOR)
    assert content["config"]["limit"] == 20
    assert {"selectmoe", "lm_eval", "torch", "peft"} <= content["versions"].keys()
    assert content["tasks"]["demo_choices"]["num_samples"] == 20
    run = read_run(tmp_path / "new")
    assert len(run.samples("demo_answer_loss")) == 20

    table = evaluate_here.run("--compare", "base_run", "new", "--output", "table")
    assert "\nrandom " in table
    cells = json.loads((tmp_path / "table" / "results_table.json").read_text())["rows"][1]["cells"]
    assert [cell["difference"]["paired"] for cell in cells] == [True, True]


def test_replicas_divide_the_rows_and_give_the_same_numbers(evaluate_here, tmp_path):
    for number in ("1", "2"):
        evaluate_here.run("--num-workers", number, "--output", number, "limit=6")
    one, two = (json.loads((tmp_path / n / "results.json").read_text())["tasks"] for n in "12")
    for task, result in one.items():
        for name, metric in result["metrics"].items():
            # float32 in batches of other rows.
            assert two[task]["metrics"][name]["value"] == pytest.approx(metric["value"], abs=1e-4)
    line = evaluate_here.refuse("--num-workers", "900", "--output", "many")
    assert "num_workers must be at most" in line


def test_a_mistake_on_the_worker_is_one_line_too(evaluate_here, adapter, tmp_path):
    (tmp_path / "stage_3" / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"no weights")
    line = evaluate_here.refuse("--adapter", "stage_3", "--output", "run")
    assert line.startswith(f"error: {adapter / 'checkpoint-3'}: ")
    assert not (tmp_path / "run" / "results.json").exists()


def test_more_than_the_cluster_has_is_refused_with_what_it_has(evaluate_here):
    line = evaluate_here.refuse("num_cpus=10000", "--output", "run")
    assert "no node has num_cpus=10000 and num_gpus=0: the largest has 2" in line


def test_an_unknown_task_is_refused_before_ray_starts_or_a_folder_is_made(evaluate_here, tmp_path):
    status, printed = evaluate_here.call("--tasks", "helaswag", "--output", "run")
    assert status == 2
    assert printed.endswith("error: unknown task 'helaswag'; did you mean 'hellaswag'?\n")
    assert "Ray" not in printed
    assert not (tmp_path / "run").exists()


def test_a_task_that_needs_the_network_is_refused_by_name(tmp_path):
    # lm-eval's own task as a file of the user's, which spares reading the index of its 14,000.
    shipped = Path(find_spec("lm_eval").origin).parent / "tasks" / "arc" / "arc_easy.yaml"
    text = shipped.read_text("utf-8").replace("task: arc_easy", "task: my_arc")
    (tmp_path / "my_arc.yaml").write_text(text, "utf-8")
    planned = plan_tasks(["my_arc"], str(tmp_path))
    tasks = LmEvalTasks(planned, str(tmp_path), cache=tmp_path)
    with pytest.raises(ConfigError, match=r"task my_arc: its dataset is neither in the local"):
        tasks.load(planned[0])
