"""What experiments share: the model of --bundle, and the record of --json."""

import json
import time
from pathlib import Path
from typing import Any

import click
import jax

import cogview2_jax
from cogview2_jax.pipeline.cogview import CogView


def load_model(bundle: Path | None) -> CogView:
    """The model of --bundle, or the one that ships. Raises UsageError for what cannot be loaded."""
    try:
        return cogview2_jax.load(bundle)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def write(file: Path, figures: dict[str, Any], bundle: Path | None, begin: float) -> None:
    """Write figures as JSON, with the bundle's name, the time since `begin` and jax's version."""
    circumstances = {
        "bundle": bundle.name if bundle else None,
        "seconds": round(time.monotonic() - begin, 1),
        "jax": jax.__version__,
    }
    file.write_text(json.dumps(figures | circumstances, indent=2) + "\n", "utf-8")
