"""`cogview2 caption` and `infill`, and the options of all commands that draw."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cogview2_jax.cli import common, sheets
from cogview2_jax.pipeline import settings

MOST_IMAGES = 64  # of one prompt at once: 200 MB of activations a network
LAST_STAGE = list(settings.STAGES)[-1]


def num_images_option(default: int) -> Callable[[Any], Any]:
    return click.option(
        "--num-images",
        type=click.IntRange(1, MOST_IMAGES),
        default=default,
        show_default=True,
        metavar="N",
        help="Pictures of each prompt, each drawn from its own random numbers.",
    )


candidates_option = click.option(
    "--candidates",
    type=click.IntRange(1, MOST_IMAGES),
    metavar="N",
    help="Draw each picture N times at the base stage, and keep the one with the highest caption"
    " score for the prompt.  [default: what the bundle says]",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="The same seed gives the same pictures, with the same model, device and versions.",
)
stage_option = click.option(
    "--stage",
    type=click.Choice(tuple(settings.STAGES)),
    help="Last stage to run: the base model (enlarged), direct super-resolution, or direct and"
    " iterative (full).  [default: the last one that the model has networks for]",
)


def style_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--style",
        metavar="NAME",
        help="A style of the model: a template for prompts, with sampling of its own; `cogview2"
        f" info` lists them.  [default: {default}]",
    )


out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("pictures"),
    show_default=True,
    metavar="DIR",
    help="Folder to write to, made if missing.",
)


@click.command(
    "caption",
    epilog="""\b
Examples:
  cogview2 caption picture.png
  cogview2 caption --language zh pictures/*.png
  cogview2 caption --candidates 8 picture.png
""",
)
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--language",
    type=click.Choice(settings.LANGUAGES),
    default=settings.LANGUAGES[0],
    show_default=True,
    help="Language of the captions: English or Chinese.",
)
@click.option(
    "--candidates",
    type=click.IntRange(1, MOST_IMAGES),
    default=1,
    show_default=True,
    metavar="N",
    help="Take the most likely of N captions: the greedy one, and others that are drawn.",
)
@seed_option
@click.option(
    "--json",
    "write_json",
    is_flag=True,
    help="Write each caption and its settings beside its picture, as PICTURE.caption.json.",
)
@common.dtype_option
@common.overwrite_option
@common.bundle_option
def caption_command(
    pictures: tuple[Path, ...],
    language: str,
    candidates: int,
    seed: int,
    write_json: bool,
    dtype: str,
    overwrite: bool,
    bundle: Path | None,
) -> None:
    """Caption each picture, with the most probable token each time, or as the best of several.

    A picture that cannot be used is named on stderr; the others are captioned, and the exit code
    is 1.
    """
    folder = common.check_model(bundle)
    cv, _ = common.load(folder, ("tokenizer", "coglm"), dtype)
    from cogview2_jax.tokenizer.pictures import PictureError, open_picture

    drawn = candidates > 1
    shared: dict[str, Any] = {
        "language": language,
        "candidates": candidates if drawn else None,
        "seed": seed if drawn else None,
    }
    shared |= common.circumstances(folder, dtype)
    import jax

    failed = False
    for file in filter(Path.is_file, pictures if write_json else ()):  # the others are named below
        _outputs(file, shared, overwrite)
    waiting: list[tuple[Path, Any]] = []  # files and their tokens
    for i, file in enumerate(pictures, 1):
        try:
            waiting.append((file, cv.picture_tokens(open_picture(file))))
        except (PictureError, OSError) as error:
            common.complain(common.picture_problem(file, error))
            failed = True
        if waiting and (i == len(pictures) or len(waiting) == settings.CAPTIONED_AT_ONCE):
            # Each picture has its own draws, whichever others are captioned with it.
            keys = jax.random.key(seed).reshape(1).repeat(len(waiting)) if candidates > 1 else None
            said = cv.token_captions(
                [tokens for _, tokens in waiting], language, keys=keys, candidates=candidates
            )
            for (done, _), words in zip(waiting, said, strict=True):
                click.echo(f"{done}: {words}")
                if write_json:
                    _write_caption(done, words, shared, overwrite)
            waiting = []
    if failed:
        raise click.exceptions.Exit(1)


def _write_caption(file: Path, words: str, shared: dict[str, Any], overwrite: bool) -> None:
    """Write a picture's caption beside it. Raises ClickException if another command's is there."""
    name, settings = _outputs(file, shared, overwrite)
    common.write_all(file.parent, {name: common.to_json({**settings, "caption": words})})


def _outputs(file: Path, shared: dict[str, Any], overwrite: bool) -> tuple[str, dict[str, Any]]:
    """The file beside a picture that its caption goes to, and the settings in it. Raises
    ClickException if another command's is there.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = {"picture": file.name, "picture_sha256": digest} | shared
    name = f"{file.name}.caption.json"
    common.require_free(file.parent, [name], name, settings, overwrite)
    return name, settings


@click.command(
    "infill",
    epilog="""\b
Examples:
  cogview2 infill "a red circle above a blue star" picture.png --box 0.5 0 1 1
  cogview2 infill "a large green star" wide.jpg --box 0 0 1 0.33 --num-images 4
""",
)
@click.argument("prompt")
@click.argument("picture", type=click.Path(path_type=Path))
@click.option(
    "--box",
    type=(float, float, float, float),
    required=True,
    metavar="TOP LEFT BOTTOM RIGHT",
    help="What to redraw, as fractions of the whole picture's height and width.",
)
@num_images_option(settings.NUM_INFILLED)
@seed_option
@stage_option
@candidates_option
@common.dtype_option
@out_option
@common.overwrite_option
@common.bundle_option
def infill_command(
    prompt: str,
    picture: Path,
    box: tuple[float, float, float, float],
    num_images: int,
    seed: int,
    stage: str | None,
    candidates: int | None,
    dtype: str,
    out: Path,
    overwrite: bool,
    bundle: Path | None,
) -> None:
    """Redraw a part of PICTURE, so that the whole fits PROMPT.

    PICTURE may have any shape and size; the result has the same. The model sees a square around the
    box, as wide as the picture's shorter side, or as the box if that is longer. Nothing outside
    this square changes. Writes the pictures and a JSON file with the settings.
    """
    begin = time.perf_counter()
    folder = common.check_model(bundle, (prompt,))
    opened = common.open_picture(picture)
    common.check_box(folder, box, opened)
    common.check_writable(out)
    chosen = common.choose_stage(folder, stage)
    name = f"{sheets.slug(picture.stem)}_{sheets.stems([prompt], seed, '')[0]}"
    name += "" if chosen == LAST_STAGE else f"_{chosen}"
    files = [f"{name}_{i}.png" for i in range(num_images)]
    best_of = common.candidates(folder, candidates, edits=True)
    description = {
        "prompt": prompt,
        "picture": str(picture),
        "picture_sha256": hashlib.sha256(picture.read_bytes()).hexdigest(),
        "box": box,
        "seed": seed,
        "num_images": num_images,
        "pictures": files,
        "stage": chosen,
        "candidates": best_of,
    } | common.circumstances(folder, dtype)
    outputs = common.Outputs(out, files, f"{name}.json", description, overwrite)

    cv, _ = common.load(folder, settings.STAGES[chosen], dtype)
    import jax

    made = cv.infill(
        prompt,
        opened,
        box,
        num_images,
        key=jax.random.key(seed),
        stage=chosen,
        candidates=best_of,
    )
    contents = {file: sheets.png(each) for file, each in zip(files, made, strict=True)}
    outputs.write(contents, {"total": time.perf_counter() - begin})
