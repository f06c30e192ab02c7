"""`cogview2 generate`, `caption` and `infill`: pictures in, pictures out."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview2_jax.cli import common

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

# Parts of a run that the progress bar counts, by the last stage asked for.
PARTS = {
    "base": ("base", "pixels"),
    "direct": ("base", "direct", "pixels"),
    "full": ("base", "direct", "iterative", "pixels"),
}
NETWORK_OF = {
    "base": "coglm",
    "direct": "direct",
    "iterative": "iterative",
    "pixels": "tokenizer",
}
MOST_IMAGES = 64  # of one prompt at once: 200 MB of activations a network
_LABEL_HEIGHT, _LABEL_MARGIN, _GAP, _COLUMNS = 22, 6, 4, 8
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
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


# --- generate -------------------------------------------------------------------------------------


@click.command(
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
@common.bundle_option
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
    folder = common.check_model(bundle, prompts)
    common.check_writable(out)
    cv, _ = common.load(folder, [NETWORK_OF[part] for part in PARTS[stage]])
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
        "device": common.devices()[0],
        "versions": common.versions(),
        "seconds": {part: round(seconds, 3) for part, seconds in timings.items()},
    }
    files[f"{whole}.json"] = common.to_json(report)
    for file in common.write_all(out, files):
        click.echo(file)


# --- caption and infill ---------------------------------------------------------------------------


@click.command(
    "caption",
    epilog="""\b
Examples:
  cogview2 caption picture.png
  cogview2 caption --language zh pictures/*.png
""",
)
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--language", type=click.Choice(("en", "zh")), default="en", show_default=True)
@common.bundle_option
def caption_command(pictures: tuple[Path, ...], language: str, bundle: Path | None) -> None:
    """Say what each picture shows, the most probable word each time."""
    opened = [_open_picture(picture) for picture in pictures]
    cv, _ = common.load(common.check_model(bundle), ("tokenizer", "coglm"))
    for file, picture in zip(pictures, opened, strict=True):
        click.echo(f"{file}: {cv.caption(picture, language=language)}")


@click.command(
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
    "--num-images",
    type=click.IntRange(1, MOST_IMAGES),
    default=1,
    show_default=True,
    metavar="N",
)
@_seed_option
@_candidates_option
@_out_option
@common.bundle_option
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
    folder = common.check_model(bundle, (prompt,))
    opened = _open_picture(picture)
    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline.cogview import coarse_mask

    with common.refusing():
        coarse_mask(box, bundles.read_description(folder).coglm_config.grid)
    common.check_writable(out)
    cv, _ = common.load(folder, tuple(NETWORK_OF.values()))
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
        "device": common.devices()[0],
        "versions": common.versions(),
        "seconds": {"total": round(time.perf_counter() - begin, 3)},
    }
    for file in common.write_all(out, files | {f"{name}.json": common.to_json(report)}):
        click.echo(file)


# --- Pictures and their files ---------------------------------------------------------------------


def _open_picture(file: Path) -> Image.Image:
    from cogview2_jax.tokenizer import pictures

    with common.refusing():
        return pictures.open_picture(file)


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
