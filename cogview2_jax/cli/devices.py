"""The devices that a model is shared over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import common

if TYPE_CHECKING:
    from cogview2_jax.sharding import Sharding


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option(
            "--data",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            metavar="N",
            help="Of --devices, groups that each have the whole model and draw other pictures.",
        ),
        click.option(
            "--devices",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            metavar="N",
            help="Devices of this machine to share every layer's heads and MLP over"
            " (tensor-parallel), so that a model fits that is too large for one.",
        ),
    ):
        command = decorate(command)
    return command


def sharding_of(number: int, data: int) -> Sharding | None:
    """The first `number` devices as a mesh of `data` groups; None for one device.

    Raises ClickException if there are fewer, and if the groups would differ.
    """
    if number % data:
        raise click.ClickException(f"--devices must be a multiple of --data {data}: got {number}")
    if number == 1:
        return None
    import jax

    from cogview2_jax.sharding import Sharding, make_mesh

    if number > jax.local_device_count():
        there = common.devices()
        raise click.ClickException(f"--devices {number}: there is {len(there)}, {there[0]}")
    return Sharding(make_mesh(data, 1, number // data, jax.local_devices()[:number]))


def described(sharding: Sharding | None) -> dict[str, Any]:
    """What a report says of it."""
    if sharding is None:
        return {}
    return {"mesh": {name: size for name, size in sharding.mesh.shape.items() if size > 1}}
