"""Settings of lm-eval's own command have its effect here: few-shot numbers, chat template, model
arguments, batch size."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selectmoe import register_select_moe
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import ConfigError, ModelError
from selectmoe.evaluation.lm_eval_model import CPU_BATCH_SIZE, batch_size, split_model_args
from selectmoe.evaluation.lm_eval_run import evaluate
from selectmoe.evaluation.local_tasks import SHIPPED_TASKS
from selectmoe.paths import EMBEDDED_SELECTOR
from tests.tiny_target import save_tiny_llama

# Log-likelihoods of 10 to 500 nats in float32: a thousandth of a nat is rounding.
TOLERANCE = 2e-3
ROWS = [
    {"question": f"Which is {n}?", "choices": [str(n), "ice", "snow"], "answer": 0}
    for n in range(6)
]


def run(*tasks, **settings):
    config = EvaluateConfig(tasks=tasks or ("demo_choices",), **{"limit": 4} | settings)
    return {result.task: result for result in evaluate(config, device="cpu")}


def likelihoods(result):
    return [[value for value, _ in sample.details["responses"]] for sample in result.samples]


@pytest.fixture
def choices_file(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def test_each_task_gets_its_own_number_of_examples(choices_file):
    results = run("demo_choices", choices_file, num_fewshot="demo_choices=2,1")
    [own] = results.keys() - {"demo_choices"}
    assert (results["demo_choices"].num_fewshot, results[own].num_fewshot) == (2, 1)
    alone = run("demo_choices", num_fewshot=2)["demo_choices"]
    assert results["demo_choices"].samples == alone.samples


def test_a_number_of_an_unknown_task_is_refused_and_of_another_task_is_not_used():
    with pytest.raises(ConfigError, match="num_fewshot: unknown task 'demo_choice'; did you mean"):
        run(num_fewshot="demo_choice=2")
    assert run(num_fewshot="hellaswag=10")["demo_choices"].num_fewshot == 0


def test_the_chat_template_is_put_around_the_question():
    register_select_moe()
    model = AutoModelForCausalLM.from_pretrained(
        EMBEDDED_SELECTOR, dtype=torch.float32, quality_gate_forced_open=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    result = run(apply_chat_template=True)["demo_choices"]
    lines = (SHIPPED_TASKS / "demo_choices.jsonl").read_text("utf-8").splitlines()
    for row, found in zip(map(json.loads, lines), likelihoods(result), strict=False):
        question = {"role": "user", "content": f"Question: {row['question']}\nAnswer:"}
        prompt = tokenizer.apply_chat_template(
            [question], tokenize=False, add_generation_prompt=True
        )
        expected = [likelihood(model, tokenizer, prompt, choice) for choice in row["choices"]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def likelihood(model, tokenizer, context, choice):
    """Of a choice after a templated context: without the blank that plain prompts have."""
    ids = tokenizer(context + choice, add_special_tokens=False).input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    folder = save_tiny_llama(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="apply_chat_template needs a chat template"):
        run(model=str(folder), apply_chat_template=True)


def test_model_arguments_reach_lm_eval_and_transformers(tmp_path):
    arguments = "max_length=24,attn_implementation=eager,trust_remote_code=True"
    config = EvaluateConfig(model_args=arguments)
    assert split_model_args(config) == (
        {"max_length": 24},
        {"attn_implementation": "eager", "trust_remote_code": True},
    )
    assert run(model_args="max_length=24")["demo_choices"].num_truncated > 0
    assert run(model_args="attn_implementation=eager")["demo_choices"].num_truncated == 0
    with pytest.raises((ConfigError, ModelError), match=r"model_args|cannot be loaded"):
        run(model=str(save_tiny_llama(tmp_path)), model_args="no_such_argument=1")


def test_the_automatic_batch_size_is_lm_evals_on_a_gpu_and_fixed_on_a_cpu():
    for size in (None, "auto"):
        assert batch_size(EvaluateConfig(batch_size=size), device="cpu") == CPU_BATCH_SIZE
        assert batch_size(EvaluateConfig(batch_size=size), device="cuda") == "auto"
    assert batch_size(EvaluateConfig(batch_size="auto:4"), device="cuda") == "auto:4"
    assert batch_size(EvaluateConfig(batch_size=3), device="cpu") == 3
    np.testing.assert_allclose(
        likelihoods(run(batch_size="auto")["demo_choices"]),
        likelihoods(run(batch_size=1)["demo_choices"]),
        rtol=0, atol=TOLERANCE,
    )  # fmt: skip
