"""What an evaluation says of a model is what transformers alone computes with it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from selectmoe import register_select_moe
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.data.chat import ChatTokenizer
from selectmoe.errors import ConfigError, ModelError
from selectmoe.evaluation.answer_loss import answer_losses
from selectmoe.evaluation.hellaswag import clean_row
from selectmoe.evaluation.lm_eval_run import evaluate
from selectmoe.evaluation.local_tasks import ANSWER_LOSS_FILES, SHIPPED_TASKS, read_conversations
from selectmoe.evaluation.target_model import load_target
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample
from tests.tiny_olmoe import save_tiny_olmoe

# Log-likelihoods of 10 to 500 nats in float32, from batches of another shape: a thousandth of a
# nat is rounding; a token more or less is several nats.
TOLERANCE = 2e-3
# PEFT asks transformers by a name that it has given up; nothing of ours causes it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
NUM_ROWS = 24


@pytest.fixture(scope="module")
def base():
    """The embedded target, loaded by transformers alone."""
    register_select_moe()
    return AutoModelForCausalLM.from_pretrained(
        EMBEDDED_SELECTOR, dtype=torch.float32, quality_gate_forced_open=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random adapter that changes what the model says."""
    return save_adapter(EMBEDDED_SELECTOR, tmp_path_factory.mktemp("run") / "checkpoint-7")


def save_adapter(model_folder, folder):
    register_select_moe()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(model, settings).save_pretrained(folder)
    return folder


def run(*tasks, **settings):
    config = EvaluateConfig(tasks=tasks or EvaluateConfig().tasks, **settings)
    return {result.task: result for result in evaluate(config, device="cpu")}


def choice_likelihoods(model, tokenizer, context, choices):
    """One forward pass a choice, without padding."""
    start = len(tokenizer(context).input_ids)
    found = []
    for choice in choices:
        ids = torch.tensor([tokenizer(f"{context} {choice}").input_ids])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        targets = ids[0, 1:]
        picked = logs[torch.arange(len(targets)), targets]
        found.append(float(picked[start - 1 :].double().sum()))
    return found


def expected_accuracies(likelihoods, rows, choices_of):
    right, right_by_length = [], []
    for values, row in zip(likelihoods, rows, strict=True):
        lengths = [len(choice) for choice in choices_of(row)]
        right.append(int(np.argmax(values)) == row["answer"])
        right_by_length.append(int(np.argmax(np.divide(values, lengths))) == row["answer"])
    return {"acc": np.mean(right), "acc_norm": np.mean(right_by_length)}


def require_same(result, model, tokenizer, rows, *, prompt, choices_of=lambda row: row["choices"]):
    """lm-eval's likelihoods, choice by choice, and its accuracies are those of `model`."""
    expected = [choice_likelihoods(model, tokenizer, prompt(row), choices_of(row)) for row in rows]
    responses = [sample.details["responses"] for sample in result.samples]
    given = [[likelihood for likelihood, _ in row] for row in responses]
    assert len(given) == len(rows)
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    accuracies = expected_accuracies(expected, rows, choices_of)
    for name, metric in result.metrics.items():
        assert metric.value == pytest.approx(accuracies[name], abs=1e-12)


def ask(row):
    return f"Question: {row['question']}\nAnswer:"


@pytest.fixture(scope="module")
def demo_rows():
    lines = (SHIPPED_TASKS / "demo_choices.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines][:NUM_ROWS]


def test_choices_of_the_embedded_target_are_what_transformers_computes(base, tokenizer, demo_rows):
    result = run("demo_choices", limit=NUM_ROWS)["demo_choices"]
    assert result.num_samples == NUM_ROWS
    require_same(result, base, tokenizer, demo_rows, prompt=ask)


def test_choices_with_an_adapter_are_what_transformers_and_peft_compute(
    tokenizer, demo_rows, adapter
):
    plain = AutoModelForCausalLM.from_pretrained(
        EMBEDDED_SELECTOR, dtype=torch.float32, quality_gate_forced_open=True
    )
    adapted = PeftModel.from_pretrained(plain, adapter).eval()
    result = run("demo_choices", limit=NUM_ROWS, adapter=str(adapter))["demo_choices"]
    require_same(result, adapted, tokenizer, demo_rows, prompt=ask)
    without = run("demo_choices", limit=NUM_ROWS)["demo_choices"]
    assert result.samples[0].details != without.samples[0].details


def test_lm_eval_loads_the_same_adapter_by_its_own_peft_argument(adapter):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=str(EMBEDDED_SELECTOR), peft=str(adapter), device="cpu", batch_size=8,
        dtype="float32", quality_gate_forced_open=True,
    )  # fmt: skip
    result = run("demo_choices", limit=1, adapter=str(adapter.parent))["demo_choices"]
    lines = (SHIPPED_TASKS / "demo_choices.jsonl").read_text("utf-8").splitlines()
    row = json.loads(lines[0])
    requests = [
        Instance("loglikelihood", row, (ask(row), f" {choice}"), n)
        for n, choice in enumerate(row["choices"])
    ]
    theirs = [likelihood for likelihood, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    ours = [likelihood for likelihood, _ in result.samples[0].details["responses"]]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_batch_size_changes_nothing():
    for one, other in zip(
        run("demo_choices", limit=8, batch_size=1)["demo_choices"].samples,
        run("demo_choices", limit=8, batch_size=7)["demo_choices"].samples,
        strict=True,
    ):
        ours, theirs = ([v for v, _ in each.details["responses"]] for each in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_solved_examples_come_before_the_question():
    none, some = (
        run("demo_choices", limit=4, num_fewshot=shots)["demo_choices"] for shots in (0, 2)
    )
    assert (none.num_fewshot, some.num_fewshot) == (0, 2)
    assert none.samples[0].details != some.samples[0].details
    again = run("demo_choices", limit=4, num_fewshot=2)["demo_choices"]
    assert some.samples == again.samples  # drawn by the seed


@pytest.fixture(scope="module")
def conversations():
    return read_conversations(ANSWER_LOSS_FILES["demo_answer_loss"])


def test_answer_loss_is_transformers_own_loss_on_the_answers_tokens(base, tokenizer, conversations):
    result = run("demo_answer_loss")["demo_answer_loss"]
    rows = ChatTokenizer(tokenizer, max_sequence_length=4_096).tokenize(conversations)
    sums, tokens, num_bytes = [], [], []
    for sample, row in zip(conversations, rows, strict=True):
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.answer_mask), ids, -100)
        with torch.no_grad():
            loss = base(input_ids=ids, labels=labels).lm_loss
        tokens.append(int(row.answer_mask.sum()))
        sums.append(float(loss) * tokens[-1])
        answers = [m.content for m in sample.messages if m.role == "assistant"]
        num_bytes.append(sum(len(answer.encode()) for answer in answers))
    assert result.num_samples == len(conversations)
    # Means over thousands of tokens in float32.
    assert result.metrics["nll_per_token"].value == pytest.approx(sum(sums) / sum(tokens), rel=1e-5)
    assert result.metrics["nll_per_byte"].value == pytest.approx(
        sum(sums) / sum(num_bytes), rel=1e-5
    )
    assert [sample.weights["nll_per_token"] for sample in result.samples] == tokens


def test_answer_loss_of_a_conversation_does_not_depend_on_the_others(
    base, tokenizer, conversations
):
    together, _ = answer_losses(base, tokenizer, conversations, max_sequence_length=1_024)
    for position in (0, 17, 39):
        [alone], _ = answer_losses(
            base, tokenizer, [conversations[position]], max_sequence_length=1_024
        )
        assert alone.nll == pytest.approx(together[position].nll, abs=TOLERANCE)
        assert alone.num_tokens == together[position].num_tokens


def test_what_cannot_be_asked_as_a_whole_is_rejected(base, tokenizer, conversations):
    long = Sample("d", "long", (Message("user", "why " * 90), Message("assistant", "So.")))
    short = Sample("d", "short", (Message("user", "why"), Message("assistant", "So.")))
    losses, rejected = answer_losses(base, tokenizer, [short, long, short], max_sequence_length=32)
    assert [loss.position for loss in losses] == [0, 2]
    assert [(row.sample_id, row.reason) for row in rejected] == [("long", "too_long")]


def test_an_adapter_changes_the_answer_loss(adapter):
    with_it = run("demo_answer_loss", adapter=str(adapter), limit=5)["demo_answer_loss"]
    without = run("demo_answer_loss", limit=5)["demo_answer_loss"]
    assert [s.sample for s in with_it.samples] == [s.sample for s in without.samples]
    assert with_it.metrics != without.metrics


def test_a_select_moe_is_evaluated_as_the_model_it_was_made_from_unless_told_otherwise():
    opened, gated = (
        run("demo_answer_loss", limit=3, quality_gate_forced_open=forced)["demo_answer_loss"]
        for forced in (True, False)
    )
    assert opened.metrics["nll_per_token"].value != gated.metrics["nll_per_token"].value


def test_any_causal_model_can_be_evaluated(tmp_path):
    folder = save_tiny_olmoe(tmp_path / "model", max_position_embeddings=1_024)
    results = run(model=str(folder), limit=4)
    assert set(results) == {"demo_answer_loss", "demo_choices"}


def test_numbers_that_are_not_finite_are_refused(tmp_path, tokenizer, conversations):
    register_select_moe()
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_SELECTOR, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="loss on held-out-001 is not finite"):
        answer_losses(model, tokenizer, conversations[:1], max_sequence_length=1_024)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"demo_choices: .* of row 0 is not finite, got nan"):
        run("demo_choices", model=str(tmp_path), limit=2)


@pytest.mark.parametrize(
    "other", [{"hidden_size": 64}, {"num_hidden_layers": 5}, {"num_hidden_layers": 1}]
)
def test_the_adapter_of_another_model_is_refused(tmp_path, other):
    """A wider one, and those of a deeper and a flatter one, which PEFT would take in part."""
    ours = save_tiny_olmoe(tmp_path / "ours")
    theirs = save_adapter(save_tiny_olmoe(tmp_path / "theirs", **other), tmp_path / "adapter")
    config = EvaluateConfig(model=str(ours), adapter=str(theirs))
    with pytest.raises(ModelError, match=r"adapter is an adapter of another model \(its base is"):
        load_target(config, device="cpu")
    fitting = save_adapter(ours, tmp_path / "fitting")
    load_target(dataclasses.replace(config, adapter=str(fitting)), device="cpu")


def test_a_group_gives_its_own_number_and_those_of_its_tasks(tmp_path):
    for name, aggregate in (
        ("sum", "aggregate_metric_list: [{metric: acc, aggregation: mean}]\n"), ("list", "")
    ):  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(
            f"group: {name}\ntask: [demo_choices, copy]\n{aggregate}"
        )
    copy = (SHIPPED_TASKS / "demo_choices.yaml").read_text().replace("task: demo_", "task: ")
    copy = copy.replace("templates", str(SHIPPED_TASKS / "templates"))
    copy = copy.replace("demo_choices.jsonl", str(SHIPPED_TASKS / "demo_choices.jsonl"))
    (tmp_path / "copy.yaml").write_text(copy.replace("task: choices", "task: copy"))
    results = run("sum", tasks_dir=str(tmp_path), limit=6)
    assert set(results) == {"sum", "demo_choices", "copy"}
    whole, part = results["sum"], results["copy"]
    assert whole.subtasks == ("demo_choices", "copy")
    assert (whole.num_samples, part.num_samples) == (12, 6)
    assert whole.metrics["acc"].value == part.metrics["acc"].value
    assert whole.seconds > 0
    assert part.seconds == 0
    listed = run("list", tasks_dir=str(tmp_path), limit=6)
    assert listed["list"].metrics == {}
    assert listed["copy"].seconds > 0


def test_an_adapter_that_cannot_be_read_is_refused(adapter, tmp_path):
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    config = EvaluateConfig(adapter=str(tmp_path))
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ModelError, match=f"{tmp_path}: cannot be loaded"):
            load_target(config, device="cpu")
        (tmp_path / name).unlink()


def test_task_files_of_a_folder_find_their_rows_and_functions_beside_them(
    tmp_path, monkeypatch, demo_rows
):
    folder, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    for each in (folder, elsewhere):
        each.mkdir()
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: !function ask.question\n"
        "doc_to_choice: choices\ndoc_to_target: answer\n"
    )
    (folder / "ask.py").write_text(
        "def question(row):\n    return f\"Question: {row['question']}\\nAnswer:\"\n"
    )
    rows = "".join(json.dumps(row) + "\n" for row in demo_rows[:4])
    (folder / "rows.jsonl").write_text(rows)
    monkeypatch.chdir(elsewhere)
    mine = run("mine", tasks_dir=str(folder))["mine"]
    shipped = run("demo_choices", limit=4)["demo_choices"]
    assert mine.metrics["acc"].value == shipped.metrics["acc"].value
    assert [s.details for s in mine.samples] == [s.details for s in shipped.samples]


def test_a_task_file_whose_function_is_missing_is_refused_by_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "doc_to_text: !function nowhere.question\n"
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not a task file: .*nowhere"):
        run("mine", tasks_dir=str(tmp_path))


def test_nothing_of_lm_eval_reaches_the_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # no git repository
    run(limit=2)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_requests_that_are_cut_to_fit_are_counted(tmp_path):
    row = {"question": "why " * 1_100, "choices": ["yes, it is", "no, not"], "answer": 0}
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "question": "Why?"}) + "\n")
    [result] = run(str(file)).values()
    assert result.num_truncated == 2  # both choices of the first row
    assert result.num_samples == 2


@pytest.mark.parametrize("with_adapter", [False, True])
def test_known_benchmarks_run_from_files_and_equal_a_direct_computation(
    shared_data, base, tokenizer, adapter, with_adapter
):
    model = base
    if with_adapter:
        plain = AutoModelForCausalLM.from_pretrained(
            EMBEDDED_SELECTOR, dtype=torch.float32, quality_gate_forced_open=True
        )
        model = PeftModel.from_pretrained(plain, adapter).eval()
    files = {
        "arc_easy_test": shared_data / "eval/arc_easy/test.jsonl.gz",
        "hellaswag_validation_1k": shared_data / "eval/hellaswag/validation_1k.jsonl.gz",
        "mmlu_test": shared_data / "eval/mmlu/test.jsonl.gz",
    }
    results = run(
        *map(str, files.values()), limit=12, adapter=str(adapter) if with_adapter else None
    )
    assert set(results) == set(files)
    prompts = {
        "arc_easy_test": ask,
        "hellaswag_validation_1k": lambda row: clean_row(row)["query"],
        "mmlu_test": ask_for_a_letter,
    }
    choices = {
        "hellaswag_validation_1k": lambda row: clean_row(row)["choices"],
        "mmlu_test": lambda row: list("ABCD"),
    }
    for name, file in files.items():
        require_same(
            results[name], model, tokenizer, first_rows(file, 12), prompt=prompts[name],
            choices_of=choices.get(name, lambda row: row["choices"]),
        )  # fmt: skip


def ask_for_a_letter(row):
    subject = row["subject"].replace("_", " ")
    choices = "\n".join(f"{a}. {c}" for a, c in zip("ABCD", row["choices"], strict=True))
    return (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{row['question'].strip()}\n{choices}\nAnswer:"
    )


def first_rows(file, count):
    import gzip

    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines)) for _ in range(count)]
