"""Train all five parts of the Scenes bundle from zero, resumably.

\b
    python -m experiments.scenes.train

Text model, image tokenizer, CogLM, direct and iterative super-resolution, each by the task that
`cogview2 train` runs, on records as `cogview2 data prepare` makes them. Everything is under --work;
after an interruption the same command resumes from the last checkpoint. The finished bundle is
written to --out.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from tqdm import tqdm

from cogview2_jax import bundle as bundles
from cogview2_jax.bundle import Bundle
from cogview2_jax.data import reading, scenes
from cogview2_jax.data.sources import Scenes, Source
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import stages
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.clusters import cluster_codebook
from cogview2_jax.training.batches import FineSample
from cogview2_jax.training.coglm import coglm_task
from cogview2_jax.training.loop import keep_freed_memory
from cogview2_jax.training.options import (
    CogLMOptions,
    DirectSROptions,
    IterativeSROptions,
    LoopOptions,
    Options,
    TokenizerOptions,
)
from cogview2_jax.training.run import run as run_task
from cogview2_jax.training.super_resolution import direct_sr_task, iterative_sr_task
from cogview2_jax.training.task import Task
from cogview2_jax.training.tokenizer import tokenizer_task
from experiments.scenes import inputs as scene_inputs
from experiments.scenes import perceptual, prepared, presets

# Muon at these rates on matrices and convolutions, AdamW at a tenth of them on the rest.
TOKENIZER = Options(
    1900, 16, 0.02, warmup=0.02, final_rate=0.0, optimizer="muon", weight_decay=0.0, seed=101
)
OTHER_STRIDES = Options(300, 16, 0.02, final_rate=0.0, optimizer="muon", weight_decay=0.0, seed=103)
IN_ORDER = Options(2600, 64, 0.02, warmup=0.05, final_rate=0.0, optimizer="muon", seed=61)
BOTH_ORDERS = Options(2600, 64, 0.02, warmup=0.05, final_rate=0.0, optimizer="muon", seed=62)
DIRECT = Options(2200, 8, 0.015, final_rate=0.0, optimizer="muon", seed=71)
ITERATIVE = Options(1400, 12, 0.015, final_rate=0.0, optimizer="muon", seed=81)
NUM_CUTS, NUM_SCENES, NUM_FINE = 30_000, 60_000, 4_000

MAIN_STRIDE = presets.COARSE_STRIDE
OBJECT_PIXELS = 5.0  # how much more a pixel of an object counts, for the tokenizer
OBJECT_CELLS = 3.0  # and a cell with a part of one, for super-resolution
# Share of pictures with coarse tokens of other colours and fills than text and fine tokens have:
# the base stage makes such mistakes, and direct SR must learn to follow the text.
REPAINTED_SHARE = 0.25
# Share of pictures, in training iterative SR, with anchors from direct SR instead of the true ones.
# Trained on true anchors alone, it trusts mistakes of direct SR and spreads them over the cells
# between.
DRAFTED_SHARE = 0.75

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(help=__doc__)
@click.option("--work", type=_FOLDER, default=Path("runs/scenes"), show_default=True)
@click.option("--out", type=_FOLDER, default=Path("runs/scenes/bundle"), show_default=True)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of all steps and scenes, for a trial.",
)
def main(work: Path, out: Path, share: float) -> None:
    keep_freed_memory()
    bundles.save(out, train(work, share))
    click.echo(f"the bundle is at {out}")


def train(work: Path, share: float = 1.0) -> Bundle:
    """The bundle, from zero or from what `work` holds already."""

    def part(number: int) -> int:
        return max(2, round(share * number))

    def run(
        task: Callable[..., Task], *given: Any, options: Options, name: str, **also: Any
    ) -> Any:
        fewer = dataclasses.replace(options, num_steps=part(options.num_steps))
        made = task(*given, fewer, **also)
        return run_task(made, fewer, work / name, LoopOptions(save_every=100))

    def records(source: Source, bundle: Bundle, name: str, *, fine: bool = False) -> Path:
        return prepared.tokens(work / name, bundle, source, fine=fine, workers=2)

    bundle = _untrained(work)
    cuts = prepared.pictures(work / "cuts", scene_inputs.Cuts(part(NUM_CUTS)))
    tokenizer = functools.partial(
        run,
        tokenizer_task,
        pixel_weights=_pixel_weights,
        perceptual=functools.partial(perceptual.distance, _percept(work, part(500))),
        perceptual_weight=0.5,
    )
    own = TokenizerOptions(side=presets.COARSE_PIXELS, decay=0.97, commitment=0.5)
    main = dataclasses.replace(own, strides=(MAIN_STRIDE,), start="nothing")
    params = tokenizer(bundle, cuts, options=TOKENIZER, name="tokenizer", own=main)
    bundle = bundle._replace(tokenizer=params)
    others = tuple(stride for stride in presets.TOKENIZER.strides if stride != MAIN_STRIDE)
    rest = dataclasses.replace(own, strides=others, keep_others=True)
    params = tokenizer(bundle, cuts, options=OTHER_STRIDES, name="other_strides", own=rest)
    labels = cluster_codebook(np.asarray(params["codebook"]), presets.NUM_CLUSTERS)
    bundle = bundle._replace(tokenizer=params, cluster_labels=labels)

    # Relations. With both orders of naming two objects equally likely, neither the order nor the
    # word "above" alone is informative, and 3,000 steps did not learn the two together. So at first
    # the object further up or left is always named first.
    tasks = CogLMOptions(patch_size=4, num_patches=3, completion_ratio=0.4)
    coglm = functools.partial(run, coglm_task)
    in_order = records(scene_inputs.InOrder(part(NUM_SCENES)), bundle, "records_in_order")
    from_zero = dataclasses.replace(tasks, start="nothing")
    params = coglm(bundle, in_order, options=IN_ORDER, name="coglm_in_order", own=from_zero)
    bundle = bundle._replace(coglm=params)
    both = records(Scenes(part(NUM_SCENES)), bundle, "records_both")
    bundle = bundle._replace(
        coglm=coglm(bundle, both, options=BOTH_ORDERS, name="coglm", own=tasks)
    )

    number = part(NUM_FINE)
    fine = records(Scenes(number), bundle, "records_fine", fine=True)
    repainted = _coarse(records(scene_inputs.Repainted(number), bundle, "records_repainted"))
    weights = _cell_weights(work / "cell_weights.npy", number)

    def direct_task(bundle: Bundle, records: Path, options: Options) -> Task:
        task = direct_sr_task(bundle, records, options, DirectSROptions("coglm"))
        return _of_scenes(task, weights, repainted, REPAINTED_SHARE)

    params = run(direct_task, bundle, fine, options=DIRECT, name="direct")
    bundle = bundle._replace(direct=params)
    drafts = _drafts(work / "drafts.npy", bundle, fine, repainted)

    def iterative_task(bundle: Bundle, records: Path, options: Options) -> Task:
        task = iterative_sr_task(bundle, records, options, IterativeSROptions("coglm"))
        return _of_scenes(task, weights, drafts, DRAFTED_SHARE)

    params = run(iterative_task, bundle, fine, options=ITERATIVE, name="iterative")
    return bundle._replace(iterative=params)


# --- Text and tokenizer ---------------------------------------------------------------------------


def _untrained(work: Path, num_captions: int = 20_000) -> Bundle:
    """The bundle before training, with a text model of captions of the train split."""
    file = work / "text.model"
    if not file.exists():
        rng = np.random.default_rng(31)
        drawn = [scenes.sample_scene(rng) for _ in range(num_captions // 2)]
        captions = [
            scenes.caption(scene, rng, lang) for scene in drawn for lang in scenes.LANGUAGES
        ]
        content = text.train_text_model(captions, words=scenes.WORDS["zh"])
        _write(file, content)
    model = text.load_text_model(file)
    vocabulary = text.vocabulary_for(model, presets.TOKENIZER.codebook_size)
    description = bundles.Description(
        presets.coglm_config(vocabulary),
        presets.direct_sr_config(vocabulary),
        presets.iterative_sr_config(vocabulary),
        presets.TOKENIZER,
        presets.SAMPLING,
        made_with={},
    )
    return bundles.untrained(description, model)


def _percept(work: Path, num_steps: int) -> Any:
    file = work / "perceptual.msgpack"
    if not file.exists():
        params = perceptual.train(np.random.default_rng(77), num_steps=num_steps)
        _write(file, serialization.msgpack_serialize(jax.tree.map(np.asarray, params)))
    return serialization.msgpack_restore(file.read_bytes())


def _pixel_weights(images: jax.Array) -> jax.Array:
    return jnp.where(scene_inputs.on_object(255 * images), OBJECT_PIXELS, 1.0)


# --- Records --------------------------------------------------------------------------------------


def _coarse(folder: Path) -> np.ndarray:
    """The coarse tokens of all records, int32 [n, cells]."""
    records = reading.Records(folder)
    layout = records.manifest.layout
    assert layout is not None
    columns = layout.columns(layout.sizes[0])
    rows = [np.frombuffer(records[n], "<i4")[columns] for n in range(len(records))]
    return np.stack(rows).astype(np.int32)


def _cell_weights(file: Path, number: int) -> np.ndarray:
    """How much each fine cell of each scene counts, float32 [scenes, cells]."""
    if not file.exists():
        every = tqdm(range(number), desc=file.stem)
        cells = np.stack([scene_inputs.object_cells(index) for index in every])
        _save(file, np.where(cells, OBJECT_CELLS, 1.0).astype(np.float32))
    return np.load(file)


def _of_scenes(task: Task, weights: np.ndarray, other: np.ndarray, share: float) -> Task:
    """The task with weighted cells, and with `other`, int32 [records, cells], as the network's
    input tokens for the share `share` of the pictures.
    """

    def read(step: int) -> FineSample:
        sample: FineSample = task.read(step)
        numbers = np.array(task.ids_of(step))
        rng = np.random.default_rng((75, step))
        swapped = rng.random((len(numbers), 1)) < share
        return sample._replace(
            seen=np.where(swapped, other[numbers], sample.seen),
            weights=sample.weights * weights[numbers // len(scenes.LANGUAGES)],
        )

    return task._replace(read=read)


def _drafts(
    file: Path, bundle: Bundle, fine: Path, repainted: np.ndarray, batch_size: int = 16
) -> np.ndarray:
    """Input tokens for iterative SR, int32 [records, fine cells]: at the anchors those that direct
    SR draws, for a share of the records from repainted coarse tokens; elsewhere the true ones.
    """
    if not file.exists():
        config = bundle.direct_config
        anchors = inputs.lopar_order(bundle.iterative_config).reshape(-1) < 1
        options = Options(1, batch_size)
        task = direct_sr_task(bundle, fine, options)
        number = len(reading.Records(fine))
        made = np.full((number, config.num_image_tokens), -1, np.int32)
        rng = np.random.default_rng(76)
        for step in tqdm(range(-(-number // batch_size)), desc=file.stem):
            numbers, sample = np.array(task.ids_of(step)), task.read(step)
            swapped = rng.random((batch_size, 1)) < REPAINTED_SHARE
            drawn = stages.super_resolve_direct(
                bundle.direct,
                sample.text,
                sample.is_text,
                np.where(swapped, repainted[numbers], sample.seen),
                jax.random.split(jax.random.key(step), batch_size),
                bundle.cluster_labels,
                config=config,
                sampling=presets.SAMPLING,
                num_clusters=presets.NUM_CLUSTERS,
            )
            made[numbers] = np.where(anchors, drawn, sample.fine)
        if (made < 0).any():
            raise ValueError(f"{(made < 0).any(axis=1).sum()} records have no draft")
        _save(file, made)
    return np.load(file)


def _save(file: Path, array: np.ndarray) -> None:
    partial = file.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.rename(file)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(file)


if __name__ == "__main__":
    main()
