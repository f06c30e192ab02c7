"""What do the order and the number of rounds of iterative super-resolution gain, and what do they
cost?

\b
    python -m experiments.refinement.run --json results.json --plot plot.png

All points refine the same base pictures of Scenes. The judge of caption_match says how many show
what their prompts say and how near they are to real ones (FID of its outputs); a clean drawing of
what it reads, as in experiments/stages, gives the error of pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from tqdm import tqdm

from cogview2_jax.pipeline import stages
from cogview2_jax.pipeline.cogview import CogView
from experiments import results
from experiments.caption_match import judge
from experiments.caption_match.judged import Judged, judged_options, standard_error
from experiments.caption_match.scoring import make_prompts
from experiments.refinement import points
from experiments.refinement.points import Point
from experiments.stages.run import against_drawing, clean_drawing

PARTS = {
    "stages": points.stages_alone,
    "rounds": points.rounds,
    "orders": points.orders,
    "one by one": points.one_by_one,
    "windows": points.windows,
}


def base_tokens(cv: CogView, texts: Sequence[str], num_images: int, seed: int) -> np.ndarray:
    """Base pictures as the bundle draws them, without post-selection: [prompts, n, cells]."""
    bundle = cv.bundle
    text, is_text = results.prompts_of(cv, texts).base
    keys = jax.random.split(jax.random.key(seed), (len(texts), num_images))

    def drawn(rows: np.ndarray, flat: np.ndarray) -> jax.Array:
        return stages.decode_image(
            bundle.params("coglm"),
            text[rows],
            is_text[rows],
            keys[rows].reshape(-1),
            bundle.cluster_labels,
            config=bundle.coglm_config,
            sampling=bundle.sampling,
            num_clusters=bundle.num_clusters,
            execution=cv.execution,
        ).reshape(len(rows), num_images, -1)

    return results.in_batches(drawn, np.zeros((len(texts), 1)), 10)[:, 0]


def pixel_figures(pictures: np.ndarray) -> dict[str, float]:
    """Of pictures uint8 [prompts, n, y, x, 3]: the share with a clear reading, and the error and
    sharpness of those against a clean drawing, as in experiments/stages.
    """
    params, apart, clear = judge.load(), [], 0
    for row in pictures:
        for picture, found in zip(row, judge.read(params, row), strict=True):
            drawing = clean_drawing(picture, list(found))
            if drawing is not None:
                clear += 1
                apart.append(against_drawing(picture, drawing))
    sharpness, error = np.array(apart or [(np.nan, np.nan)]).T
    return {
        "clear": clear / pictures[..., 0, 0, 0].size,
        "sharpness": float(sharpness.mean()),
        "error": float(error.mean()),
        "error_error": standard_error(error),
    }


def compare(
    cv: CogView, chosen: Sequence[Point], num_prompts: int, num_images: int, seed: int, real: int
) -> list[dict[str, Any]]:
    """A row of figures for each point."""
    prompts = make_prompts(num_prompts, seed)
    texts, judged = [prompt.text for prompt in prompts], Judged(real)
    coarse = base_tokens(cv, texts, num_images, seed)
    starts = {points.DIRECT: results.super_resolved(cv, texts, coarse)}
    if any(point.start == points.ENLARGED for point in chosen):
        starts[points.ENLARGED] = points.enlarged(cv, coarse)
    rows = []
    for point in tqdm(chosen, desc="points"):
        start = starts[point.start]
        points.refined(cv, point, texts, start[:1])  # compiles
        begin = time.process_time()
        fine = points.refined(cv, point, texts, start)
        seconds = (time.process_time() - begin) / (num_prompts * num_images)
        pictures = results.pixels_of(cv, fine)
        rows.append(
            {"family": point.family, "setting": point.setting}
            | judged.measure(prompts, pictures)
            | pixel_figures(pictures)
            | {"passes": point.config.rounds if point.config else 0}
            | {"cpu_seconds_a_picture": round(seconds, 4)}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'family':10s}{'setting':22s}{'right %':>14s}{'FID':>9s}{'clear %':>9s}"
        f"{'sharpness':>11s}{'error':>14s}{'passes':>8s}{'CPU s':>8s}"
    ]
    for row in rows:
        right = f"{100 * row['right']:.1f} ± {100 * row['right_error']:.1f}"
        error = f"{row['error']:.2f} ± {row['error_error']:.2f}"
        lines.append(
            f"{row['family']:10s}{row['setting']:22s}{right:>14s}{row['fid']:9.4f}"
            f"{100 * row['clear']:9.1f}{row['sharpness']:11.3f}{error:>14s}{row['passes']:8d}"
            f"{row['cpu_seconds_a_picture']:8.3f}"
        )
    return "\n".join(lines)


def plot(parts: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Error and FID against time, a colour for each part; without iterative super-resolution
    alone, which is so far off that all else would be one spot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, name, label in zip(
        axes,
        ("error", "fid"),
        ("error against a clean drawing, grey levels", "FID, the judge's outputs"),
        strict=True,
    ):
        for part, made in parts.items():
            rows = [row for row in made if row["setting"] != points.ITERATIVE_ALONE]
            at = [row["cpu_seconds_a_picture"] for row in rows]
            axis.plot(at, [row[name] for row in rows], "o", label=part)
            for x, row in zip(at, rows, strict=True):
                axis.annotate(
                    row["setting"],
                    (x, row[name]),
                    fontsize=7,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
        axis.set_xlabel("CPU time of refinement, seconds a picture")
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
    default=tuple(PARTS),
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
        made[part] = compare(cv, PARTS[part](cv.bundle.iterative_config), **how)
        click.echo(f"\n{part}\n{table(made[part])}")
        if json_file:
            results.write(json_file, {**how, "parts": made}, bundle, begin)
    if plot_file:
        plot(made, plot_file)


if __name__ == "__main__":
    main()
