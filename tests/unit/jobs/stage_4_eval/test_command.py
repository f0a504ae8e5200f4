import json

import pytest

from jobs.stage_4_eval.command import main, parse, require_inputs, task_line, with_resolved_adapter
from selectmoe.config.evaluation import EvaluateConfig, fewshot_numbers, parse_model_args
from selectmoe.errors import ConfigError, DataError, ModelError
from selectmoe.evaluation.run_files import write_run
from selectmoe.evaluation.task_results import SampleValues, TaskResult, aggregate


def result_of(right):
    samples = tuple(SampleValues(str(n), {"acc": float(v)}) for n, v in enumerate(right))
    metric = aggregate(samples, "acc", higher_is_better=True)
    return TaskResult("choices", {"acc": metric}, len(right), samples=samples, seconds=3.14)


def test_no_option_gives_the_defaults():
    assert parse([]) == EvaluateConfig()


def test_options_and_overrides_reach_the_settings_and_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(
        ["--adapter", "run", "--name", "selected", "--tasks", "mmlu", "rows.jsonl", "--limit", "5",
         "--tasks-dir", "mine", "num_fewshot=2", "num_gpus=0"]
    )  # fmt: skip
    assert config.tasks == ("mmlu", str(tmp_path / "rows.jsonl"))
    assert (config.adapter, config.tasks_dir) == (str(tmp_path / "run"), str(tmp_path / "mine"))
    assert (config.name, config.limit, config.num_fewshot, config.num_gpus) == ("selected", 5, 2, 0)
    for arguments in (["tasks=mmlu,bbh"], ["--tasks", "mmlu,bbh"], ["--tasks", "mmlu", "bbh"]):
        assert parse(arguments).tasks == ("mmlu", "bbh")


def test_settings_of_lm_eval_are_given_as_its_own_command_takes_them():
    config = parse(
        ["--num-fewshot", "mmlu=5,hellaswag=10", "--batch-size", "auto", "--apply-chat-template",
         "--model-args", "max_length=512,add_bos_token=True,scale=0.5,attn_implementation=eager"]
    )  # fmt: skip
    assert fewshot_numbers(config.num_fewshot) == (None, {"mmlu": 5, "hellaswag": 10})
    assert (config.batch_size, config.apply_chat_template) == ("auto", True)
    assert parse_model_args(config.model_args) == {
        "max_length": 512, "add_bos_token": True, "scale": 0.5, "attn_implementation": "eager"
    }  # fmt: skip
    assert parse(["--batch-size", "8"]).batch_size == 8
    assert parse(["batch_size=auto:4"]).batch_size == "auto:4"
    assert fewshot_numbers("3,mmlu:5") == (3, {"mmlu": 5})


def test_the_preset_has_the_published_numbers_of_examples():
    config = parse(["preset=benchmarks"])
    for_all, by_name = fewshot_numbers(config.num_fewshot)
    assert for_all is None
    assert by_name == {"mmlu": 5, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 25}
    assert by_name.keys() <= set(config.tasks)
    # With other tasks the preset's numbers of the absent ones are of no use, and are given anew.
    assert parse(["preset=benchmarks", "--num-fewshot", "0"]).num_fewshot == 0


def test_an_override_may_follow_an_option_of_several_values():
    config = parse(["--tasks", "mmlu", "bbh", "limit=5"])
    assert (config.tasks, config.limit) == (("mmlu", "bbh"), 5)
    config = parse(["--compare", "/a", "/b", "baseline=full"])
    assert (config.compare, config.baseline) == (("/a", "/b"), "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_gpus=2"], "num_gpus must be 0 or 1, got 2"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (
            ["--num-fewshot", "five"],
            "num_fewshot must be a whole number, at least 0, or numbers by",
        ),
        (["--num-fewshot", "5,6"], "num_fewshot must be a whole number"),
        (["--num-fewshot", "mmlu=-1"], "num_fewshot must be a whole number"),
        (["--batch-size", "0"], "batch_size must be a whole number, at least 1, or auto or auto:N"),
        (["--batch-size", "automatic"], "batch_size must be a whole number"),
        (["--model-args", "max_length"], "model_args must have the form name=value,name=value"),
        (["--model-args", "dtype=float16"], "dtype is not accepted here; use the setting dtype"),
        (["task=mmlu"], "did you mean 'tasks'"),
        (["tasks=[]"], "tasks must be at least one task"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(arguments)


def test_what_is_not_there_is_refused_before_ray_starts(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 5}\n')
    for error, message, arguments in (
        (ModelError, "model folder /gone does not exist", ["--model", "/gone"]),
        (ModelError, "adapter folder /gone does not exist", ["--adapter", "/gone"]),
        (ConfigError, "file /gone.jsonl does not exist", ["--tasks", "/gone.jsonl"]),
        (DataError, "rows.jsonl:1: 'answer' must be", ["--tasks", str(rows)]),
        (ConfigError, "tasks_dir must be a folder", ["--tasks-dir", "/gone"]),
    ):
        with pytest.raises(error, match=message):
            main([*arguments, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_only_what_ships_or_lies_in_files_is_known_not_to_need_the_hub(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 0}\n')
    assert require_inputs(EvaluateConfig(tasks=("demo_answer_loss", str(rows)))) is False
    assert require_inputs(EvaluateConfig(tasks=("demo_choices", "mmlu"))) is True


def test_a_run_of_stage_3_is_recorded_by_its_last_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-12"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()
    config = with_resolved_adapter(EvaluateConfig(adapter=str(tmp_path)))
    assert config.adapter == str(folder)
    assert config.model is None


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("{tmp_path}", "{tmp_path}"),
        ("/elsewhere/site-packages/selectmoe/assets/tiny_selector", None),
    ],
)
def test_an_adapter_without_a_model_is_loaded_onto_the_base_that_it_names(tmp_path, base, model):
    base = base.format(tmp_path=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "adapter_model.safetensors").touch()
    config = with_resolved_adapter(EvaluateConfig(adapter=str(tmp_path)))
    assert config.model == (model and model.format(tmp_path=tmp_path))
    config = with_resolved_adapter(EvaluateConfig(adapter=str(tmp_path), model="given"))
    assert config.model == "given"


def test_an_adapter_names_the_revision_of_its_base_unless_another_one_is_given(tmp_path):
    settings = {"base_model_name_or_path": "someone/base", "revision": "v1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").touch()
    for given, expected in ((None, "v1"), ("v2", "v2")):
        config = with_resolved_adapter(EvaluateConfig(adapter=str(tmp_path), revision=given))
        assert (config.model, config.revision) == ("someone/base", expected)
    config = with_resolved_adapter(EvaluateConfig(adapter=str(tmp_path), model="someone/other"))
    assert (config.model, config.revision) == ("someone/other", None)


def test_a_base_that_is_not_here_is_asked_for(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base"}')
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=r"names /gone/base as its base model, .* with --model"):
        with_resolved_adapter(EvaluateConfig(adapter=str(tmp_path)))


def test_a_line_says_what_a_task_gave():
    line = task_line(result_of([1, 0, 0, 0]))
    assert line == "choices: acc 0.2500 ± 0.2500 (4 rows, 3.1 s)"


def test_compare_prints_and_stores_one_table(tmp_path, capsys):
    for name, right in (("random", [1, 0, 0, 1]), ("selected", [1, 1, 0, 1])):
        (tmp_path / name).mkdir()
        about = {"model": "m", "adapter": None}
        write_run(tmp_path / name, name=name, about=about, results=[result_of(right)])
    runs = [str(tmp_path / name) for name in ("random", "selected")]
    main(["--compare", *runs, "--output", str(tmp_path / "table")])
    printed = capsys.readouterr().out
    assert "selected  0.7500 ± 0.2500 (+0.2500 ± 0.2500)" in printed
    table = tmp_path / "table" / "results_table.json"
    assert str(table) in printed
    assert json.loads(table.read_text())["baseline"] == "random"
    assert (tmp_path / "table" / "results_table.md").is_file()
