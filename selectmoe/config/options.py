"""Builds the options and the --help of a command from its settings."""

import argparse
import ast
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Mapping

from selectmoe.config.loading import (
    NOT_GIVEN,
    StageConfig,
    accepted_types,
    choices_of,
    default_values,
    preset_names,
    setting_types,
)
from selectmoe.config.renamed import ALIASES

HELP_WIDTH = 98


def add_options(
    parser: argparse.ArgumentParser, config_class: type[StageConfig], options: Mapping[str, str]
) -> None:
    """Adds an option for each setting, {"--data": "dataset.paths"}; its help is the beginning of
    the setting's explanation, up to the first semicolon or full stop."""
    hints, explanations = setting_types(config_class), setting_explanations(config_class)
    for option, key in options.items():
        [kind, *_] = accepted_types(hints[key])
        behaviour: dict[str, typing.Any] = {"metavar": option.strip("-").replace("-", "_").upper()}
        if kind is bool:
            behaviour = {"action": "store_const", "const": True}
        elif typing.get_origin(kind) is tuple:
            behaviour["nargs"] = "+"
        elif kind in (int, float):
            behaviour["type"] = kind
        text = explanations[key].partition(";")[0].partition(". ")[0].rstrip(".") + "."
        parser.add_argument(option, dest=key, help=text.replace("%", "%%"), **behaviour)


def settings_help(config_class: type[StageConfig]) -> str:
    """Every setting with its default and explanation, for --help."""
    hints, explanations = setting_types(config_class), setting_explanations(config_class)
    aliases = {key: alias for alias, key in ALIASES.get(config_class.stage, {}).items()}
    lines = []
    for key, default in default_values(config_class).items():
        choices = ", ".join(choices_of(accepted_types(hints[key])))
        text = explanations[key] + (f" Choices: {choices}." if choices else "")
        text += f" Also accepted as {aliases[key]}." if key in aliases else ""
        text += " Required." if default is NOT_GIVEN else ""
        lines += [f"  {key}={_format_value(default)}", *_indent(text)]
    names = ", ".join(preset_names(config_class))
    preset = (
        f"A YAML file of settings, or one of: {names}." if names else "A YAML file of settings."
    )
    lines += ["  preset=NAME", *_indent(preset)]
    return "\n".join(lines)


def setting_explanations(config_class: type) -> dict[str, str]:
    """The docstring below each field, by dotted key; Python keeps them only in the source."""
    explanations: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        module = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        bodies = {node.name: node.body for node in module.body if isinstance(node, ast.ClassDef)}
        for statement, following in itertools.pairwise(bodies[base.__name__]):
            match statement, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    explanations[name] = " ".join(text.split())
    for name, hint in typing.get_type_hints(config_class).items():
        if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
            explanations |= {
                f"{name}.{key}": text for key, text in setting_explanations(hint).items()
            }
    return explanations


def _indent(text: str) -> list[str]:
    """Lines below a setting; names of presets are not broken at their hyphens."""
    indent = " " * 6
    return textwrap.wrap(
        text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _format_value(value: object) -> str:
    """A default as an override would give it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {entry}" for name, entry in value.items()) + "}"
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)
