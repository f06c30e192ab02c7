"""`cogview2 vary` and `outpaint`: new versions of a picture, and a picture continued."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import common, pictures, sheets
from cogview2_jax.cli.edits import How, file_facts
from cogview2_jax.pipeline import settings

if TYPE_CHECKING:
    from cogview2_jax.pipeline.cogview import CogView


def _shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            pictures.num_images_option(settings.NUM_EDITED),
            pictures.seed_option,
            pictures.stage_option,
            pictures.candidates_option,
            common.dtype_option,
            pictures.out_option,
            common.overwrite_option,
            common.bundle_option,
        )
    ):
        command = option(command)
    return command


@click.command(
    "vary",
    epilog="""\b
Examples:
  cogview2 vary picture.png "a red circle above a blue star"
  cogview2 vary picture.png --keep 0.75 --num-images 8
""",
)
@click.argument("picture", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, max_open=True),
    default=settings.KEPT,
    show_default=True,
    metavar="SHARE",
    help="Share of the picture that each version keeps.",
)
@_shared_options
def vary_command(picture: Path, text: str | None, keep: float, **shared: Any) -> None:
    """Draw new versions of PICTURE, which TEXT describes.

    Each version redraws another rectangle of the picture. Without TEXT the model's own caption is
    taken. A picture that is not square is cropped in the middle; versions have the model's size.
    Writes them and a JSON file with the settings.
    """
    begin = time.perf_counter()
    opened, how = _checked(picture, text, shared)
    name = f"{sheets.slug(picture.stem)}_varied" + (f"_{sheets.slug(text)}" if text else "")
    description = {"text": text, "keep": keep} | file_facts("picture", picture)

    def redraw(cv: CogView, **arguments: Any) -> Any:
        return cv.vary(opened, text, keep=keep, **arguments)

    how.draw(name, description, begin, redraw)


@click.command(
    "outpaint",
    epilog="""\b
Examples:
  cogview2 outpaint picture.png "a red circle to the left of a green star" --right 0.5
  cogview2 outpaint wide.jpg "a large green star" --top 0.5 --bottom 0.5 --num-images 2
""",
)
@click.argument("picture", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("--top", type=float, default=0.0, metavar="SHARE", help="How much above,")
@click.option("--left", type=float, default=0.0, metavar="SHARE", help="to the left,")
@click.option("--bottom", type=float, default=0.0, metavar="SHARE", help="below,")
@click.option(
    "--right",
    type=float,
    default=0.0,
    metavar="SHARE",
    help="and to the right is added, 0 to 1 of the picture's height or width.",
)
@_shared_options
def outpaint_command(
    picture: Path, text: str, top: float, left: float, bottom: float, right: float, **shared: Any
) -> None:
    """Continue PICTURE beyond its border, as TEXT says, which describes the larger picture.

    Writes the larger pictures and a JSON file with the settings.
    """
    begin = time.perf_counter()
    opened, how = _checked(picture, text, shared)
    sides: dict[str, Any] = {"top": top, "left": left, "bottom": bottom, "right": right}
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline import patch_completion

    with common.refusing():
        _, mask = patch_completion.larger_canvas(opened, (top, left, bottom, right))
        config = bundles.read_description(how.folder).direct_config
        patch_completion.plan_mask(mask, config, touched=True)
    name = f"{sheets.slug(picture.stem)}_continued_{sheets.slug(text)}"
    description = {"text": text, **sides} | file_facts("picture", picture)

    def redraw(cv: CogView, **arguments: Any) -> Any:
        return cv.outpaint(text, opened, **sides, **arguments)

    how.draw(name, description, begin, redraw)


def _checked(picture: Path, text: str | None, shared: dict[str, Any]) -> tuple[Any, How]:
    """The opened picture, and what the command's options say, once both are checked."""
    texts = () if text is None else (text,)
    folder = common.check_model(shared.pop("bundle"), texts, start_token=True)
    opened = common.open_picture(picture)
    common.check_writable(shared["out"])
    stage = common.choose_stage(folder, shared.pop("stage"))
    candidates = common.candidates(folder, shared.pop("candidates"), edits=True)
    return opened, How(folder, stage=stage, candidates=candidates, **shared)
