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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cogview2_jax.config import TOKEN_STRIDE
from cogview2_jax.data import scenes
from cogview2_jax.evaluation import distances
from cogview2_jax.pipeline import stages
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.pictures import fit_picture
from experiments import results
from experiments.caption_match import judge
from experiments.caption_match.scoring import Prompt, make_prompts
from experiments.sampling import points
from experiments.sampling.points import Drawer, Point

PARTS = {
    "samplers": lambda cv: points.samplers(cv.bundle.sampling.base),
    "clusters": lambda cv: points.cluster_counts(),
    "attention": lambda cv: points.attention(cv.bundle.sampling.base),
}
_SIDE = 192  # of the judge's pictures
_outputs = jax.jit(judge.apply)


class Judged:
    """Measures pictures of Scenes against real ones of the validation split."""

    def __init__(self, num_real: int) -> None:
        self._params = judge.load()
        real = [
            fit_picture(item.picture, _SIDE, _SIDE) for item in results.validation_scenes(num_real)
        ]
        self._real = distances.statistics([self.features(np.stack(real))])

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """The judge's outputs, mean and largest over its grid: float32 [n, d]."""
        found = []
        for begin in range(0, len(pictures), 32):
            part = pictures[begin : begin + 32]
            filled = np.concatenate([part, np.repeat(part[-1:], 32 - len(part), axis=0)])
            reading = _outputs(self._params, filled)
            flat = [reading.present[..., None], *reading.words.values()]
            grid = jax.nn.sigmoid(jnp.concatenate(flat, axis=-1))
            both = jnp.concatenate([grid.mean((1, 2)), grid.max((1, 2))], axis=-1)
            found.append(np.asarray(both)[: len(part)])
        return np.concatenate(found)

    def measure(self, prompts: Sequence[Prompt], pictures: np.ndarray) -> dict[str, float]:
        """Of pictures uint8 [prompts, n, 192, 192, 3]. Errors are standard errors over prompts."""
        flat = pictures.reshape(-1, *pictures.shape[2:])
        seen = judge.read(self._params, flat)
        number = pictures.shape[1]
        right = np.array(
            [
                scenes.check(prompts[index // number].claims, objects).all_named
                for index, objects in enumerate(seen)
            ],
            float,
        ).reshape(-1, number)
        small = pictures[:, :, ::6, ::6].astype(np.float32) / 255
        apart = [_apart(each.reshape(number, -1)) for each in small]
        made = distances.statistics([self.features(flat)])
        return {
            "right": float(right.mean()),
            "right_error": _error(right.mean(1)),
            "diversity": float(np.mean(apart)),
            "diversity_error": _error(np.array(apart)),
            "fid": distances.frechet_distance(made, self._real),
        }


def _apart(rows: np.ndarray) -> float:
    """The mean distance of pairs of pictures [n, d], as a root mean square of their values."""
    first, second = np.triu_indices(len(rows), 1)
    return float(np.sqrt(((rows[first] - rows[second]) ** 2).mean(1)).mean())


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def pictures_of(
    cv: CogView, prompts: Sequence[str], tokens: np.ndarray, at_once: int = 50
) -> np.ndarray:
    """Base tokens [prompts, n, cells] through direct super-resolution, which draws as the bundle
    says: uint8 [prompts, n, 192, 192, 3].
    """
    bundle, number = cv.bundle, tokens.shape[1]
    text, is_text = results.prompts_of(cv, prompts).direct
    flat, made = tokens.reshape(-1, tokens.shape[-1]), []
    for begin in range(0, len(flat), at_once):
        rows = np.arange(begin, begin + at_once).clip(max=len(flat) - 1)
        fine = stages.super_resolve_direct(
            bundle.params("direct"),
            text[rows // number],
            is_text[rows // number],
            flat[rows],
            jax.random.split(jax.random.key(begin), at_once),
            bundle.cluster_labels,
            config=bundle.direct_config,
            sampling=bundle.sampling,
            num_clusters=bundle.num_clusters,
            execution=cv.execution,
        )
        pixels = image_tokenizer.to_pixels(
            bundle.params("tokenizer"),
            fine,
            grid=bundle.direct_config.grid,
            stride=TOKEN_STRIDE,
            config=bundle.tokenizer_config,
        )
        made.append(np.asarray(pixels)[: len(flat) - begin])
    pictures = np.concatenate(made)
    return pictures.reshape(*tokens.shape[:2], *pictures.shape[1:])


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
        labels, number = drawer.clusters(point)
        mass, never = points.cut_off(logits, tokens, point, labels, number)
        rows.append(
            {"family": point.family, "setting": point.setting}
            | judged.measure(prompts, pictures_of(cv, texts, drawn))
            | {"cut_off": float(mass.mean()), "real_never_drawn": float(never.mean())}
            | {"seconds": round(time.monotonic() - begin, 1)}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'family':12s}{'setting':28s}{'right %':>14s}{'diversity':>17s}{'FID':>8s}"
        f"{'cut off %':>11s}{'real lost %':>12s}"
    ]
    for row in rows:
        right = f"{100 * row['right']:.1f} ± {100 * row['right_error']:.1f}"
        diversity = f"{row['diversity']:.4f} ± {row['diversity_error']:.4f}"
        lines.append(
            f"{row['family']:12s}{row['setting']:28s}{right:>14s}{diversity:>17s}{row['fid']:8.4f}"
            f"{100 * row['cut_off']:11.2f}{100 * row['real_never_drawn']:12.2f}"
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
                marker="*" if family == "shipped" else "o",
                markersize=14 if family == "shipped" else 4,
                linestyle="" if family == "shipped" else "-",
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
    default=tuple(PARTS),
    show_default=True,
)
@click.option("--num-prompts", type=click.IntRange(2), default=100, show_default=True)
@click.option("--num-images", type=click.IntRange(2), default=4, show_default=True)
@click.option(
    "--real", type=click.IntRange(2), default=2000, show_default=True, help="Real scenes."
)
@click.option("--seed", default=0, show_default=True, help="Of the prompts and the pictures.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(
    parts: tuple[str, ...],
    num_prompts: int,
    num_images: int,
    real: int,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
    bundle: Path | None,
) -> None:
    begin = time.monotonic()
    cv = results.load_model(bundle)
    made: dict[str, Any] = {}
    for part in parts:  # each takes many minutes: what is done is written
        rows = compare(cv, PARTS[part](cv), num_prompts, num_images, seed, real)
        made[part] = rows
        click.echo(f"\n{part}\n{table(rows)}")
        if plot_file and part == "samplers":
            plot(rows, plot_file)
        if json_file:
            counts = {"num_prompts": num_prompts, "num_images": num_images, "real": real}
            results.write(json_file, {**counts, "seed": seed, "parts": made}, bundle, begin)


if __name__ == "__main__":
    main()
