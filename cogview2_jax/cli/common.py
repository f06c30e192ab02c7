"""What the commands share: options, checks, loading a model, writing files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax import __version__, errors
from cogview2_jax.styles import PLAIN, find_style, in_style

if TYPE_CHECKING:
    from PIL import Image

    from cogview2_jax.pipeline.cogview import CogView
    from cogview2_jax.sharding import Sharding

VERSIONS = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "sentencepiece")

bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the model, or the name of one that ships. Default: scenes.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "int8")),
    default="float32",
    show_default=True,
    help="Dtype of the transformers. bfloat16 takes half the memory and is faster on a GPU or TPU;"
    " int8 keeps matrices in a quarter, with the rest in bfloat16. Pictures differ in details.",
)


def complain(words: str) -> None:
    """Say on stderr, in one line, what was wrong."""
    click.echo(f"cogview2: {errors.plain(words)}", err=True)


# --- Checks before anything is computed -----------------------------------------------------------


def require_module(name: str, extra: str) -> None:
    """Raises ClickException for a module that is not installed, with the extra that has it."""
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise click.ClickException(
            f"{name} is not installed: `pip install 'cogview2-jax[{extra}]'` installs it"
        )


@contextlib.contextmanager
def refusing(what: str = "") -> Iterator[None]:
    """Turns expected errors inside into the one line that the user sees."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(what + errors.reason(error)) from error


def check_model(
    bundle: Path | None,
    prompts: Sequence[str] = (),
    *,
    start_token: bool = False,
    style: str | None = PLAIN,
) -> Path:
    """The bundle's folder, once its configuration, its text model, the style and the prompts in it
    are checked, as by `prompt_check`.
    """
    from cogview2_jax import bundle as bundles

    with refusing():
        folder = bundles.locate(bundle)
    check = prompt_check(folder, start_token=start_token, style=style)
    for prompt in prompts:
        check(prompt)
    return folder


def prompt_check(
    folder: Path, *, start_token: bool = False, style: str | None = PLAIN
) -> Callable[[str], None]:
    """A function that raises ClickException for a prompt that the model in `folder` cannot read;
    with `start_token`, a prompt leaves room for one. None is the default style.

    Raises ClickException for a model with a configuration or text model that cannot be used, and
    for a style that it lacks.
    """
    from cogview2_jax import bundle as bundles
    from cogview2_jax.tokenizer import text

    with refusing():
        description = bundles.read_description(folder)
        model = bundles.read_text_model(folder, description)
        chosen = find_style(description.styles, style)
    config = description.coglm_config

    def check(prompt: str) -> None:
        with refusing(f"prompt {textwrap.shorten(prompt[:200], 40, placeholder='…')!r}: "):
            most, words = config.max_text - start_token, in_style(chosen, prompt)
            text.encode_prompt(model, words, config.vocabulary, most)

    return check


def style_of(folder: Path, asked: str | None) -> str:
    """The name of the style: as asked, or the default of text to image."""
    from cogview2_jax import bundle as bundles

    with refusing():
        found = find_style(bundles.read_description(folder).styles, asked)
    return found.name if found else PLAIN


def picture_problem(file: Path, error: Exception) -> str:
    """The error of a picture file, in one line that begins with the file's name."""
    return f"{file}: {getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error}"


def open_picture(file: Path) -> Image.Image:
    """A picture file, upright and in RGB. Raises ClickException, with its name."""
    from cogview2_jax.tokenizer import pictures

    try:
        return pictures.open_picture(file)
    except (pictures.PictureError, OSError) as error:
        raise click.ClickException(picture_problem(file, error)) from error


def check_box(folder: Path, box: tuple[float, float, float, float], picture: Image.Image) -> None:
    """Raises ClickException for a box that the model in `folder` cannot draw in this picture."""
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline import editing

    with refusing():
        config = bundles.read_description(folder).direct_config
        editing.plan(box, (picture.height, picture.width), config)


def check_part(folder: Path, part: Mapping[str, Any], picture: Image.Image) -> None:
    """Raises ClickException for a `box` or `mask` that the model in `folder` cannot edit in this
    picture.
    """
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline import patch_completion

    with refusing():
        config = bundles.read_description(folder).direct_config
        size = picture.height, picture.width
        patch_completion.plan_part(part.get("box"), part.get("mask"), size, config)


def candidates(folder: Path, asked: int | None, *, edits: bool = False) -> int:
    """How often each picture is drawn, or a part redrawn: as asked, or as the model in `folder`
    says.
    """
    from cogview2_jax import bundle as bundles

    if asked is not None:
        return asked
    with refusing():
        return bundles.read_description(folder).sampling.candidates_of(edits=edits)


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


def load(
    folder: Path,
    networks: Collection[str],
    dtype: str = "float32",
    sharding: Sharding | None = None,
    **how: Any,
) -> tuple[CogView, Path | None]:
    """The model with these of its networks, and where compiled programs are kept. `how` are more
    arguments of `CogView`.
    """
    cache = use_compilation_cache()
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline.cogview import CogView
    from cogview2_jax.pipeline.memory import PRECISIONS
    from cogview2_jax.sharding import Execution

    execution = Execution(PRECISIONS[dtype], sharding=sharding)
    with refusing():
        bundle = bundles.load(folder, networks, execution, on_host=True)
        return CogView(bundle, execution, **how), cache


def choose_stage(folder: Path, asked: str | None) -> str:
    """The stage to draw: as asked, or the last one that the model has networks for. If that is not
    the last of all, stderr says what is missing.
    """
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline import reach, settings

    with refusing(f"{folder}: "):
        networks = bundles.networks_in(folder)
        if asked is not None:
            reach.require_stage(asked, networks)
            return asked
        stage = reach.last_stage(networks)
    complete = list(settings.STAGES)[-1]
    if stage != complete:
        complain(reach.what_is_missing(complete, networks))
    return stage


def use_compilation_cache() -> Path | None:
    """Keep compiled programs on disk. Returns the folder, or None if it is not writable."""
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


# --- Output files ---------------------------------------------------------------------------------

overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace files in --out that a command with other settings wrote. The same command may"
    " always replace its own.",
)


def model_id(folder: Path) -> str:
    """Changes whenever the model in `folder` does: its configuration, text model or weights."""
    from cogview2_jax import bundle as bundles

    digest = hashlib.sha256()
    for name in (bundles.CONFIG, bundles.TEXT_MODEL):
        digest.update((folder / name).read_bytes())
    # Gigabytes, so not their content.
    weights = (folder / bundles.WEIGHTS).stat()
    digest.update(f"{weights.st_size} {weights.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def circumstances(folder: Path, dtype: str) -> dict[str, Any]:
    """What results depend on in addition to the command's own settings."""
    return {
        "bundle": str(folder),
        "model_id": model_id(folder),
        "dtype": dtype,
        "device": devices()[0],
        "versions": versions(),
    }


def require_free(
    out: Path, files: Collection[str], report: str, settings: Mapping[str, Any], overwrite: bool
) -> None:
    """Raises ClickException if `out` has files with these names from another command.

    `report` is the command's JSON file, one of `files`. A command whose report has the same
    `settings` is the same command.
    """
    there = sorted(name for name in files if (out / name).exists())
    if overwrite or not there:
        return
    before = _report_in(out / report)
    why = "is there already"
    if before is not None:
        changed = _what_changed(before, settings)
        if not changed:
            return
        why = f"was made with other settings ({changed})"
    raise click.ClickException(
        f"{out / (report if report in there else there[0])} {why}: give another --out, or"
        " --overwrite to replace it"
    )


def _report_in(file: Path) -> dict[str, Any] | None:
    """What an earlier command wrote into its report; None if there is none that can be read."""
    with contextlib.suppress(ValueError, OSError, RecursionError):
        before = json.loads(file.read_bytes())
        if isinstance(before, dict):
            return before
    return None


def _what_changed(before: dict[str, Any] | None, settings: Mapping[str, Any]) -> str:
    """The first setting that a report has otherwise, in words; "" if it has all of them."""
    now = json.loads(to_json(settings))
    before = before or {}
    for name, value in now.items():
        if before.get(name) != value:
            plain = not isinstance(value, (dict, list))
            return name + (f" {before.get(name)}, now {value}" if plain else "")
    return ""


class Outputs:
    """The files of one command: checked before anything is computed, written all at once."""

    def __init__(
        self,
        out: Path,
        files: Collection[str],
        report: str,
        settings: Mapping[str, Any],
        overwrite: bool,
    ) -> None:
        """`report` is the JSON file with the `settings`, next to `files`. Raises ClickException if
        another command has written these files already.
        """
        self._arguments = out, [*files, report], report, settings, overwrite
        require_free(*self._arguments)

    def are_there(self) -> bool:
        """Whether the same command has written all of them before."""
        out, files, report, settings, _ = self._arguments
        if not all((out / name).exists() for name in files):
            return False
        return not _what_changed(_report_in(out / report), settings)

    def write(self, contents: Mapping[str, bytes], seconds: Mapping[str, float]) -> None:
        """Write the files and the report, with the time of each part, and print their paths."""
        out, _, report, settings, _ = self._arguments
        require_free(*self._arguments)  # others write too
        rounded = {part: round(value, 3) for part, value in seconds.items()}
        content = to_json({**settings, "seconds": rounded})
        for file in write_all(out, {**contents, report: content}):
            click.echo(file)


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
    """A report as a file. A file's name may have bytes that are no text: they are escaped."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")
