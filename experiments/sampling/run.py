"""What does cluster sampling gain over top-k and nucleus sampling, and textual attention over none?

\b
    python -m experiments.sampling.run --json results.json --plot plot.png

Each point draws the base stage of Scenes in its own way, without post-selection; direct
super-resolution then draws all of them in one way. The judge of caption_match says how many show
what their prompts say; how far the pictures of a prompt lie apart is their diversity, and the
Fréchet distance of the judge's outputs to those of real scenes is FID.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cogview2_jax.pipeline.cogview import CogView
from experiments import results
from experiments.caption_match.judged import Judged, judged_options
from experiments.caption_match.scoring import make_prompts
from experiments.sampling import points, selection
from experiments.sampling.points import Drawer, Point

_CUT = ("cut_off", "real_never_drawn")  # of the parts that measure it


def logits_of_real(cv: CogView, number: int) -> tuple[jax.Array, jax.Array]:
    """The model's logits at each cell of real pictures with their captions, float32
    [n, cells, num_image], and their tokens, int32 [n, cells].
    """
    items = results.validation_scenes(number)
    tokens = np.stack([cv.picture_tokens(item.picture) for item in items])
    texts = [item.captions[0]["en"] for item in items]
    return results.image_logits(cv, tokens, texts), jnp.asarray(tokens)


def compare(
    cv: CogView, chosen: Sequence[Point], num_prompts: int, num_images: int, seed: int, real: int
) -> list[dict[str, Any]]:
    """A row of figures for each point."""
    prompts = make_prompts(num_prompts, seed)
    texts = [prompt.text for prompt in prompts]
    judged, drawer = Judged(real), Drawer(cv, num_images)
    logits, tokens = logits_of_real(cv, min(64, real))
    rows = []
    for point in tqdm(chosen, desc="points"):
        begin = time.monotonic()
        drawn = drawer.draw(point, texts, seed)
        fine = results.super_resolved(cv, texts, drawn)
        labels, number = drawer.clusters(point)
        mass, never = points.cut_off(logits, tokens, point, labels, number)
        rows.append(
            {"family": point.family, "setting": point.setting}
            | judged.measure(prompts, results.pixels_of(cv, fine))
            | {"cut_off": float(mass.mean()), "real_never_drawn": float(never.mean())}
            | {"seconds": round(time.monotonic() - begin, 1)}
        )
    return rows


# A row of figures for each point of a part.
PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "samplers": lambda cv, **how: compare(cv, points.samplers(), **how),
    "clusters": lambda cv, **how: compare(cv, points.cluster_counts(), **how),
    "attention": lambda cv, **how: compare(cv, points.attention(), **how),
    "selection": selection.compare,
    "guidance": lambda cv, **how: compare(cv, points.guidance(cv.bundle.sampling.base), **how),
}


# Guidance needs a model that was trained for it.
_USUAL = tuple(part for part in PARTS if part != "guidance")


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'family':20s}{'setting':28s}{'right %':>14s}{'diversity':>17s}{'FID':>8s}"
        f"{'cut off %':>12s}{'real lost %':>12s}"
    ]
    for row in rows:
        right = f"{100 * row['right']:.1f} ± {100 * row['right_error']:.1f}"
        diversity = f"{row['diversity']:.4f} ± {row['diversity_error']:.4f}"
        lines.append(
            f"{row['family']:20s}{row['setting']:28s}{right:>14s}{diversity:>17s}{row['fid']:8.4f}"
            + "".join(f"{100 * row[name]:12.2f}" for name in _CUT if name in row)
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Right against diversity and FID against diversity, a line for each family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, name, label in zip(
        axes,
        ("right", "fid"),
        ("right, share of pictures", "FID, the judge's outputs"),
        strict=True,
    ):
        for family in dict.fromkeys(row["family"] for row in rows):
            mine = sorted(
                (row for row in rows if row["family"] == family), key=lambda row: row["diversity"]
            )
            axis.errorbar(
                [row["diversity"] for row in mine],
                [row[name] for row in mine],
                yerr=[row["right_error"] for row in mine] if name == "right" else None,
                marker="*" if family == "careful" else "o",
                markersize=14 if family == "careful" else 4,
                linestyle="" if family == "careful" else "-",
                label=family,
            )
        axis.set_xlabel("diversity, distance between pictures of a prompt")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


@click.command(help=__doc__)
@click.option(
    "--part",
    "parts",
    type=click.Choice([*PARTS]),
    multiple=True,
    default=_USUAL,
    show_default=True,
)
@judged_options
def main(
    parts: tuple[str, ...],
    json_file: Path | None,
    plot_file: Path | None,
    bundle: Path | None,
    **how: Any,
) -> None:
    begin = time.monotonic()
    cv = results.load_model(bundle)
    made = results.parts_before(json_file, how, bundle)
    for part in parts:  # each takes many minutes: what is done is written
        rows = made[part] = PARTS[part](cv, **how)
        click.echo(f"\n{part}\n{table(rows)}")
        if plot_file and part == "samplers":
            plot(rows, plot_file)
        if json_file:
            results.write(json_file, {**how, "parts": made}, bundle, begin)


if __name__ == "__main__":
    main()
