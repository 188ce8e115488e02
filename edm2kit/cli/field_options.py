"""Options made from the fields of a dataclass: one definition for the command line, YAML files and documents."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import click

from edm2kit.cli.click_types import AtLeast, Decorator, Parsed, Size


def options_from(config: type, *names: str, defaults: Mapping[str, Any] | None = None) -> list[Decorator]:
    """Click options for fields of a dataclass: those in `names`, or all that have one.

    A field describes its option in its metadata:

    - `option`: its name on the command line; without it the field has none. `help`: its help text.
    - `metavar`: NIMG stands for a number of images such as 128Ki or 8Mi. A bool without a metavar is a flag.
    - `bare`: the value that the option stands for without one, such as --compile for --compile on.
    - `choices`, `min`, or `parse` (a function from text that raises ValueError), if the type does not say enough.
    - `hidden`: --help leaves it out, because another option describes it.
    - `default_shown`, if the default itself does not tell the reader what happens.

    An option has the value None unless it is given, so that a default stays in the dataclass alone; --help shows it, or
    the one in `defaults` if the command uses another.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    options = []
    for name in names or option_fields(config):
        metadata = fields[name].metadata
        help_text, default = metadata["help"], default_text(fields[name])
        if defaults and name in defaults:
            default = value_text(defaults[name], metadata.get("metavar"))
        is_flag = hints[name] is bool and "metavar" not in metadata
        if default and not is_flag:
            help_text = f"{help_text}  [default: {default}]"
        settings: dict[str, Any] = {"metavar": metadata.get("metavar"), "help": help_text}
        settings["hidden"] = metadata.get("hidden", False)
        if is_flag:
            settings |= {"is_flag": True, "default": None}
        else:
            settings["type"] = _value_type(metadata, hints[name])
            if "bare" in metadata:
                settings |= {"is_flag": False, "flag_value": metadata["bare"]}
        options.append(click.option(metadata["option"], name, **settings))
    return options


def option_fields(config: type) -> list[str]:
    """The names of the fields of a dataclass that are options."""
    return [field.name for field in dataclasses.fields(config) if "option" in field.metadata]


def _value_type(metadata: Mapping[str, Any], hint: Any) -> click.ParamType | type:
    if "parse" in metadata:
        return Parsed(metadata["parse"])
    if "choices" in metadata:
        return click.Choice(list(metadata["choices"]))
    if metadata.get("metavar") == "NIMG":
        return Size()
    if isinstance(hint, types.UnionType):  # such as int | None
        hint = typing.get_args(hint)[0]
    return AtLeast(hint, metadata["min"]) if "min" in metadata else hint


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of a field as it would be written on the command line; "" if there is none."""
    if "default_shown" in field.metadata:
        return field.metadata["default_shown"]
    if field.default in (None, "", dataclasses.MISSING):
        return ""
    return value_text(field.default, field.metadata.get("metavar"))


def value_text(value: Any, metavar: str | None = None) -> str:
    """A value as it would be written on the command line; the metavar NIMG stands for a number of images."""
    if isinstance(value, bool):
        return str(value).lower()
    if metavar == "NIMG" and isinstance(value, int):
        return size_text(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        numbers = [f"{number:g}" for number in value]
        return ",".join(numbers)
    return str(value)


def settings_table(config: type) -> str:
    """The fields of a configuration as a table in Markdown, for the documents."""
    lines = ["| setting | option | default | may change on resume | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(config):
        option, default = field.metadata.get("option"), default_text(field)
        cells = (
            f"`{field.name}`",
            f"`{option}`" if option else "",
            f"`{default}`" if default else "",
            "yes" if field.metadata.get("free") else "",
            field.metadata["help"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size_text(count: int) -> str:
    """A count as `Size` reads it, such as 128Ki, if that is shorter to read than its digits."""
    for suffix, unit in (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
        if count >= 10 << 10 and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)


class Interval(click.ParamType):
    """Two noise levels LO,HI as a pair of floats."""

    name = "lo,hi"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            lo, hi = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r:.60} is not a pair of noise levels; write for example 0.28,2.90 or 0.28,inf", param, ctx
            )
        if not 0 <= lo < hi:
            self.fail(f"{value:.60} runs backwards; expected LO < HI, both from 0", param, ctx)
        return lo, hi
