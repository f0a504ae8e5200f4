"""The settings of each command: frozen dataclasses, where every default stands once, beside its
explanation. YAML presets and `key=value` overrides are merged into them by Hydra.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from selectmoe.errors import ConfigError

Config = TypeVar("Config")
PRESETS = Path(__file__).parent / "configs"


def require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """What is read, and how much of it."""

    paths: tuple[str, ...] = ()
    """Corpora: files, folders, globs, URLs or hub:NAME[:split]; none is the demo corpus."""
    subset_ratio: float = 1.0
    """Share of the rows to use, in (0, 1], chosen by a hash of their content."""
    max_sequence_length: int = 1_024
    """Tokens of a sample that are read; a longer one is scored on its first so many."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "dataset.subset_ratio", "in (0, 1]", self.subset_ratio)
        length = self.max_sequence_length
        require(length >= 1, "dataset.max_sequence_length", "at least 1", length)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How the model is run and its gates are averaged."""

    formula: str = "answer_margin"
    """Name of the score: original, answer_probability, answer_margin, answer_margin_second_half
    or answer_margin_last."""
    max_tokens_per_batch: int | None = None
    """Tokens of one forward pass, padding included; none is 4,096 on a CPU and 65,536 on a GPU."""
    dtype: str | None = None
    """float32 or bfloat16; none is bfloat16 on a GPU and float32 on a CPU."""
    attn_implementation: str = "sdpa"
    """eager, sdpa or flash_attention_2."""
    experts_implementation: str | None = None
    """eager, grouped_mm or batched_mm; none is eager on a CPU and grouped_mm on a GPU."""

    def __post_init__(self) -> None:
        tokens = self.max_tokens_per_batch
        require(tokens is None or tokens >= 1, "scoring.max_tokens_per_batch", "at least 1", tokens)
        dtypes = (None, "float32", "bfloat16")
        require(self.dtype in dtypes, "scoring.dtype", "float32 or bfloat16", self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Stage 2: score a corpus and keep the best part of it."""

    selection_percentage: float = 0.05
    """Share of the scored rows to keep, in (0, 1]; also --pct."""
    model: str | None = None
    """Select-MoE folder or hub name; none is the selector in the package."""
    model_checkpoint_path: str | None = None
    """Stage 1's weights: full_rank_weights.safetensors or the folder that holds it."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    per_dataset: bool = False
    """Apply the percentage within each data set instead of to the whole corpus."""
    max_rejected: float = 0.01
    """Share of rejected rows above which the run stops, in [0, 1]."""
    rows_per_shard: int = 512
    """Rows of one shard: what is scored, written and resumed as a whole."""
    num_actors: int | None = None
    """Scoring actors; none is one for each GPU, or for each CPU where there is no GPU."""
    num_threads_per_actor: int = 1
    """CPU threads of an actor; another number may change scores in their last digit."""
    output: str | None = None
    """Folder of this run; none is <output_root>/stage_2_selection/<date>/<time>."""
    output_root: str | None = None
    """Where runs are kept; none is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""
    scored: str | None = None
    """Folder of a finished run whose scores are cut again, without scoring."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    seed: int = 0
    """Kept in the manifest; scoring and selection draw nothing at random."""

    def __post_init__(self) -> None:
        share = self.selection_percentage
        require(0 < share <= 1, "selection_percentage (--pct)", "in (0, 1]", share)
        require(0 <= self.max_rejected <= 1, "max_rejected", "in [0, 1]", self.max_rejected)
        require(self.rows_per_shard >= 1, "rows_per_shard", "at least 1", self.rows_per_shard)
        actors, threads = self.num_actors, self.num_threads_per_actor
        require(actors is None or actors >= 1, "num_actors", "at least 1", actors)
        require(threads >= 1, "num_threads_per_actor", "at least 1", threads)


def load_config(
    config_class: type[Config],
    overrides: Sequence[str],
    *,
    values: Mapping[str, Any] | None = None,
) -> Config:
    """The defaults of `config_class` with `values` by dotted key, then `key=value` overrides as
    Hydra reads them.

    Raises ConfigError for an override that is no assignment, an unknown key (with the nearest
    known one), a value of a wrong type or out of range.
    """
    merged = dict(values or {})
    for override in overrides:
        _check_key(config_class, override)
    if overrides:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        parser = OverridesParser.create()
        for override in overrides:
            try:
                [parsed] = parser.parse_overrides([override])
            except HydraException as error:
                raise ConfigError(f"override {override!r}: {str(error).splitlines()[0]}") from error
            merged[parsed.key_or_group] = parsed.value()
    return from_values(config_class, merged)


def from_values(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The defaults of `config_class` with dotted keys set; checks names, types and ranges."""
    known = setting_types(config_class)
    tree: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise _unknown(config_class, key)
        group, _, name = key.rpartition(".")
        branch = tree.setdefault(group, {}) if group else tree
        branch[name] = _converted(key, value, known[key])
    groups = {f.name: f.default_factory for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return config_class(
        **{
            name: type(groups[name]())(**branch) if isinstance(branch, dict) else branch
            for name, branch in tree.items()
        }
    )


def resolved(config: object) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON has it."""
    values: dict[str, Any] = {}
    for setting in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{setting.name}.{key}": entry for key, entry in resolved(value).items()}
        else:
            values[setting.name] = list(value) if isinstance(value, tuple) else value
    return values


@functools.cache
def setting_types(config_class: type) -> dict[str, Any]:
    """The type of every setting by its dotted key."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{key}": entry for key, entry in setting_types(hint).items()}
        else:
            found[name] = hint
    return found


def settings_help(config_class: type) -> str:
    """Every setting with its default and explanation, for --help."""
    defaults = resolved(config_class())
    explanations = _explanations(config_class)
    lines = []
    for key, default in defaults.items():
        value = "none" if default in (None, []) else str(default).lower()
        lines.append(f"  {key}={value}\n      {explanations[key]}")
    return "\n".join(lines)


def _explanations(config_class: type) -> dict[str, str]:
    """The docstring below each field; Python keeps them only in the source."""
    [tree] = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(tree, ast.ClassDef)
    hints = typing.get_type_hints(config_class)
    found: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        if dataclasses.is_dataclass(hints[name]):
            nested = _explanations(hints[name])
            found |= {f"{name}.{key}": text for key, text in nested.items()}
        elif isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[name] = " ".join(str(following.value.value).split())
    return found


def _check_key(config_class: type, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} must have the form key=value")
    if key not in setting_types(config_class):
        raise _unknown(config_class, key)


def _unknown(config_class: type, key: str) -> ConfigError:
    near = difflib.get_close_matches(key, setting_types(config_class), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown setting {key!r}{hint}")


def _converted(key: str, value: object, hint: Any) -> object:  # noqa: ANN401 (a type of any kind)
    """`value` as `hint` wants it; Hydra has already made numbers, booleans and lists of text."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (value == "none" and types.NoneType in options):
        if types.NoneType in options:
            return None
    elif typing.get_origin(options[0]) is tuple:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(str(entry) for entry in entries)
    elif str in options and not isinstance(value, bool | list | dict):
        return str(value)
    elif float in options and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) in options:
        return value
    names = " or ".join("none" if o is types.NoneType else o.__name__ for o in options)
    raise ConfigError(f"{key} must be {names}, got {value!r}")
