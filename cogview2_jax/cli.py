"""The command line: `cogview2 generate`, `caption`, `infill`, `info` and `data prepare`.

Every mistake of the user's ends in one line on stderr and exit code 2, before anything is computed
or written. Files appear complete or not at all. Heavy modules are imported where they are needed,
so that help and refusals come at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax import __version__

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

    from cogview2_jax.bundle import Description
    from cogview2_jax.data.sources import Source
    from cogview2_jax.pipeline import CogView

# Parts of a run that the progress bar counts, by the last stage asked for.
PARTS = {
    "base": ("base", "pixels"),
    "direct": ("base", "direct", "pixels"),
    "full": ("base", "direct", "iterative", "pixels"),
}
MOST_IMAGES = 64  # of one prompt at once: 200 MB of activations a network
VERSIONS = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors", "sentencepiece")
_LABEL_HEIGHT, _LABEL_MARGIN, _GAP, _COLUMNS = 22, 6, 4, 8
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
)

_bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a model; default: the one that ships.",
)
_candidates_option = click.option(
    "--candidates",
    type=click.IntRange(1, MOST_IMAGES),
    metavar="N",
    help="Draw every picture N times at the base stage and keep the one whose caption fits best."
    "  [default: what the bundle says]",
)
_seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="The same seed gives the same pictures, exactly.",
)
_out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("pictures"),
    show_default=True,
    metavar="DIR",
    help="Folder to write to, made if missing.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, 2 after a mistake of the user's, 130 when interrupted."""
    try:
        code = cli.main(args=arguments, prog_name="cogview2", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"cogview2: {_one_line(error.format_message())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("cogview2: interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 generate "a red circle above a striped blue square"
  cogview2 generate --seed 7 --num-images 8 --out birds "蓝色条纹正方形上方的红色圆"
  cogview2 caption pictures/*.png
  cogview2 info
  cogview2 data prepare photos/captions.jsonl --out records
""",
)
@click.version_option(__version__, prog_name="cogview2")
@click.pass_context
def cli(context: click.Context) -> None:
    """Text to pictures with CogView2, on any device that jax runs on.

    Programs are compiled on first use and kept in ~/.cache/cogview2_jax (set XDG_CACHE_HOME or
    JAX_COMPILATION_CACHE_DIR to keep them elsewhere), so the second run starts faster.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# --- generate -------------------------------------------------------------------------------------


@cli.command(
    epilog="""\b
Examples:
  cogview2 generate "a red circle above a striped blue square"
  cogview2 generate --num-images 2 --stage base "a large green star" "左边的黄色心形"
  cogview2 generate --candidates 16 --seed 1 --out best "a small dotted purple heart"
"""
)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--num-images",
    type=click.IntRange(1, MOST_IMAGES),
    default=4,
    show_default=True,
    metavar="N",
    help="Pictures of each prompt.",
)
@_seed_option
@click.option(
    "--stage",
    type=click.Choice(tuple(PARTS)),
    default="full",
    show_default=True,
    help="Last stage to run: the base model (enlarged), direct, or direct and iterative"
    " super-resolution.",
)
@_candidates_option
@_out_option
@_bundle_option
def generate(
    prompts: tuple[str, ...],
    num_images: int,
    seed: int,
    stage: str,
    candidates: int | None,
    out: Path,
    bundle: Path | None,
) -> None:
    """Draw pictures of each PROMPT, in English or Chinese.

    Writes every picture, a labelled grid of all and a JSON file with prompts, seed, versions and
    timings. A picture depends on its prompt, the seed and its number alone, so --num-images 8
    begins with the pictures of --num-images 4.
    """
    begin = time.perf_counter()
    folder = _check_model_and_prompts(bundle, prompts)
    _check_writable(out)
    cv, _ = _load(folder)
    timings = {"load": time.perf_counter() - begin}
    candidates = cv.bundle.sampling.candidates if candidates is None else candidates

    import jax
    from tqdm import tqdm

    key = jax.random.key(seed)
    made = []
    parts = PARTS[stage]
    with tqdm(total=len(prompts) * len(parts), unit="stage", file=sys.stderr) as bar:
        bar.set_description(f"{parts[0]:9s}")
        last = time.perf_counter()

        def progress(part: str) -> None:
            nonlocal last
            now = time.perf_counter()
            timings[part] = timings.get(part, 0.0) + now - last
            last = now
            bar.set_description(f"{parts[(parts.index(part) + 1) % len(parts)]:9s}")
            bar.update()

        for prompt in prompts:
            pictures = cv.generate_stages(
                [prompt],
                key,
                num_images,
                candidates=candidates,
                stages=(stage,),
                progress=progress,
            )
            made.append(pictures[stage][0])
        bar.set_description("done")

    names = _stems(prompts, seed, stage)
    files: dict[str, bytes] = {}
    rows = []
    for prompt, name, pictures in zip(prompts, names, made, strict=True):
        images = {f"{name}_{i}.png": _png(picture) for i, picture in enumerate(pictures)}
        files |= images
        rows.append({"prompt": prompt, "pictures": list(images)})
    whole = names[0] if len(names) == 1 else f"{names[0]}_and_{len(names) - 1}_more"
    files[f"{whole}_grid.png"] = _png(_grid(prompts, made))
    timings["total"] = time.perf_counter() - begin
    report = {
        "prompts": rows,
        "grid": f"{whole}_grid.png",
        "seed": seed,
        "num_images": num_images,
        "stage": stage,
        "candidates": candidates,
        "bundle": str(folder),
        "device": _devices()[0],
        "versions": _versions(),
        "seconds": {part: round(seconds, 3) for part, seconds in timings.items()},
    }
    files[f"{whole}.json"] = _json(report)
    for file in _write_all(out, files):
        click.echo(file)


# --- caption and infill ---------------------------------------------------------------------------


@cli.command(
    "caption",
    epilog="""\b
Examples:
  cogview2 caption picture.png
  cogview2 caption --language zh pictures/*.png
""",
)
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--language", type=click.Choice(("en", "zh")), default="en", show_default=True)
@_bundle_option
def caption_command(pictures: tuple[Path, ...], language: str, bundle: Path | None) -> None:
    """Say what each picture shows, the most probable word each time."""
    opened = [_open_picture(picture) for picture in pictures]
    cv, _ = _load(_check_model_and_prompts(bundle, ()))
    for file, picture in zip(pictures, opened, strict=True):
        click.echo(f"{file}: {cv.caption(picture, language=language)}")


@cli.command(
    "infill",
    epilog="""\b
Examples:
  cogview2 infill "a red circle above a blue star" picture.png --box 0.5 0 1 1
""",
)
@click.argument("prompt")
@click.argument("picture", type=click.Path(path_type=Path))
@click.option(
    "--box",
    type=(float, float, float, float),
    required=True,
    metavar="TOP LEFT BOTTOM RIGHT",
    help="What to draw anew, as parts of the picture's height and width from 0 to 1.",
)
@click.option(
    "--num-images", type=click.IntRange(1, MOST_IMAGES), default=1, show_default=True, metavar="N"
)
@_seed_option
@_candidates_option
@_out_option
@_bundle_option
def infill_command(
    prompt: str,
    picture: Path,
    box: tuple[float, float, float, float],
    num_images: int,
    seed: int,
    candidates: int | None,
    out: Path,
    bundle: Path | None,
) -> None:
    """Draw a part of PICTURE anew, so that all of it fits PROMPT."""
    begin = time.perf_counter()
    folder = _check_model_and_prompts(bundle, (prompt,))
    opened = _open_picture(picture)
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline import coarse_mask

    with _refusing():
        coarse_mask(box, bundles.read_description(folder).coglm_config.grid)
    _check_writable(out)
    cv, _ = _load(folder)
    candidates = cv.bundle.sampling.candidates if candidates is None else candidates

    import jax

    made = cv.infill(
        prompt, opened, box, num_images, key=jax.random.key(seed), candidates=candidates
    )
    name = f"{_slug(picture.stem)}_{_slug(prompt)}_seed{seed}"
    files = {f"{name}_{i}.png": _png(each) for i, each in enumerate(made)}
    report = {
        "prompt": prompt,
        "picture": str(picture),
        "box": box,
        "pictures": list(files),
        "seed": seed,
        "candidates": candidates,
        "bundle": str(folder),
        "device": _devices()[0],
        "versions": _versions(),
        "seconds": {"total": round(time.perf_counter() - begin, 3)},
    }
    for file in _write_all(out, files | {f"{name}.json": _json(report)}):
        click.echo(file)


# --- info -----------------------------------------------------------------------------------------


@cli.command(
    epilog="""\b
Examples:
  cogview2 info
  cogview2 info --bundle path/to/another/model
"""
)
@_bundle_option
def info(bundle: Path | None) -> None:
    """Show the model, its configuration and the devices."""
    folder = _check_model_and_prompts(bundle, ())
    cv, cache = _load(folder)
    from cogview2_jax import bundle as bundles

    description = bundles.read_description(folder)
    for name, value in _facts(folder, description, cv, cache):
        click.echo(f"{name:22s}{value}")


def _facts(
    folder: Path, description: Description, cv: CogView, cache: Path | None
) -> Iterator[tuple[str, str]]:
    import jax

    bundle, base = cv.bundle, description.coglm_config
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    made_with = ", ".join(f"{name} {version}" for name, version in description.made_with.items())
    yield "bundle", str(folder)
    yield "size", f"{size / 1e6:.1f} MB"
    yield "made with", made_with
    for name in ("coglm", "direct", "iterative", "tokenizer"):
        leaves = jax.tree.leaves(getattr(bundle, name))
        yield f"{name} parameters", f"{sum(leaf.size for leaf in leaves):,}"
    yield "longest prompt", f"{base.max_text} tokens"
    vocabulary = base.vocabulary
    yield (
        "vocabulary",
        f"{vocabulary.num_image} image tokens in {bundle.num_clusters} clusters,"
        f" {vocabulary.num_text} text pieces",
    )
    yield "coarse grid", "{} × {}".format(*base.grid)
    yield "fine grid", "{} × {}".format(*description.direct_config.grid)
    for config in description[:5]:
        text = textwrap.wrap(repr(config), 76)
        yield type(config).__name__, ("\n" + " " * 22).join(text)
    for device in _devices():
        yield "device", device
    yield "versions", ", ".join(f"{name} {version}" for name, version in _versions().items())
    yield "compilation cache", str(cache) if cache else "none (not writable)"


# --- data -----------------------------------------------------------------------------------------


@cli.group(
    "data",
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 data prepare --help
""",
)
@click.pass_context
def data_group(context: click.Context) -> None:
    """Data to train with."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@data_group.command(
    "prepare",
    epilog="""\b
A captions file has a line for each picture, with its path from the file's folder:
  captions.jsonl    {"image": "a.jpg", "caption": "a cat"}
                    {"image": "b.jpg", "caption": ["a dog", "a dog runs"]}    two records
  captions.tsv      a.jpg<TAB>a cat
The first line of a .tsv may name the columns: image<TAB>caption

\b
Examples:
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 data prepare pairs.tsv --images photos --caption-field en --caption-field zh --out pairs
  cogview2 data prepare scenes --count 10000 --apart --out scenes_records
  cogview2 data prepare coco_captions --data-dir tfds --caption-field captions/text --out coco
  cogview2 data prepare photos --pictures --out pictures
""",
)
@click.argument("source")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the records, made if missing.",
)
@click.option(
    "--pictures",
    is_flag=True,
    help="Keep the pictures themselves, to train an image tokenizer: needs no captions, no bundle.",
)
@click.option("--split", default="train", show_default=True, help="Of a tfds data set or scenes.")
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="The first N inputs; scenes need it."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where paths in a captions file begin; default: the file's folder.",
)
@click.option(
    "--image-field", default="image", show_default=True, metavar="NAME", help="The picture's field."
)
@click.option(
    "--caption-field",
    "caption_fields",
    multiple=True,
    metavar="NAME",
    help='A caption\'s field, given once or twice (two languages). Default: "caption" in a captions'
    " file, both languages of scenes, the only text of a tfds data set.",
)
@click.option(
    "--apart",
    is_flag=True,
    help="A record for each language, instead of one with both.",
)
@click.option(
    "--allow-unknown",
    is_flag=True,
    help="Keep captions with words that the text model cannot spell.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    metavar="PIXELS",
    help="Side of the picture that is made into tokens; may be repeated, ascending, for"
    " super-resolution. Default: the base model's.",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="PIXELS",
    help="Pixels of a token's side.",
)
@click.option(
    "--text-slots",
    type=click.IntRange(1),
    metavar="N",
    help="Places for text in a record, without the pad at its end. Default: the base model's;"
    " published: 111.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of tfds data sets."
)
@click.option(
    "--download", is_flag=True, help="Have tfds download and prepare a data set that is not there."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=lambda: min(os.cpu_count() or 1, 32),
    show_default="one a processor",
    metavar="N",
    help="Threads that read and decode pictures.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Pictures that the tokenizer sees at once.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Inputs of a shard. Each shard is a file; a kill costs at most the shard in work.",
)
@_bundle_option
def prepare_command(
    source: str,
    out: Path,
    pictures: bool,
    split: str,
    count: int | None,
    images: Path | None,
    image_field: str,
    caption_fields: tuple[str, ...],
    apart: bool,
    allow_unknown: bool,
    sizes: tuple[int, ...],
    stride: int,
    text_slots: int | None,
    data_dir: Path | None,
    download: bool,
    workers: int,
    batch_size: int,
    shard_size: int,
    bundle: Path | None,
) -> None:
    """Turn SOURCE into array_record shards of token records, ready for training.

    SOURCE is a captions file (.jsonl or .tsv), the word scenes, or the name of a tfds data set;
    with --pictures also a folder.

    A record is one row of int32: texts, pads, the picture's tokens. With the published model that
    is 111 + 1 + 400. Inputs that cannot become one (an unreadable picture, an empty or over-long
    caption, a malformed line) are left out and listed in refused.jsonl, with the reason.

    The same command goes on after a kill, and may run several times at once on one folder, to use
    several devices: each run takes shards that no other holds. The records are the same however
    they were made.
    """
    if len(caption_fields) > 2 or len(set(caption_fields)) < len(caption_fields):
        raise click.UsageError("--caption-field can be given once or twice, with two names")
    if pictures and (sizes or text_slots or apart or allow_unknown or bundle):
        raise click.UsageError(
            "--pictures keeps files as they are: it goes with no --size, --text-slots, --apart,"
            " --allow-unknown or --bundle"
        )
    description = None
    if not pictures:
        folder = _check_model_and_prompts(bundle, ())
        from cogview2_jax import bundle as bundles

        description = bundles.read_description(folder)
    with _refusing():
        inputs = _source(
            source, split, count, images, image_field, caption_fields, data_dir, download, pictures
        )
    _check_writable(out)
    if description is not None:
        from cogview2_jax.data.manifest import Layout

        config = description.coglm_config
        with _refusing():
            if stride not in description.tokenizer_config.strides:
                known = ", ".join(map(str, description.tokenizer_config.strides))
                raise ValueError(f"--stride must be one of {known}: got {stride}")
            layout = Layout(
                text_slots or config.text_slots,
                stride,
                tuple(sizes) or (config.grid[0] * stride,),
                config.vocabulary,
            )
        _use_compilation_cache()
        with _refusing():
            model = bundles.load(folder, networks=("tokenizer",))

    from tqdm import tqdm

    from cogview2_jax.data import prepare

    with (
        _refusing(),
        tqdm(total=len(inputs), desc=out.name, unit=" inputs") as bar,
    ):
        if description is None:
            report = prepare.prepare_pictures(
                inputs, out, shard_size=shard_size, workers=workers, progress=bar.update
            )
        else:
            report = prepare.prepare_tokens(
                inputs,
                out,
                layout,
                model.text_model,
                model.tokenizer,
                model.tokenizer_config,
                batch_size=batch_size,
                allow_unknown=allow_unknown,
                apart=apart,
                shard_size=shard_size,
                workers=workers,
                progress=bar.update,
            )
    number = sum(report.refused.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.refused.items())
    click.echo(f"{out}: {report.records} records of {report.inputs} inputs, {number} refused")
    if number:
        click.echo(f"{out / 'refused.jsonl' if report.complete else 'refused'}: {kinds}")
    if not report.complete:
        click.echo("another run still works on the other shards; run this again to see the end")
    elif not report.records:
        raise click.ClickException(f"no input became a record: see {out / 'refused.jsonl'}")


def _source(
    source: str,
    split: str,
    count: int | None,
    images: Path | None,
    image_field: str,
    caption_fields: tuple[str, ...],
    data_dir: Path | None,
    download: bool,
    pictures: bool,
) -> Source:
    from cogview2_jax.data import sources

    found: Source
    path = Path(source)
    if path.suffix in (".jsonl", ".tsv") or path.is_file():
        fields = caption_fields or ("caption",)
        found = sources.CaptionsFile(path, images, fields, image_field, pictures_only=pictures)
    elif source == "scenes":
        if count is None:
            raise ValueError("scenes has no end: give --count")
        found = sources.Scenes(count, split, caption_fields)
    elif path.is_dir():
        if not pictures:
            raise ValueError(
                f"{source} is a folder: give its captions file (.jsonl or .tsv), or --pictures"
            )
        found = sources.PictureFolder(path)
    else:
        found = sources.Tfds(
            source,
            split,
            data_dir,
            caption_fields,
            image_field,
            download=download,
            pictures_only=pictures,
        )
    return found if count is None else sources.First(found, count)


# --- Checks before anything is computed -----------------------------------------------------------


@contextlib.contextmanager
def _refusing(what: str = "") -> Iterator[None]:
    """Known errors inside become the one line that the user sees."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise click.ClickException(what + message) from error


def _check_model_and_prompts(bundle: Path | None, prompts: Sequence[str]) -> Path:
    """The bundle's folder, if its configuration and text model are fit and spell the prompts."""
    from cogview2_jax import bundle as bundles
    from cogview2_jax.tokenizer import text

    with _refusing():
        folder = bundles.locate(bundle)
        description = bundles.read_description(folder)
        model = bundles.read_text_model(folder, description)
    config = description.coglm_config
    for prompt in prompts:
        with _refusing(f"prompt {textwrap.shorten(prompt, 40, placeholder='…')!r}: "):
            text.encode(model, prompt, config.vocabulary.num_image, max_tokens=config.max_text)
    return folder


def _check_writable(out: Path) -> None:
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


def _open_picture(file: Path) -> Image.Image:
    from cogview2_jax.data import sources

    try:
        return sources.open_picture(sources.read_picture(file))
    except (sources.Refused, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise click.ClickException(f"{file}: {reason}") from error


# --- The model and its compilations ---------------------------------------------------------------


def _load(folder: Path) -> tuple[CogView, Path | None]:
    """The model, and where compiled programs are kept."""
    cache = _use_compilation_cache()
    import cogview2_jax

    with _refusing():
        return cogview2_jax.load(folder), cache


def _use_compilation_cache() -> Path | None:
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


def _devices() -> list[str]:
    import jax

    return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]


def _versions() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {"cogview2_jax": __version__, "python": python} | {
        name: importlib.metadata.version(name) for name in VERSIONS
    }


# --- What is written ------------------------------------------------------------------------------


def _write_all(out: Path, files: Mapping[str, bytes]) -> list[Path]:
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


def _stems(prompts: Sequence[str], seed: int, stage: str) -> list[str]:
    """A file name for each prompt, without ending, no two alike."""
    stems: list[str] = []
    for prompt in prompts:
        stem = f"{_slug(prompt)}_seed{seed}" + ("" if stage == "full" else f"_{stage}")
        same = sum(other == stem or other.startswith(f"{stem}_v") for other in stems)
        stems.append(f"{stem}_v{same + 1}" if same else stem)
    return stems


def _slug(text: str) -> str:
    """Letters and digits of `text` in at most 48 bytes, with "-" between words."""
    words = re.sub(r"\W+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-_")
    return words.encode()[:48].decode(errors="ignore").rstrip("-_") or "prompt"


def _json(report: Mapping[str, Any]) -> bytes:
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()


def _png(picture: np.ndarray | Image.Image) -> bytes:
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _grid(prompts: Sequence[str], rows: Sequence[np.ndarray]) -> Image.Image:
    """The pictures of each prompt, [n, y, x, 3], under its words."""
    from PIL import Image, ImageDraw

    number, height, width = rows[0].shape[:3]
    columns = min(number, _COLUMNS)
    lines_of_pictures = -(-number // columns)
    total = columns * (width + _GAP) - _GAP
    labels = [_label(prompt, i, total) for i, prompt in enumerate(prompts, 1)]
    tops = [len(lines) * _LABEL_HEIGHT + _LABEL_MARGIN for lines, _ in labels]
    below = lines_of_pictures * (height + _GAP)
    grid = Image.new("RGB", (total, sum(tops) + len(rows) * below - _GAP), "white")
    pen = ImageDraw.Draw(grid)
    y = 0
    for (lines, font), top, pictures in zip(labels, tops, rows, strict=True):
        for i, line in enumerate(lines):
            pen.text((_LABEL_MARGIN, y + 2 + i * _LABEL_HEIGHT), line, fill="black", font=font)
        for i, picture in enumerate(pictures):
            row, column = divmod(i, columns)
            place = (column * (width + _GAP), y + top + row * (height + _GAP))
            grid.paste(Image.fromarray(picture), place)
        y += top + below
    return grid


def _label(
    prompt: str, number: int, width: int
) -> tuple[list[str], ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The lines of a label at most `width` pixels wide, and their font.

    A Chinese prompt on a machine without a Chinese font is shown by its number in the JSON file.
    """
    from PIL import ImageFont

    font: ImageFont.FreeTypeFont | ImageFont.ImageFont = ImageFont.load_default(16)
    if max(map(ord, prompt)) > 0x24F:  # beyond what Pillow's own font has
        for name in _CHINESE_FONTS:
            with contextlib.suppress(OSError):
                font = ImageFont.truetype(name, 16)
                break
        else:
            prompt = f"prompt {number}"
    room = width - 2 * _LABEL_MARGIN
    lines = [""]
    # Chinese breaks anywhere, English between words.
    for piece in re.findall(r"[^\W\u3000-\uffff]+\S*\s*|.", prompt):
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > room:
            lines.append("")
        lines[-1] += piece
    return lines, font


def _one_line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    main()
