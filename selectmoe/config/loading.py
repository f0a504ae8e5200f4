"""From defaults, presets, options and overrides to one checked configuration, and its --help.

A run's settings are, each over the one before: the defaults of `config.py`, a preset
(`preset=NAME`, a file in `presets/<stage>/`, or a YAML file of your own), the command's options,
`key=value` overrides.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from selectmoe.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
NOT_GIVEN = "???"  # stands where a setting has no default, as in Hydra
HELP_WIDTH = 98
OPTIONS = {"pct": "selection_percentage", "data": "dataset.paths"}
"""Options of the commands that are named otherwise than their settings."""


class StageConfig(Protocol):
    """What the functions below take: one of the dataclasses of a stage."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    stage: ClassVar[str]


Config = TypeVar("Config", bound=StageConfig)


def load_config(
    config_class: type[Config],
    overrides: Sequence[str],
    *,
    values: Mapping[str, object] | None = None,
) -> Config:
    """The defaults of `config_class`, then a preset, `values` by dotted key, and `overrides`.

    >>> load_config(SelectConfig, ["preset=gpu", "dataset.subset_ratio=0.1"])

    Raises ConfigError for an override that is no assignment, an unknown key (with the nearest
    known one), a value of a wrong type or out of range.
    """
    known = setting_types(config_class)
    preset: dict[str, object] = {}
    overridden: dict[str, object] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override must have the form key=value, got {override!r}")
        if key == "preset":
            preset |= read_preset(config_class, text)
        elif key not in known:
            raise _unknown(config_class, key)
        else:
            overridden[key] = _parsed(key, text, known[key])
    return from_values(config_class, {**preset, **(values or {}), **overridden})


def read_preset(config_class: type[StageConfig], name: str) -> dict[str, object]:
    """The settings of a preset of this stage, or of the YAML file at `name`, by dotted key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    shipped = {file.stem: file for file in (PRESETS / config_class.stage).glob("*.yaml")}
    file = shipped.get(name, Path(name).expanduser())
    if not file.is_file():
        names = ", ".join(sorted(shipped)) or "none"
        raise ConfigError(f"preset must be a YAML file or one of: {names}, got {name!r}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a preset must be a mapping of settings to values")
    return _by_dotted_key(tree)


def from_values(config_class: type[Config], values: Mapping[str, object]) -> Config:
    """The defaults of `config_class` with dotted keys set; checks names, types and ranges."""
    known = setting_types(config_class)
    converted = default_values(config_class)
    for key, value in values.items():
        if key not in known:
            raise _unknown(config_class, key)
        converted[key] = _converted(key, value, known[key])
    if missing := [key for key, value in converted.items() if value is NOT_GIVEN]:
        # Such settings all have options of the same names.
        options = " ".join(f"--{key.replace('_', '-')} {key.upper()}" for key in missing)
        raise ConfigError(f"{' and '.join(missing)} must be given: {options}")
    return _built(config_class, converted)


def resolved(config: object) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON has it; `from_values` turns it back."""
    tree = dataclasses.asdict(config)  # type: ignore[call-overload]
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in _by_dotted_key(tree).items()
    }


def settings_help(config_class: type[StageConfig]) -> str:
    """Every setting with its default and explanation, for --help."""
    explanations = _explanations(config_class)
    lines = []
    for key, default in default_values(config_class).items():
        lines += [f"  {key}={_as_typed(default)}", *_indented(explanations[key])]
    presets = sorted(file.stem for file in (PRESETS / config_class.stage).glob("*.yaml"))
    names = ", ".join(presets) or "none"
    lines += ["  preset=NAME", *_indented(f"A YAML file of settings, or one of: {names}.")]
    return "\n".join(lines)


@functools.cache
def setting_types(config_class: type) -> dict[str, Any]:
    """The type of every setting by its dotted key."""
    hints = typing.get_type_hints(config_class)
    found: dict[str, Any] = {}
    for setting in dataclasses.fields(config_class):
        hint = hints[setting.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found |= {f"{setting.name}.{key}": entry for key, entry in setting_types(hint).items()}
        else:
            found[setting.name] = hint
    return found


def default_values(config_class: type[StageConfig]) -> dict[str, object]:
    """The default of every setting by its dotted key; NOT_GIVEN where there is none."""
    found: dict[str, object] = {}
    for setting in dataclasses.fields(config_class):
        if setting.default_factory is not dataclasses.MISSING:
            found |= _by_dotted_key({setting.name: dataclasses.asdict(setting.default_factory())})
        else:
            missing = setting.default is dataclasses.MISSING
            found[setting.name] = NOT_GIVEN if missing else setting.default
    return found


def _built(config_class: Callable[..., Config], values: Mapping[str, object]) -> Config:
    hints = typing.get_type_hints(config_class)
    settings: dict[str, object] = {}
    groups: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        name, is_in_group, rest = key.partition(".")
        if is_in_group:
            groups.setdefault(name, {})[rest] = value
        else:
            settings[name] = value
    built: dict[str, Any] = {name: _built(hints[name], group) for name, group in groups.items()}
    return config_class(**settings, **built)


def _by_dotted_key(tree: Mapping[Any, Any]) -> dict[str, object]:
    """{"dataset": {"subset_ratio": 1.0}} -> {"dataset.subset_ratio": 1.0}"""
    found: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": entry for name, entry in _by_dotted_key(value).items()}
        else:
            found[str(key)] = value
    return found


def _parsed(key: str, text: str, hint: Any) -> object:  # noqa: ANN401 (a type of any kind)
    """The value that an override gives.

    Text is taken as typed, so a path may hold blanks, commas or brackets; whatever else, and text
    in quotes, is read by Hydra's grammar.
    """
    options = _options(hint)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_null = text == "null" and types.NoneType in options
    if str in options or _choices(options):
        if not quoted and not is_null:
            return text
    elif typing.get_origin(options[0]) is tuple and not quoted and not text.startswith("["):
        return [entry.strip() for entry in text.split(",")]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        [override] = OverridesParser.create().parse_overrides([f"{key}={text}"])
    except HydraException as error:
        raise ConfigError(f"{key}={text}: cannot be read: {_one_line(error)}") from error
    return text if override.is_sweep_override() else override.value()


def _converted(key: str, value: object, hint: Any) -> object:  # noqa: ANN401 (a type of any kind)
    """`value` as `hint` wants it: a whole number may stand for a float, a list for a tuple."""
    options = _options(hint)
    if value is None and types.NoneType in options:
        return None
    if typing.get_origin(options[0]) is tuple:
        entries = [value] if isinstance(value, str) else value
        if isinstance(entries, list | tuple) and all(isinstance(e, str) and e for e in entries):
            return tuple(entries)
    elif value in _choices(options) or (type(value) in options and value not in ("", None)):
        if not isinstance(value, float) or math.isfinite(value):
            return value
    elif float in options and type(value) is int:
        return float(value)
    raise ConfigError(f"{key} must be {_described(options)}, got {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 (a type of any kind)
    """The types that a value may have: (int, NoneType) of `int | None`."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _choices(options: Sequence[Any]) -> tuple[str, ...]:
    """The words of a Literal among the options."""
    literals = [option for option in options if typing.get_origin(option) is Literal]
    return tuple(word for literal in literals for word in typing.get_args(literal))


def _described(options: Sequence[Any]) -> str:
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    names[types.NoneType] = "null"
    choices = _choices(options)
    words = ["one of " + ", ".join(choices)] if choices else []
    words += [names[option] for option in options if option in names]
    return " or ".join(words) if words else "text, or a list of texts"


def _indented(text: str) -> list[str]:
    """Lines below a setting; names of presets are not broken at their hyphens."""
    indent = " " * 6
    return textwrap.wrap(
        text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _as_typed(value: object) -> str:
    """A default as an override would give it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def _unknown(config_class: type[StageConfig], key: str) -> ConfigError:
    """subset_ratio -> dataset.subset_ratio, selection_percentge -> selection_percentage"""
    known = [*setting_types(config_class), "preset"]
    key_of_option = OPTIONS.get(key.replace("-", "_").lstrip("_"))
    same_ending = [name for name in known if name == key_of_option or name.endswith(f".{key}")]
    [nearest] = same_ending[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"unknown setting {key!r}; did you mean {nearest!r}?")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).partition("\nSee ")[0].split())


def _explanations(config_class: type) -> dict[str, str]:
    """The docstring below each field; Python keeps them only in the source."""
    module = ast.parse(inspect.getsource(sys.modules[config_class.__module__]))
    bodies = {node.name: node.body for node in module.body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found |= {f"{name}.{key}": text for key, text in _explanations(hint).items()}
    return _documented(bodies[config_class.__name__]) | found


def _documented(body: Sequence[ast.stmt]) -> dict[str, str]:
    """The text below each annotated name of a class body."""
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found
