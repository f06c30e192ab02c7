"""Options that change how a model draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from cogview2_jax.cli import common

_NUMBER, _WHOLE = click.FloatRange(0), click.IntRange(1)
# Options that change how a model draws: the part of `Sampling`, its field, type and help.
_OPTIONS: dict[str, tuple[str, str, click.ParamType, str]] = {
    "temperature": (
        *("base", "temperature", _NUMBER),
        "Of the base stage; 0 takes the most probable token.",
    ),
    "top_clusters": (
        *("base", "top_clusters", _WHOLE),
        "Clusters of the codebook that the base stage draws from.",
    ),
    "direct_top_clusters": (
        *("direct", "top_clusters", _WHOLE),
        "Clusters that direct super-resolution draws from.",
    ),
    "direct_within_temperature": (
        *("direct", "within_temperature", _NUMBER),
        "Of direct super-resolution inside a cluster.",
    ),
    "iterative_temperature": (
        *("", "iterative_temperature", _NUMBER),
        "Of the rounds of iterative super-resolution.",
    ),
    "text_upweight": (
        *("", "text_upweight", click.FLOAT),
        "Added to the attention scores of words at the base stage.",
    ),
    "guidance": (
        *("", "guidance", click.FLOAT),
        "Classifier-free guidance of the base stage, for a model trained with --drop-text; 1 is"
        " none. It takes twice the work.",
    ),
}


def changed(bundle: Any, given: dict[str, float]) -> Any:
    """A bundle, or its description, with these sampling options, in every style too.

    Raises ClickException for a value that is refused.
    """
    fields: dict[str, dict[str, float]] = {"base": {}, "direct": {}, "": {}}
    for option, value in given.items():
        part, name, *_ = _OPTIONS[option]
        fields[part][name] = value

    def both(drawn: Any, **more: float) -> Any:
        """A `Sampling` or `Style` with both of its parts changed."""
        parts = {
            name: dataclasses.replace(getattr(drawn, name), **fields[name])
            for name in ("base", "direct")
        }
        return dataclasses.replace(drawn, **parts, **more)

    with common.refusing():
        return bundle._replace(
            sampling=both(bundle.sampling, **fields[""]),
            styles=tuple(map(both, bundle.styles)),
        )


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, (_, _, kind, words) in reversed(_OPTIONS.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="X",
            help=f"{words}  [default: what the style or bundle says]",
        )(command)
    return command
