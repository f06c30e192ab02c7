"""Train all five parts of the illustrations bundle from zero, resumably.

\b
    python -m experiments.illustrations.train --pictures DIR

Text model, image tokenizer, CogLM, direct and iterative super-resolution, each by the task that
`cogview2 train` runs, on the pictures that `gather` has made. Everything is under --work; after an
interruption the same command resumes from the last checkpoint. The bundle is written to --out
after every part.

Pictures and tokens are held in memory. Batches and steps are for two CPU cores.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cogview2_jax import bundle as bundles
from cogview2_jax.bundle import Bundle
from cogview2_jax.cli.sheets import png
from cogview2_jax.config import Precision, Training
from cogview2_jax.data import prepare
from cogview2_jax.data.records import RecordLayout, text_part
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import stages
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.clusters import cluster_codebook
from cogview2_jax.training import batches
from cogview2_jax.training.batches import FineSample, Rows
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
from experiments.illustrations import examples, memory, presets
from experiments.illustrations.examples import Example

# Muon at these rates on matrices and convolutions, AdamW at a tenth of them on the rest.
TOKENIZER = Options(
    3200, 64, 0.02, warmup=0.02, final_rate=0.0, optimizer="muon", weight_decay=0.0, seed=101
)
COGLM = Options(
    3200, 64, 0.02, warmup=0.03, final_rate=0.0, optimizer="muon", seed=61, average=0.995
)
DIRECT = Options(2400, 8, 0.015, warmup=0.03, final_rate=0.0, optimizer="muon", seed=71)
ITERATIVE = Options(1400, 12, 0.015, warmup=0.03, final_rate=0.0, optimizer="muon", seed=81)
TASKS = CogLMOptions(
    "nothing",
    patch_size=4,
    num_patches=3,
    caption_ratio=0.2,
    text_ratio=0.0,
    completion_ratio=0.3,
    drop_text=0.1,  # for guidance
)
# Of direct SR's coarse input tokens, the share that is redrawn, in a half of the pictures: the base
# stage makes mistakes, which direct SR must learn to correct from the text and the other cells.
NOISE = 0.15
# Share of pictures, in training iterative SR, with anchors from direct SR instead of the true ones.
DRAFTED_SHARE = 0.75
# Super-resolution learns from fewer records: its tasks are local, and fine tokens and drafts cost
# time.
NUM_FINE, FINE_VARIANTS, FINE_FRAMES = 4_000, 3, 1.0

_FOLDER = click.Path(path_type=Path, file_okay=False)
_PARTS = ("tokenizer", "coglm", "direct", "iterative")


@click.command(help=__doc__)
@click.option("--pictures", type=_FOLDER, required=True, help="As `gather` makes them.")
@click.option("--work", type=_FOLDER, default=Path("runs/illustrations"), show_default=True)
@click.option("--out", type=_FOLDER, default=Path("runs/illustrations/bundle"), show_default=True)
@click.option(
    "--tokenizer", type=_FOLDER, help="A bundle with a trained tokenizer to take it from."
)
@click.option("--until", type=click.Choice(_PARTS), default=_PARTS[-1], show_default=True)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of all steps, for a trial; of the pictures ten times as much.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option(
    "--kind", "kinds", multiple=True, default=presets.KINDS, show_default=True, metavar="NAME"
)
@click.option("--dropout", type=click.FloatRange(0, 0.9), default=0.1, show_default=True)
def main(pictures: Path, work: Path, out: Path, tokenizer: Path | None, **how: Any) -> None:
    keep_freed_memory()
    try:
        for bundle in train(pictures, work, tokenizer, **how):
            bundles.save(out, bundle)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"the bundle is at {out}")


def train(
    pictures: Path,
    work: Path,
    tokenizer: Path | None,
    *,
    until: str,
    share: float,
    dtype: str,
    kinds: Sequence[str],
    dropout: float,
) -> Iterator[Bundle]:
    """The bundle after each part, from zero or from what `work` holds already."""
    execution = Execution(Precision(compute=jnp.dtype(dtype)), Training(dropout))
    done = _PARTS[: _PARTS.index(until) + 1]

    work.mkdir(parents=True, exist_ok=True)

    def fewer(options: Options) -> Options:
        return dataclasses.replace(options, num_steps=max(2, round(share * options.num_steps)))

    def run(task: Task, options: Options, name: str) -> Any:
        return run_task(task, options, work / name, LoopOptions(save_every=200))

    collection = examples.of_kinds(examples.read(pictures), kinds)
    bundle = _untrained(pictures)
    if tokenizer:
        trained = bundles.load(tokenizer, ("tokenizer",))
        params, labels = trained.tokenizer, trained.cluster_labels
    else:
        options = fewer(TOKENIZER)
        task = _tokenizer_task(bundle, collection, options, execution)
        params = run(task, options, "tokenizer")
        labels = cluster_codebook(np.asarray(params["codebook"]), presets.NUM_CLUSTERS)
    bundle = bundle._replace(tokenizer=params, cluster_labels=labels)
    yield bundle
    if "coglm" not in done:
        return

    some = min(1.0, 10 * share)
    layout = RecordLayout.of(bundle.coglm_config, presets.STRIDE)
    made = examples.to_train(collection, some)
    what = (collection.items, examples.VARIANTS, examples.FRAMES, some)
    rows = _records(_file(work, "coarse", bundle.tokenizer, what), bundle, made, layout)
    unseen = _rows_of(examples.to_validate(collection), bundle, layout)
    options = fewer(COGLM)
    data = functools.partial(memory.token_data, name="illustrations")
    task = coglm_task(
        bundle, data(rows, unseen, layout=layout, options=options), options, TASKS, execution
    )
    bundle = bundle._replace(coglm=run(task, options, "coglm"))
    yield bundle
    if "direct" not in done:
        return

    layout = RecordLayout.of(bundle.coglm_config, presets.STRIDE, presets.FINE_PIXELS)
    made = examples.to_train(collection, some, variants=FINE_VARIANTS, frames=FINE_FRAMES)
    what = (collection.items, FINE_VARIANTS, FINE_FRAMES, some)
    rows = _records(_file(work, "fine", bundle.tokenizer, what), bundle, made, layout)
    rows = np.random.default_rng(54).permutation(rows)[:NUM_FINE]
    unseen = _rows_of(examples.to_validate(collection), bundle, layout)
    options = fewer(DIRECT)
    task = direct_sr_task(
        bundle,
        data(rows, unseen, layout=layout, options=options),
        options,
        DirectSROptions("coglm"),
        execution,
    )
    bundle = bundle._replace(direct=run(_with_noise(task), options, "direct"))
    yield bundle
    if "iterative" not in done:
        return

    options = fewer(ITERATIVE)
    file = _file(work, "drafts", bundle.direct, memory.digest(rows))
    drafts = _drafts(file, bundle, rows, layout, execution)
    task = iterative_sr_task(
        bundle,
        data(rows, unseen, layout=layout, options=options),
        options,
        IterativeSROptions("coglm"),
        execution,
    )
    yield bundle._replace(iterative=run(_with_drafts(task, drafts), options, "iterative"))


def _untrained(pictures: Path) -> Bundle:
    model = text.load_text_model(pictures / "text.model")
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


# --- The tokenizer --------------------------------------------------------------------------------


def _tokenizer_task(
    bundle: Bundle, collection: examples.Collection, options: Options, execution: Execution
) -> Task:
    """The tokenizer on crops: half of them whole pictures made small, half parts of large ones."""
    large = collection.pictures[collection.indices("train")]
    small = examples.reduced(large)
    side = presets.COARSE_PIXELS
    records = memory.InMemory(
        [png(picture) for picture in small[:512]], None, {"source": "illustrations"}
    )
    own = TokenizerOptions(
        side=side, decay=0.97, commitment=0.5, strides=(presets.STRIDE,), start="nothing"
    )
    task = tokenizer_task(bundle, records, options, own, execution)
    begin = int(own.settle * options.planned_steps)

    def read(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((options.seed, 3, step))
        numbers = rng.integers(len(large), size=options.batch_size)
        crops = small[numbers]
        for row in range(options.batch_size // 2):
            y, x = rng.integers(presets.FINE_PIXELS - side + 1, size=2)
            crops[row] = large[numbers[row], y : y + side, x : x + side]
        return crops, np.full(len(crops), step >= begin)

    return task._replace(read=read)


# --- Token records --------------------------------------------------------------------------------


def _records(
    file: Path, bundle: Bundle, parts: Iterable[list[Example]], layout: RecordLayout
) -> np.ndarray:
    """Token records of examples, int32 [captions of all, length], kept in `file`."""
    if not file.exists():
        made = [_rows_of(part, bundle, layout) for part in tqdm(parts, desc=file.stem)]
        _save(file, np.concatenate(made))
    return np.load(file)


def _rows_of(made: list[Example], bundle: Bundle, layout: RecordLayout) -> np.ndarray:
    """A row for each caption of each example, int32 [captions, length]."""
    vocabulary = bundle.coglm_config.vocabulary
    fine = np.stack([example.picture for example in made])
    pictures = {presets.COARSE_PIXELS: examples.reduced(fine), presets.FINE_PIXELS: fine}
    tokens = np.concatenate([_tokens(bundle, pictures[size]) for size in layout.sizes], axis=1)
    found = []
    for example, ids in zip(made, tokens, strict=True):
        for caption in example.captions:
            words = text.encode(bundle.text_model, caption, vocabulary)
            part = text_part([words], layout.text_slots, vocabulary)
            found.append(np.concatenate([part, ids]))
    return np.stack(found).astype(np.int32)


def _tokens(bundle: Bundle, pictures: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Image tokens int32 [n, cells] of pictures uint8 [n, y, x, 3]."""
    found = []
    for begin in range(0, len(pictures), batch_size):
        batch = pictures[begin : begin + batch_size]
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        ids = image_tokenizer.to_tokens(
            bundle.tokenizer, filled, stride=presets.STRIDE, config=bundle.tokenizer_config
        )
        found.append(np.asarray(ids)[: len(batch)])
    return np.concatenate(found)


def _replacing(task: Task, change: Callable[[int, FineSample], FineSample]) -> Task:
    def read(step: int) -> FineSample:
        return change(step, task.read(step))

    return task._replace(read=read)


def _with_noise(task: Task) -> Task:
    """The task with some coarse tokens of every second picture drawn at random."""

    def change(step: int, sample: FineSample) -> FineSample:
        rng = np.random.default_rng((76, step))
        shape = sample.seen.shape
        noisy = (rng.random(shape) < NOISE) & (rng.random((shape[0], 1)) < 0.5)
        other = rng.permuted(sample.seen.reshape(-1)).reshape(shape)
        return sample._replace(seen=np.where(noisy, other, sample.seen))

    return _replacing(task, change)


def _with_drafts(task: Task, drafts: np.ndarray) -> Task:
    """The task with `drafts`, int32 [records, cells], as input for a share of the pictures."""

    def change(step: int, sample: FineSample) -> FineSample:
        numbers = np.array(task.ids_of(step))
        drafted = np.random.default_rng((75, step)).random((len(numbers), 1)) < DRAFTED_SHARE
        return sample._replace(seen=np.where(drafted, drafts[numbers], sample.seen))

    return _replacing(task, change)


def _drafts(
    file: Path,
    bundle: Bundle,
    rows: np.ndarray,
    layout: RecordLayout,
    execution: Execution,
    batch_size: int = 64,
) -> np.ndarray:
    """Input tokens for iterative SR, int32 [records, fine cells]: at the anchors those that direct
    SR draws, elsewhere the true ones.
    """
    if file.exists():
        return np.load(file)
    config = bundle.direct_config
    anchors = inputs.lopar_order(bundle.iterative_config).reshape(-1) < 1
    rng = np.random.default_rng(0)  # would choose between two texts; each record has one
    made = rows[:, layout.columns(presets.FINE_PIXELS)].copy()
    for begin in tqdm(range(0, len(rows), batch_size), desc="drafts"):
        chosen = np.arange(begin, begin + batch_size) % len(rows)
        sample = batches.direct_sr(rng, Rows(rows[chosen], 0, batch_size), layout, config)
        drawn = stages.super_resolve_direct(
            bundle.direct,
            sample.text,
            sample.is_text,
            sample.seen,
            jax.random.split(jax.random.key(begin), batch_size),
            bundle.cluster_labels,
            config=config,
            sampling=presets.SAMPLING,
            num_clusters=presets.NUM_CLUSTERS,
            execution=execution,
        )
        made[chosen] = np.where(anchors, drawn, sample.fine)
    _save(file, made)
    return made


def _file(work: Path, name: str, params: Any, what: Any) -> Path:
    """The file of an array that these parameters make of `what`: another one of other things."""
    made_of = prepare.fingerprint(params) + repr(what)
    return work / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.npy"


def _save(file: Path, array: np.ndarray) -> None:
    partial = file.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.rename(file)


if __name__ == "__main__":
    main()
