"""What the commands share: options, checks, loading a model, writing files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax import __version__

if TYPE_CHECKING:
    from cogview2_jax.pipeline.cogview import CogView

VERSIONS = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "sentencepiece")

bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a model; default: the one that ships.",
)


# --- Checks before anything is computed -----------------------------------------------------------


@contextlib.contextmanager
def refusing(what: str = "") -> Iterator[None]:
    """Known errors inside become the one line that the user sees."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise click.ClickException(what + message) from error


def check_model(bundle: Path | None, prompts: Sequence[str] = ()) -> Path:
    """The bundle's folder, if its configuration and text model are fit and spell the prompts."""
    from cogview2_jax import bundle as bundles
    from cogview2_jax.tokenizer import text

    with refusing():
        folder = bundles.locate(bundle)
        description = bundles.read_description(folder)
        model = bundles.read_text_model(folder, description)
    config = description.coglm_config
    for prompt in prompts:
        with refusing(f"prompt {textwrap.shorten(prompt[:200], 40, placeholder='…')!r}: "):
            text.encode_prompt(model, prompt, config.vocabulary, config.max_text)
    return folder


def check_writable(out: Path) -> None:
    """Raises ClickException unless a file can be made in `out`. Leaves nothing behind."""
    place = out.absolute()
    try:
        # A folder that is missing is made at the end; here its nearest parent must take a new one.
        while not place.exists() and place != place.parent:
            place = place.parent
        if place == out.absolute():
            tempfile.TemporaryFile(dir=place).close()
        else:
            os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error.strerror}") from error


# --- The model and its compilations ---------------------------------------------------------------


def load(folder: Path, networks: Collection[str]) -> tuple[CogView, Path | None]:
    """The model with these of its networks, and where compiled programs are kept."""
    cache = use_compilation_cache()
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline.cogview import CogView

    with refusing():
        return CogView(bundles.load(folder, networks)), cache


def use_compilation_cache() -> Path | None:
    """Keep compiled programs on disk. Returns where, or None when that place is not writable."""
    import jax

    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        if chosen:
            folder = Path(chosen)
        else:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(home) / "cogview2_jax"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default small and quick programs are not kept, but many of them add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def devices() -> list[str]:
    import jax

    return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]


def versions() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {"cogview2_jax": __version__, "python": python} | {
        name: importlib.metadata.version(name) for name in VERSIONS
    }


# --- What is written ------------------------------------------------------------------------------


def write_all(out: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write all files into `out` under temporary names, then give them their own."""
    written: dict[Path, Path] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = out / f".{name}.{os.getpid()}.partial"
            written[partial] = out / name
            partial.write_bytes(content)
        for partial, file in written.items():
            partial.replace(file)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error.strerror}") from error
    finally:
        for partial in written:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return list(written.values())


def to_json(report: Mapping[str, Any]) -> bytes:
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
