"""Builds a checked configuration from defaults, a preset, options and overrides.

The settings of a run are, each overriding the one before: the defaults of the stage's dataclass, a
preset (`preset=NAME`, a file in `presets/<stage>/`, or a YAML file of your own), the command's
options, `key=value` overrides.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from selectmoe.config.renamed import ALIASES, REMOVED, RENAMED
from selectmoe.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
NOT_GIVEN = "???"  # stands where a setting has no default, as in Hydra
OPTIONS = {"pct": "selection_percentage", "data": "dataset.paths"}
"""Options of the commands that are not named like their settings."""


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

    Raises ConfigError for an override that is no assignment, an unknown key (with its new name, or
    the nearest known one), a value of a wrong type or out of range.
    """
    preset: dict[str, object] = {}
    overridden: dict[str, object] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override must have the form key=value, got {override!r}")
        if key == "preset":
            preset |= read_preset(config_class, text)
        else:
            name = setting_name(config_class, key)
            overridden[name] = _parse(key, text, setting_types(config_class)[name])
    given = {setting_name(config_class, key): value for key, value in (values or {}).items()}
    return from_values(config_class, {**preset, **given, **overridden})


def read_preset(config_class: type[StageConfig], name: str) -> dict[str, object]:
    """The settings of a preset of this stage, or of the YAML file at `name`, by dotted key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    names = preset_names(config_class)
    shipped = PRESETS / config_class.stage / f"{name}.yaml"
    file = shipped if name in names else Path(name).expanduser()
    if not file.is_file():
        known = ", ".join(names) or "none"
        raise ConfigError(f"preset must be a YAML file or one of: {known}, got {name!r}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a preset must be a mapping of settings to values")
    flat = _by_dotted_key(tree, setting_types(config_class))
    return {setting_name(config_class, key): value for key, value in flat.items()}


def preset_names(config_class: type[StageConfig]) -> list[str]:
    return sorted(file.stem for file in (PRESETS / config_class.stage).glob("*.yaml"))


def from_values(config_class: type[Config], values: Mapping[str, object]) -> Config:
    """The defaults of `config_class` with dotted keys set; checks names, types and ranges."""
    known = setting_types(config_class)
    converted = default_values(config_class)
    for key, value in values.items():
        name = setting_name(config_class, key)
        converted[name] = _convert(key, value, known[name])
    if missing := [key for key, value in converted.items() if value is NOT_GIVEN]:
        # Such settings all have options of the same names.
        options = " ".join(f"--{key.replace('_', '-')} {key.upper()}" for key in missing)
        raise ConfigError(f"{' and '.join(missing)} must be given: {options}")
    return _build(config_class, converted)


def resolved(config: StageConfig) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON has it; `from_values` turns it back."""
    settings = setting_types(type(config))
    values = _by_dotted_key(dataclasses.asdict(config), settings)
    ordered = ((key, values[key]) for key in settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in ordered}


def setting_name(config_class: type[StageConfig], key: str) -> str:
    """The setting that `key` names, by its own name or an alias.

    Raises ConfigError with the new name of a renamed setting, the reason why a former one is gone,
    or the nearest name to an unknown one: subset_ratio -> dataset.subset_ratio.
    """
    stage = config_class.stage
    key = ALIASES.get(stage, {}).get(key, key)
    known = [*setting_types(config_class), "preset"]
    if key in known[:-1]:
        return key
    if new := RENAMED.get(stage, {}).get(key):
        raise ConfigError(f"setting {key!r} was renamed to {new!r}")
    if reason := REMOVED.get(stage, {}).get(key):
        raise ConfigError(f"setting {key!r} was removed: {reason}")
    key_of_option = OPTIONS.get(key.replace("-", "_").lstrip("_"))
    same_ending = [name for name in known if name == key_of_option or name.endswith(f".{key}")]
    [nearest] = same_ending[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    raise ConfigError(f"unknown setting {key!r}; did you mean {nearest!r}?")


def is_known_setting(config_class: type[StageConfig], key: str) -> bool:
    """True for the name of a setting that this stage has, or had in an older version."""
    names = (mapping.get(config_class.stage, {}) for mapping in (ALIASES, RENAMED, REMOVED))
    return key in setting_types(config_class) or any(key in former for former in names)


@functools.cache
def setting_types(config_class: type) -> dict[str, Any]:
    """The type of every setting by its dotted key."""
    hints = typing.get_type_hints(config_class)
    hints_by_key: dict[str, Any] = {}
    for setting in _fields(config_class):
        hint = hints[setting.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            hints_by_key |= {
                f"{setting.name}.{key}": entry for key, entry in setting_types(hint).items()
            }
        else:
            hints_by_key[setting.name] = hint
    return hints_by_key


def default_values(config_class: type[StageConfig]) -> dict[str, object]:
    """The default of every setting by its dotted key; NOT_GIVEN where there is none."""
    defaults: dict[str, object] = {}
    for setting in _fields(config_class):
        if setting.default_factory is not dataclasses.MISSING:
            default: Any = setting.default_factory()
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                default = dataclasses.asdict(default)
            defaults |= _by_dotted_key({setting.name: default}, setting_types(config_class))
        else:
            missing = setting.default is dataclasses.MISSING
            defaults[setting.name] = NOT_GIVEN if missing else setting.default
    return defaults


def _fields(config_class: type) -> list[dataclasses.Field[Any]]:
    """A stage's own settings before those that it shares with other stages."""
    inherited = {
        name
        for base in config_class.__bases__
        for name in getattr(base, "__dataclass_fields__", ())
    }
    return sorted(dataclasses.fields(config_class), key=lambda setting: setting.name in inherited)


def _build(config_class: Callable[..., Config], values: Mapping[str, object]) -> Config:
    hints = typing.get_type_hints(config_class)
    settings: dict[str, object] = {}
    groups: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        name, is_in_group, rest = key.partition(".")
        if is_in_group:
            groups.setdefault(name, {})[rest] = value
        else:
            settings[name] = value
    built: dict[str, Any] = {}
    for name, group in groups.items():
        try:
            built[name] = _build(hints[name], group)
        except ConfigError as error:  # begins with the setting's name within its group
            raise ConfigError(f"{name}.{error}") from error
    return config_class(**settings, **built)


def _by_dotted_key(
    tree: Mapping[Any, Any], settings: Collection[str], prefix: str = ""
) -> dict[str, object]:
    """{"dataset": {"subset_ratio": 1.0}} -> {"dataset.subset_ratio": 1.0}

    A setting whose value is a mapping keeps it.
    """
    flat: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in settings:
            flat |= _by_dotted_key(value, settings, f"{name}.")
        else:
            flat[name] = value
    return flat


def _parse(key: str, text: str, hint: Any) -> object:  # noqa: ANN401 (a type of any kind)
    """The value that an override gives.

    Text is taken as typed, so a path may hold blanks, commas or brackets; whatever else, and text
    in quotes, is read by Hydra's grammar.
    """
    accepted = accepted_types(hint)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_null = text == "null" and types.NoneType in accepted
    if str in accepted or choices_of(accepted):
        if not quoted and not is_null:
            return text
    elif typing.get_origin(accepted[0]) is tuple and not quoted and not text.startswith("["):
        return [entry.strip() for entry in text.split(",")]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        [override] = OverridesParser.create().parse_overrides([f"{key}={text}"])
    except HydraException as error:
        raise ConfigError(f"{key}={text}: cannot be read: {_one_line(error)}") from error
    return text if override.is_sweep_override() else override.value()


def _convert(key: str, value: object, hint: Any) -> object:  # noqa: ANN401 (a type of any kind)
    """`value` as `hint` wants it: a whole number may stand for a float, a list for a tuple."""
    accepted = accepted_types(hint)
    if value is None and types.NoneType in accepted:
        return None
    if typing.get_origin(accepted[0]) is tuple:
        entries = [value] if isinstance(value, str) else value
        if isinstance(entries, list | tuple) and all(isinstance(e, str) and e for e in entries):
            return tuple(entries)
    elif _is_mapping(accepted[0]):
        if isinstance(value, Mapping) and all(
            isinstance(word, str) and word for pair in value.items() for word in pair
        ):
            return dict(value)
    elif value in choices_of(accepted) or (type(value) in accepted and value not in ("", None)):
        if not isinstance(value, float) or math.isfinite(value):
            return value
    elif float in accepted and type(value) is int:
        return float(value)
    raise ConfigError(f"{key} must be {_describe(accepted)}, got {value!r}")


def accepted_types(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 (a type of any kind)
    """The types that a value may have: (int, NoneType) of `int | None`."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _is_mapping(hint: Any) -> bool:  # noqa: ANN401 (a type of any kind)
    return typing.get_origin(hint) in (dict, Mapping)


def choices_of(accepted: Sequence[Any]) -> tuple[str, ...]:
    """The words of a Literal among the accepted types."""
    literals = [hint for hint in accepted if typing.get_origin(hint) is Literal]
    return tuple(word for literal in literals for word in typing.get_args(literal))


def _describe(accepted: Sequence[Any]) -> str:
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    names[types.NoneType] = "null"
    choices = choices_of(accepted)
    words = ["one of " + ", ".join(choices)] if choices else []
    words += [names[hint] for hint in accepted if hint in names]
    if _is_mapping(accepted[0]):
        words = ["a mapping of texts, as {prompt: q, response: a}"]
    return " or ".join(words) if words else "text, or a list of texts"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).partition("\nSee ")[0].split())
