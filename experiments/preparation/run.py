"""How many pictures a second does a worker prepare, and how long do thirty million take?

\b
    python -m experiments.preparation.run --json experiments/preparation/results.json

Clusters are Ray's, of this machine. The parts:

\b
    rates   opening a JPEG, fitting it to the model's size and encoding it, each by itself; from
            them days and bytes for --pairs on 8 to 512 workers, and what limits them
    whole   `data prepare` in one process and by a cluster, with the peak of their memory
    kills   --inputs, 3 % of them damaged: a process of the cluster is killed, one runs out of
            memory, and the files are compared with those of one process
    draw    --prompts drawn by one process and by three, one of which is killed
"""

from __future__ import annotations

import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from PIL import Image, ImageFilter

from cogview2_jax import bundle as bundles
from cogview2_jax.config import TOKEN_STRIDE, HVQVAEConfig
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.pictures import fit_picture, open_picture
from experiments import results
from experiments.preparation import trials

SIZE = (640, 480)  # of the JPEG files: that of MS-COCO
WORKERS = (8, 32, 128, 512)
PARTS = ("rates", "whole", "kills", "draw")


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG with about as much detail as a photograph: blurred noise of several scales."""
    layers = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
    for scale in (64, 16, 4, 1):
        small = rng.normal(0, 1, (SIZE[1] // scale, SIZE[0] // scale, 3)).astype(np.float32)
        layers += np.stack(
            [
                np.asarray(Image.fromarray(channel).resize(SIZE, Image.Resampling.BICUBIC))
                for channel in np.moveaxis(small, -1, 0)
            ],
            axis=-1,
        ) * (12 * scale**0.25)
    picture = Image.fromarray((layers + 128).clip(0, 255).astype(np.uint8))
    content = io.BytesIO()
    picture.filter(ImageFilter.GaussianBlur(0.7)).save(content, "JPEG", quality=85)
    return content.getvalue()


def rate(action: Callable[[], Any], number: int, seconds: float = 3.0) -> float:
    """Pictures a second, of an action on `number` pictures, after one call that is not counted."""
    action()
    begin, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds:
        action()
        calls += 1
    return number * calls / passed


def parts(bundle: Path | None, batch_size: int = 32) -> dict[str, float]:
    """Pictures a second of each part: the first two in one thread, the tokenizer on the device."""
    rng = np.random.default_rng(0)
    files = [photograph(rng) for _ in range(8)]
    opened = [open_picture(file) for file in files]
    cv = results.load_model(bundle)
    side = cv.bundle.coglm_config.grid[0] * TOKEN_STRIDE
    pixels = rng.integers(0, 256, (batch_size, side, side, 3), np.uint8)

    def encode(params: Any, pixels: np.ndarray, config: HVQVAEConfig) -> np.ndarray:
        ids = image_tokenizer.to_tokens(params, pixels, stride=TOKEN_STRIDE, config=config)
        return np.asarray(ids)

    ours = functools.partial(
        encode, cv.bundle.params("tokenizer"), pixels, cv.bundle.tokenizer_config
    )
    published, large = HVQVAEConfig(), rng.integers(0, 256, (4, 160, 160, 3), np.uint8)
    random = image_tokenizer.init_params(jax.random.key(0), published)
    return {
        "bytes_of_a_picture": float(np.mean([len(file) for file in files])),
        "open": rate(lambda: [open_picture(file) for file in files], len(files)),
        "fit": rate(lambda: [fit_picture(one, side, side) for one in opened], len(files)),
        "encode": rate(ours, batch_size),
        "encode_published": rate(functools.partial(encode, random, large, published), 4),
    }


def whole(
    folder: Path, pictures: int, more: int, processes: int, options: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """`data prepare` in one process and by a cluster, of `pictures` and of `more`."""
    rng = np.random.default_rng(1)
    for number in range(50):
        (folder / f"{number}.jpg").write_bytes(photograph(rng))
    lines = (f'{{"image": "{n % 50}.jpg", "caption": "a red circle"}}' for n in range(more))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    words = ["data", "prepare", folder / "captions.jsonl", "--allow-unknown", *options]
    words += ["--shard-size", 200]
    ray = ("--engine", "ray", "--processes", processes)
    # A few first: programs are compiled and kept.
    trials.command(*words, "--count", 64, "--out", folder / "first")
    found = {}
    for number in (pictures, more):
        for name, how in (("one process", ()), (f"ray, {processes} processes", ray)):
            out = folder / f"{name}{number}"
            seen = trials.command(*words, "--count", number, "--out", out, *how)
            rate = round(number / seen["seconds"], 1)
            found[f"{name}, {number}"] = {"pictures": number, "pictures_a_second": rate} | seen
            click.echo(f"{name:24s}{number:7d}{rate:8.1f} pictures/s{seen['peak_mb']:9.0f} MB")
    return found


def plan(
    measured: dict[str, float], encode: float, pairs: int, record: int, disk: float
) -> list[dict[str, Any]]:
    """Days and limits for `pairs`, of which a device encodes `encode` a second: a worker has one
    CPU core that opens and fits meanwhile; all read from one store of `disk` bytes a second.
    """
    reading = 1 / (1 / measured["open"] + 1 / measured["fit"])
    of_worker = min(reading, encode)
    limit = disk / measured["bytes_of_a_picture"]
    rows = []
    for workers in WORKERS:
        speed = min(workers * of_worker, limit)
        bound = "store" if speed == limit else "encode" if of_worker < reading else "open and fit"
        rows.append(
            {
                "encoded_a_second": round(encode, 1),
                "workers": workers,
                "pictures_a_second": round(speed, 1),
                "days": round(pairs / speed / 86_400, 2),
                "limit": bound,
                "read_tb": round(pairs * measured["bytes_of_a_picture"] / 1e12, 2),
                "records_gb": round(pairs * record / 1e9, 1),
            }
        )
    return rows


def planned(
    measured: dict[str, float], bundle: Path | None, pairs: int, disk: float, gpu_rate: float | None
) -> list[dict[str, Any]]:
    """`plan` with the model's tokenizer and records, with the published ones, and with those at
    `gpu_rate`.
    """
    config = results.load_model(bundle).bundle.coglm_config
    record = 4 * RecordLayout.of(config, TOKEN_STRIDE).length
    published = 4 * RecordLayout().length
    rows = plan(measured, measured["encode"], pairs, record, disk)
    rows += plan(measured, measured["encode_published"], pairs, published, disk)
    if gpu_rate:
        rows += plan(measured, gpu_rate, pairs, published, disk)
    return rows


@click.command(help=__doc__)
@click.option("--part", "chosen", type=click.Choice(PARTS), multiple=True, default=PARTS)
@click.option("--pictures", type=click.IntRange(8), default=2000, show_default=True)
@click.option("--more", type=click.IntRange(8), default=20_000, help="For the bound on memory.")
@click.option("--processes", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--inputs", type=click.IntRange(600), default=20_000, show_default=True)
@click.option(
    "--illustrations",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of `cogview2 data gather illustrations`, for the part kills.",
)
@click.option("--prompts", type=click.IntRange(64), default=500, show_default=True)
@click.option("--stage", type=click.Choice(["base", "direct", "full"]), default="full")
@click.option("--pairs", type=click.IntRange(1), default=30_000_000, show_default=True)
@click.option(
    "--gpu-rate", type=click.FloatRange(1), help="Also plan with so many encoded a second."
)
@click.option("--disk", default=2e9, show_default=True, help="Bytes a second of the shared store.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@results.bundle_option
def main(
    chosen: tuple[str, ...],
    pictures: int,
    more: int,
    processes: int,
    inputs: int,
    illustrations: Path | None,
    prompts: int,
    stage: str,
    pairs: int,
    gpu_rate: float | None,
    disk: float,
    json_file: Path | None,
    bundle: Path | None,
) -> None:
    begin = time.monotonic()
    options = ["--bundle", bundles.locate(bundle).absolute()] if bundle else []
    done = results.parts_before(json_file, {}, bundle)
    for part in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if part == "rates":
                measured = parts(bundle)
                rows = planned(measured, bundle, pairs, disk, gpu_rate)
                done[part] = {"measured": measured, "pairs": pairs, "disk": disk, "plan": rows}
                for row in [measured, *rows]:
                    click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
            elif part == "whole":
                done[part] = whole(folder, pictures, more, processes, options)
            else:
                if part == "kills":
                    found = trials.killed_and_starved(folder, inputs, illustrations, *options)
                else:
                    found = trials.drawn_with_a_kill(folder, prompts, stage, *options)
                done[part] = found
                click.echo(f"{part}  " + "  ".join(f"{name} {found[name]}" for name in found))
        if json_file:
            results.write(json_file, {"parts": done}, bundle, begin)


if __name__ == "__main__":
    main()
