"""Options of the command line, made from the `setting` fields of dataclasses.

A dataclass states default, range and help once. Here they become click options, and the user's
values become the dataclass again. tyro does the same with argparse; click stays because the other
commands, their help and their one-line errors are click's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import click

Settings = TypeVar("Settings")


def from_settings(*classes: type) -> Callable[[Any], Any]:
    """A decorator that adds an option for every `setting` of the dataclasses."""

    def decorate(command: Any) -> Any:
        for each in reversed([field for kind in classes for field in _settings(kind)]):
            command = _option(each)(command)
        return command

    return decorate


def take(kind: type[Settings], chosen: dict[str, Any]) -> Settings:
    """The dataclass made from its values in `chosen`, which are removed. Raises as it does."""
    return kind(**{each.name: chosen.pop(each.name) for each in _settings(kind)})


def _settings(kind: Any) -> list[dataclasses.Field]:
    return [each for each in dataclasses.fields(kind) if "help" in each.metadata]


def _option(about: dataclasses.Field) -> Any:
    known, default = about.metadata, about.default
    name = "--" + (known["flag"] or about.name).replace("_", "-")
    given: dict[str, Any] = {"default": default, "help": known["help"]}
    if isinstance(default, bool):
        flag = f"{name}/--no-{name[2:]}" if default else name
        return click.option(flag, about.name, is_flag=True, show_default=default, **given)
    return click.option(
        name,
        about.name,
        type=_type(about),
        metavar=None if known["choices"] else known["metavar"],
        multiple=isinstance(default, tuple),
        show_default=default is not None and default != (),
        **given,
    )


def _type(about: dataclasses.Field) -> Any:
    known, limits = about.metadata, about.metadata["limits"]
    if known["choices"]:
        return click.Choice(known["choices"])
    if not limits:
        return str
    low, high = (
        next((limits[name] for name in names if name in limits), None)
        for names in (("least", "above"), ("most", "below"))
    )
    kind = click.IntRange if "int" in str(about.type) else click.FloatRange
    return kind(low, high, min_open="above" in limits, max_open="below" in limits)
