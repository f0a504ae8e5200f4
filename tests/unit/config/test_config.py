"""Settings: defaults, presets, overrides, and what a mistyped one is told."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from selectmoe.config.conversion import ConvertConfig
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import (
    PRESETS,
    StageConfig,
    from_values,
    load_config,
    resolved,
    setting_types,
)
from selectmoe.config.lora import LoraSettings
from selectmoe.config.options import add_options, settings_help
from selectmoe.config.renamed import ALIASES, REMOVED, RENAMED
from selectmoe.config.selection import DatasetConfig, SelectConfig
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import ConfigError

STAGES = {
    config_class.stage: config_class
    for config_class in (ConvertConfig, WarmupConfig, SelectConfig, FinetuneConfig, EvaluateConfig)
}


def test_no_override_gives_the_defaults() -> None:
    assert load_config(SelectConfig, []) == SelectConfig()
    assert load_config(WarmupConfig, []) == WarmupConfig()


def test_overrides_reach_top_level_and_nested_settings() -> None:
    config = load_config(
        SelectConfig,
        [
            "selection_percentage=0.1",
            "dataset.subset_ratio=1",
            "dataset.max_sequence_length=2_048",
            "scoring.dtype=bfloat16",
            "per_dataset=true",
            "num_actors=3",
            "rows_per_shard=7",
            "rows_per_shard=8",
        ],
    )
    assert config.selection_percentage == 0.1
    assert config.dataset.subset_ratio == 1.0
    assert isinstance(config.dataset.subset_ratio, float)
    assert config.scoring.max_sequence_length == 2_048
    assert config.scoring.dtype == "bfloat16"
    assert config.scoring.formula == SelectConfig().scoring.formula
    assert (config.per_dataset, config.num_actors, config.rows_per_shard) == (True, 3, 8)


def test_groups_nest(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("training: {batch_size: 2, lora: {r: 64, target_modules: [q_proj]}}\n")
    overrides = [f"preset={preset}", "training.lora.lora_alpha=32", "training.lora.r=16"]
    training = load_config(FinetuneConfig, overrides).training
    assert training.lora == LoraSettings(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules=("q_proj",)
    )
    assert training.batch_size == 2
    saved = json.loads(json.dumps(resolved(FinetuneConfig(training=training))))
    assert saved["training.lora.target_modules"] == ["q_proj"]
    assert from_values(FinetuneConfig, saved) == FinetuneConfig(training=training)


def test_a_nested_setting_is_found_by_its_last_part_and_checked_where_it_stands() -> None:
    with pytest.raises(ConfigError, match=r"'lora\.r'; did you mean 'training\.lora\.r'\?"):
        load_config(FinetuneConfig, ["lora.r=8"])
    with pytest.raises(ConfigError, match=r"training\.lora\.r must be at least 1, got 0"):
        load_config(FinetuneConfig, ["training.lora.r=0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.batch_size=8", "scaling.num_workers=3"],
            "training.effective_batch_size must be a multiple of batch_size * num_workers = 8 * 3,"
            " got 32",
        ),
        (["dataset.fraction=0.1"], "dataset.fraction needs dataset.mode=random, got 'selected'"),
        (["dataset.mode=best"], "dataset.mode must be one of selected, full, random, "),
        (["dataset.mode=random", "dataset.fraction=0"], "dataset.fraction must be in (0, 1], got"),
        (["training.lora.lora_dropout=1"], "training.lora.lora_dropout must be in [0, 1), got 1"),
        (["training.learning_rate=0"], "training.learning_rate must be above 0, got 0"),
    ],
)
def test_settings_of_finetuning_are_checked(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(FinetuneConfig, overrides)
    assert message in str(refused.value)


def test_numbers_may_be_written_with_an_exponent() -> None:
    assert load_config(WarmupConfig, ["training.learning_rate=5e-5"]).training.learning_rate == 5e-5


def test_null_takes_the_place_of_a_value_where_it_may() -> None:
    values = {"model": "somewhere", "num_actors": 2, "scoring.dtype": "float32"}
    overrides = ["model=null", "num_actors=null", "scoring.dtype=null"]
    assert load_config(SelectConfig, overrides, values=values) == SelectConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/a?b=c", "s3://bucket/a?b=c"),
        ("my models/it's [1], {2}", "my models/it's [1], {2}"),
        ("C:\\models\\", "C:\\models\\"),
        ("007", "007"),
        ("true", "true"),
        ("'null'", "null"),
        ('"a b"', "a b"),
        ("größe", "größe"),
    ],
)
def test_text_is_taken_as_typed_and_quotes_are_taken_off(text: str, expected: str) -> None:
    assert load_config(SelectConfig, [f"model={text}"]).model == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", ("a.jsonl",)),
        ("a.jsonl, b dir/*.parquet", ("a.jsonl", "b dir/*.parquet")),
        ("[a.jsonl,b.jsonl]", ("a.jsonl", "b.jsonl")),
        ("['a,b.jsonl']", ("a,b.jsonl",)),
        ("'a,b.jsonl'", ("a,b.jsonl",)),
        ("hub:owner/name:train[:10]", ("hub:owner/name:train[:10]",)),
        ("[]", ()),
    ],
)
def test_paths_are_split_at_commas_or_given_as_a_list(text: str, expected: tuple[str, ...]) -> None:
    assert load_config(SelectConfig, [f"dataset.paths={text}"]).dataset.paths == expected


def test_overrides_stand_above_values_and_those_above_a_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "shards_in_flight: 1\nnum_actors: 1\nrows_per_shard: 1\nscoring: {formula: original}\n"
    )
    config = load_config(
        SelectConfig,
        ["rows_per_shard=3", f"preset={preset}"],
        values={"rows_per_shard": 2, "num_actors": 2},
    )
    assert (config.shards_in_flight, config.num_actors, config.rows_per_shard) == (1, 2, 3)
    assert config.scoring.formula == "original"


def test_every_shipped_preset_fits_its_stage() -> None:
    files = list(PRESETS.glob("*/*.yaml"))
    assert files
    for file in files:
        config_class = STAGES[file.parent.name]
        loaded = load_config(config_class, [f"preset={file.stem}"])
        assert loaded != load_config(config_class, [])
        assert file.stem in settings_help(config_class).partition("  preset=NAME\n")[2]


def test_resolved_settings_survive_json() -> None:
    config = load_config(SelectConfig, ["dataset.paths=a,b", "scoring.dtype=float32", "resume=x"])
    saved = json.loads(json.dumps(resolved(config)))
    assert saved["dataset.paths"] == ["a", "b"]
    assert from_values(SelectConfig, saved) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "selection_percentge=0.1",
            "unknown setting 'selection_percentge'; did you mean 'selection_percentage'?",
        ),
        (
            "subset_ratio=0.1",
            "unknown setting 'subset_ratio'; did you mean 'dataset.subset_ratio'?",
        ),
        ("dataset.subset_ration=1", "did you mean 'dataset.subset_ratio'?"),
        ("+num_actors=1", "unknown setting '+num_actors'; did you mean 'num_actors'?"),
        ("scoring={formula:original}", "unknown setting 'scoring'; did you mean 'scoring."),
        ("=3", "unknown setting ''; did you mean "),
        ("abc", "override must have the form key=value, got 'abc'"),
        ("", "override must have the form key=value, got ''"),
        ("selection_percentage=abc", "must be a finite number or null, got 'abc'"),
        ("selection_percentage=", "must be a finite number or null, got ''"),
        ("selection_percentage=nan", "must be a finite number or null, got nan"),
        ("selection_percentage=0", "selection_percentage (--pct) must be in (0, 1], got 0.0"),
        ("selection_percentage=1.5", "selection_percentage (--pct) must be in (0, 1], got 1.5"),
        ("selection_percentage=0.1,0.2", "must be a finite number or null, got '0.1,0.2'"),
        ("rows_per_shard=1.5", "rows_per_shard must be a whole number, got 1.5"),
        ("via=localhost:8000", "via must be actors, serve or a URL (http://HOST:PORT), got 'local"),
        ("rows_per_shard=true", "rows_per_shard must be a whole number, got True"),
        ("rows_per_shard=null", "rows_per_shard must be a whole number, got None"),
        ("rows_per_shard=0", "rows_per_shard must be at least 1, got 0"),
        ("rows_per_shard=[1", "rows_per_shard=[1: cannot be read: "),
        ("num_actors=many", "num_actors must be a whole number from 1 or MIN:MAX"),
        ("num_actors=0", "num_actors must be a whole number from 1 or MIN:MAX"),
        ("per_dataset=1", "per_dataset must be true or false, got 1"),
        ("model=", "model must be text or null, got ''"),
        ("max_rejected=-0.1", "max_rejected must be in [0, 1], got -0.1"),
        ("seed=1", "setting 'seed' was renamed to 'selection.seed'"),
        (
            "dataset.paths=a,,b",
            "dataset.paths must be text, or a list of texts, got ['a', '', 'b']",
        ),
        ("dataset.paths=[1]", "dataset.paths must be text, or a list of texts, got [1]"),
        ("dataset.subset_ratio=0", "dataset.subset_ratio must be in (0, 1], got 0.0"),
        ("dataset.max_sequence_length=0", "scoring.max_sequence_length must be at least 1, got 0"),
        (
            "scoring.dtype=float16",
            "scoring.dtype must be one of float32, bfloat16 or null, got 'float16'",
        ),
        (
            "scoring.max_tokens_per_batch=0",
            "scoring.max_tokens_per_batch must be at least 1, got 0",
        ),
        ("preset=nope", "preset must be a YAML file or one of: gpu, original, got 'nope'"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(SelectConfig, [override])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows_per_shrd: 3", "unknown setting 'rows_per_shrd'; did you mean 'rows_per_shard'?"),
        ("a: [", "cannot be read"),
        ("- 1", "must be a mapping"),
        ("model: ${nowhere}", "cannot be read"),
        ("num_actors: x", "num_actors must be a whole number from 1 or MIN:MAX"),
        ("seed: 1", "setting 'seed' was renamed to 'selection.seed'"),
    ],
)
def test_a_broken_preset_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(SelectConfig, [f"preset={file}"])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_values_of_a_wrong_type_are_refused_like_overrides() -> None:
    with pytest.raises(ConfigError, match="selection_percentage must be a finite number"):
        from_values(SelectConfig, {"selection_percentage": math.inf})
    with pytest.raises(ConfigError, match=r"unknown setting 'datset\.paths'"):
        from_values(SelectConfig, {"datset.paths": []})


ORIGINAL_NAMES = {
    "stage_1_pretrain": [
        "dataset.subset_ratio=0.1", "dataset.max_sequence_length=512", "training.batch_size=8",
        "training.learning_rate=1e-4", "training.peft_mode=lora", "training.lora.r=8",
        "training.lora.lora_alpha=16", "seed=1",
    ],
    "stage_2_selection": [
        "selection_percentage=0.1", "model_checkpoint_path=weights.pt", "dataset.subset_ratio=0.1",
        "dataset.max_sequence_length=512",
    ],
    "stage_3_finetune": [
        "dataset.data_path=selected_data.jsonl", "dataset.max_sequence_length=512",
        "training.batch_size=8", "training.learning_rate=1e-4", "training.lora.r=8", "seed=1",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "override"),
    [(stage, override) for stage, names in ORIGINAL_NAMES.items() for override in names],
)
def test_override_names_of_the_original_project_are_accepted(stage: str, override: str) -> None:
    assert load_config(STAGES[stage], [override]) != load_config(STAGES[stage], [])


def test_a_renamed_setting_is_refused_with_its_new_name_wherever_it_comes_from(
    tmp_path: Path,
) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("training: {max_tokens_per_forward: 1}\n")
    saved = {"training.max_tokens_per_forward": 1}
    message = (
        "^setting 'training.max_tokens_per_forward' was renamed to 'training.max_tokens_per_batch'$"
    )
    for overrides in (["training.max_tokens_per_forward=1"], [f"preset={preset}"]):
        with pytest.raises(ConfigError, match=message):
            load_config(WarmupConfig, overrides)
    for load in (
        lambda: load_config(WarmupConfig, [], values=saved),
        lambda: from_values(WarmupConfig, saved),
    ):
        with pytest.raises(ConfigError, match=message):
            load()


def test_tables_of_other_names_lead_to_settings_and_hide_none() -> None:
    for table in (ALIASES, RENAMED):
        for stage, names in table.items():
            known = setting_types(STAGES[stage]).keys()
            assert known.isdisjoint(names)
            assert known >= set(names.values())
    for stage, reasons in REMOVED.items():
        assert setting_types(STAGES[stage]).keys().isdisjoint(reasons)


def test_settings_are_checked_when_built_without_a_command_too() -> None:
    with pytest.raises(ConfigError, match=r"subset_ratio must be in \(0, 1\], got 2"):
        DatasetConfig(subset_ratio=2)


def test_a_setting_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^base must be given: --base BASE$"):
        load_config(ConvertConfig, ["save_path=out"])
    with pytest.raises(ConfigError, match=r"^base and save_path must be given: --base BASE --s"):
        load_config(ConvertConfig, [])
    config = load_config(ConvertConfig, ["base=olmoe", "save_path=out"])
    assert (config.base, config.save_path) == ("olmoe", "out")


@pytest.mark.parametrize("config_class", STAGES.values(), ids=STAGES)
def test_help_names_and_explains_every_setting(
    config_class: type[StageConfig],
) -> None:
    lines = settings_help(config_class).splitlines()
    for key in setting_types(config_class):
        [number] = [n for n, line in enumerate(lines) if line.startswith(f"  {key}=")]
        assert lines[number + 1].startswith("      ")
    assert max(map(len, lines)) <= 100
    assert "  selection_percentage=null" in settings_help(SelectConfig)


def test_an_option_has_the_type_and_the_help_of_its_setting() -> None:
    parser = argparse.ArgumentParser()
    options = {"--pct": "selection_percentage", "--data": "dataset.paths", "--all": "per_dataset"}
    add_options(parser, SelectConfig, options)
    given = vars(parser.parse_args(["--pct", "0.1", "--data", "a", "b", "--all"]))
    assert given == {
        "selection_percentage": 0.1, "dataset.paths": ["a", "b"], "per_dataset": True
    }  # fmt: skip
    assert set(vars(parser.parse_args([])).values()) == {None}
    assert "--pct PCT" in parser.format_help()
    assert "Fraction of the scored rows to keep, in (0, 1].\n" in parser.format_help()


def test_help_names_aliases_and_required_settings() -> None:
    words = " ".join(settings_help(SelectConfig).split())
    assert "longer samples are truncated. Also accepted as dataset.max_sequence_length." in words
    assert "merge_weights also a Select-MoE. Required." in settings_help(ConvertConfig)


def test_formulas_are_those_that_the_engine_knows() -> None:
    from selectmoe.scoring.formulas import SCORE_FORMULAS

    for formula in SCORE_FORMULAS:
        load_config(SelectConfig, [f"scoring.formula={formula}"])
    with pytest.raises(ConfigError) as refused:
        load_config(SelectConfig, ["scoring.formula=nope"])
    assert f"must be one of {', '.join(SCORE_FORMULAS)}" in str(refused.value)


def test_importing_the_settings_and_their_help_loads_no_heavy_library() -> None:
    script = (
        "import sys; from selectmoe.config.selection import SelectConfig;"
        "from selectmoe.config.options import add_options, settings_help;"
        "settings_help(SelectConfig);"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'numpy', 'yaml') if m in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scoring.experts_implementation=eager", "experts_implementation must be null with"),
        ("scoring.attn_implementation=eager", "attn_implementation must be sdpa with"),
    ],
)
def test_packed_rows_take_no_implementation_of_padded_ones(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SelectConfig, ["scoring.row_layout=packed", override])
