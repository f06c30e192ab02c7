"""What do bfloat16 and int8 matrices cost in quality?

\b
    python -m experiments.precision.run --num-prompts 100 --num-images 1 --json results.json

Each precision scores real scenes with CogLM, for the largest error of a logit, and draws pictures
of the same prompts from the same seeds, which the judge of caption_match reads.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from cogview2_jax import bundle as bundles
from cogview2_jax.config import Precision
from cogview2_jax.data import scenes
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.sharding import Execution
from experiments import results
from experiments.caption_match import judge
from experiments.caption_match.run import STAGES, generate_all, read_all
from experiments.caption_match.scoring import make_prompts

PRECISIONS = {
    "float32": Precision(),
    "bfloat16": Precision("bfloat16", "bfloat16"),
    "int8": Precision(matrices="int8"),
    "int8, bfloat16": Precision("bfloat16", "bfloat16", "int8"),
}


def megabytes(cv: CogView) -> float:
    """Of the transformers' parameters."""
    trees = [cv.bundle.params(name) for name in cv.networks if name != "tokenizer"]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 1e6


def errors(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Of logits, against those of float32."""
    apart = np.abs(found - exact)
    agreed = found.argmax(-1) == exact.argmax(-1)
    return {
        "largest_logit_error": float(apart.max()),
        "mean_logit_error": float(apart.mean()),
        "same_first_choice": float(agreed.mean()),
    }


def compare(
    bundle: Path | None, num_prompts: int, num_images: int, scenes_read: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of each precision."""
    examples = results.validation_scenes(scenes_read)
    texts = [example.captions[0]["en"] for example in examples]
    prompts, params = make_prompts(num_prompts, seed), judge.load()
    tokens, exact = None, None
    made = {}
    for name, precision in PRECISIONS.items():
        execution = Execution(precision)
        cv = CogView(bundles.load(bundle, execution=execution), execution)
        if tokens is None:
            tokens = np.stack([cv.picture_tokens(example.picture) for example in examples])
        logits = np.asarray(results.image_logits(cv, tokens, texts))
        exact = logits if exact is None else exact
        pictures = generate_all(cv.generate_stages, prompts, jax.random.key(seed), num_images, 10)
        right = {}
        for stage in STAGES:
            seen = read_all(params, pictures[stage])
            each = [
                np.mean([scenes.check(prompt.claims, objects).all_named for objects in found])
                for prompt, found in zip(prompts, seen, strict=True)
            ]
            right[stage] = float(np.mean(each))
        made[name] = {"megabytes": megabytes(cv), **errors(logits, exact), "right": right}
        click.echo(line(name, made[name]))
    return made


def line(name: str, row: dict[str, Any]) -> str:
    right = "".join(f"{100 * row['right'][stage]:9.1f}" for stage in STAGES)
    return (
        f"{name:16s}{row['megabytes']:8.1f} MB{row['largest_logit_error']:12.4f}"
        f"{row['mean_logit_error']:12.5f}{100 * row['same_first_choice']:9.1f} %{right}"
    )


@click.command(help=__doc__)
@click.option("--num-prompts", type=click.IntRange(1), default=200, show_default=True)
@click.option("--num-images", type=click.IntRange(1), default=2, show_default=True)
@click.option("--scenes", "scenes_read", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the prompts and the pictures.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@results.bundle_option
def main(json_file: Path | None, bundle: Path | None, **how: Any) -> None:
    begin = time.monotonic()
    titles = "".join(f"{stage + ' %':>9s}" for stage in STAGES)
    click.echo(f"{'':16s}{'weights':>11s}{'largest':>12s}{'mean error':>12s}{'agree':>11s}{titles}")
    made = compare(bundle, **how)
    if json_file:
        results.write(json_file, how | {"precisions": made}, bundle, begin)


if __name__ == "__main__":
    main()
