"""`cogview2 info`: what a model is made of."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview2_jax.cli import common

if TYPE_CHECKING:
    from cogview2_jax.bundle import Bundle, Description


@click.command(
    epilog="""\b
Examples:
  cogview2 info
  cogview2 info --bundle path/to/another/model
"""
)
@common.bundle_option
def info(bundle: Path | None) -> None:
    """Show the model, its configuration and the devices."""
    folder = common.check_model(bundle)
    from cogview2_jax import bundle as bundles

    with common.refusing():
        networks = bundles.networks_in(folder)
    cv, cache = common.load(folder, networks)
    description = bundles.read_description(folder)
    for name, value in _facts(folder, description, cv.bundle, cache):
        click.echo(f"{name:22s}{value}")


def _facts(
    folder: Path, description: Description, bundle: Bundle, cache: Path | None
) -> Iterator[tuple[str, str]]:
    from cogview2_jax.bundle import TRAINED_BY

    base = description.coglm_config
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    made_with = ", ".join(f"{name} {version}" for name, version in description.made_with.items())
    yield "bundle", str(folder)
    yield "size", f"{size / 1e6:.1f} MB"
    yield "made with", made_with
    for name, number in parameter_counts(description).items():
        there = bool(getattr(bundle, name))
        note = "" if there else f", not there yet: `{TRAINED_BY[name]}` makes them"
        yield f"{name} parameters", f"{number:,}{note}"
    yield "longest prompt", f"{base.max_text} tokens"
    vocabulary = base.vocabulary
    yield (
        "vocabulary",
        f"{vocabulary.num_image} image tokens in {bundle.num_clusters or 'no'} clusters,"
        f" {vocabulary.num_text} text pieces",
    )
    yield "coarse grid", "{} × {}".format(*base.grid)
    yield "fine grid", "{} × {}".format(*description.direct_config.grid)
    for config in description[:5]:
        text = textwrap.wrap(repr(config), 76)
        yield type(config).__name__, ("\n" + " " * 22).join(text)
    for device in common.devices():
        yield "device", device
    yield "versions", ", ".join(f"{name} {version}" for name, version in common.versions().items())
    yield "compilation cache", str(cache) if cache else "none (not writable)"


def parameter_counts(description: Description) -> dict[str, int]:
    """Parameters of each network of this configuration, in the order of training."""
    from cogview2_jax import bundle as bundles

    counts = dict.fromkeys(bundles.NETWORKS, 0)
    for name, shape in bundles.expected_shapes(*description[:4]).items():
        network = name.split("/")[0]
        if network in counts:
            counts[network] += math.prod(shape)
    return counts
