"""What does the image tokenizer keep of pictures that it never saw?

\b
    python -m experiments.illustrations.reconstruction --pictures illustrations \\
        --bundle experiments/illustrations/tokenizer --json FILE

Pictures of the held-out pairs and of the validation split, through the tokenizer and back, at 192
pixels and at 64. Against the original of the same size:

\b
    psnr     mean peak signal-to-noise ratio, in dB
    thing    share of pictures that the judge says the same thing of as of the original, enlarged
    codes    share of the codebook that is used, and the perplexity of its use
"""

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from cogview2_jax import bundle as bundles
from cogview2_jax.bundle import Bundle
from cogview2_jax.config import TOKEN_STRIDE
from cogview2_jax.tokenizer.image import to_pixels, to_tokens
from cogview2_jax.tokenizer.pictures import fit_picture
from experiments import results
from experiments.illustrations import examples, judge, presets
from experiments.illustrations.judge import Judge
from experiments.illustrations.presets import COARSE_PIXELS, FINE_PIXELS


def through(bundle: Bundle, pictures: np.ndarray, at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [n, side, side, 3], encoded and decoded, and their ids [n, cells]."""
    config, params = bundle.tokenizer_config, bundle.tokenizer
    cells = pictures.shape[1] // TOKEN_STRIDE
    made, found = [], []
    for begin in tqdm(range(0, len(pictures), at_once), desc=f"{pictures.shape[1]} pixels"):
        rows = np.arange(begin, begin + at_once).clip(max=len(pictures) - 1)
        ids = to_tokens(params, pictures[rows], stride=TOKEN_STRIDE, config=config)
        again = to_pixels(params, ids, grid=(cells, cells), stride=TOKEN_STRIDE, config=config)
        found.append(np.asarray(ids)[: len(pictures) - begin])
        made.append(np.asarray(again)[: len(pictures) - begin])
    return np.concatenate(made), np.concatenate(found)


def measure(
    bundle: Bundle, pictures: np.ndarray, judged: Judge, at_once: int = 16
) -> dict[str, float]:
    """The figures (see the module) of pictures uint8 [n, side, side, 3]."""
    made, ids = through(bundle, pictures, at_once)
    error = ((made.astype(np.float32) - pictures) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
    seen = [
        judge.read(
            judged, np.stack([fit_picture(each, FINE_PIXELS, FINE_PIXELS) for each in shown])
        ).things
        for shown in (pictures, made)
    ]
    counts = np.bincount(ids.reshape(-1), minlength=bundle.tokenizer_config.codebook_size)
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": round(float(psnr.mean()), 2),
        "thing": round(float(np.mean([a == b for a, b in zip(*seen, strict=True)])), 4),
        "codes": round(float((counts > 0).mean()), 4),
        "perplexity": round(float(np.exp(-(share * np.log(share)).sum())), 1),
    }


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(path_type=Path, file_okay=False), required=True)
@results.bundle_option
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(pictures: Path, bundle: Path | None, json_file: Path | None) -> None:
    begin = time.monotonic()
    try:
        loaded = bundles.load(bundle, ("tokenizer",))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    collection = examples.of_kinds(examples.read(pictures), presets.KINDS)
    splits = ("unseen_pair", "validation")
    fine = collection.pictures[np.concatenate([collection.indices(split) for split in splits])]
    figures: dict[str, Any] = {}
    for side, shown in ((FINE_PIXELS, fine), (COARSE_PIXELS, examples.reduced(fine))):
        figures[str(side)] = measure(loaded, shown, judge.load())
        cells = "".join(f"  {name} {value}" for name, value in figures[str(side)].items())
        click.echo(f"{side} pixels:{cells}")
    if json_file:
        results.write(json_file, figures | {"pictures": len(fine)}, bundle, begin)


if __name__ == "__main__":
    main()
