"""Work on a cluster: the options of commands that write shards, and the call itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import common

if TYPE_CHECKING:
    from cogview2_jax.data.engine import Cluster
    from cogview2_jax.data.shards import Progress, Report

_CHOICES = (
    click.option(
        "--engine",
        type=click.Choice(["ray"]),
        help="Let the processes of a cluster do the work: needs the extra `ray`.",
    ),
    click.option(
        "--address",
        metavar="ADDRESS",
        help="Of a running cluster, or auto. Default: one of this machine, while the command runs.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(1),
        metavar="N",
        help="Of the cluster. Default: as many as it has room for, one for each CPU or as --gpus"
        " says.",
    ),
    click.option(
        "--gpus",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        metavar="X",
        help="GPUs of each process: 0.25 puts four on one.",
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for choice in reversed(_CHOICES):
        command = choice(command)
    return command


def chosen(
    engine: str | None, address: str | None, processes: int | None, gpus: float
) -> Cluster | None:
    """The cluster that is asked for, None: this process. Raises UsageError for options without an
    engine, and ClickException for one that is not installed.
    """
    if engine is None:
        if address or processes or gpus:
            raise click.UsageError("--address, --processes and --gpus go with --engine ray")
        return None
    common.require_module("ray", "ray")
    from cogview2_jax.data.engine import Cluster

    return Cluster(address, processes, gpus)


def run(call: Callable[..., Report], where: Cluster | None, progress: Progress) -> Report:
    """The work of `call`, here or on a cluster."""
    if where is None:
        return call(progress=progress)
    from cogview2_jax.data import engine

    return engine.on_cluster(call, where, progress)
