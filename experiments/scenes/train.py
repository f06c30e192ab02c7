"""Train all five parts of the Scenes bundle from zero on a CPU, resumably.

\b
    python -m experiments.scenes.train

The parts are trained in turn: text model and clusters (seconds), image tokenizer, CogLM, direct and
iterative super-resolution. Everything lies under --work; run the command again after an
interruption and it goes on from the last checkpoint. A --…-steps option may be repeated: each
number is a cycle of the learning rate. The finished bundle is written to --out.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from cogview2_jax import bundle
from cogview2_jax.tokenizer import clusters, text
from experiments.scenes import presets, records, tokenizer, transformers

_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNT = click.IntRange(min=1)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: a step's buffers, handed back and faulted in again at every
    step, cost a third of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def _cycles(name: str, *default: int) -> Callable[[Callable], Callable]:
    """An option that may be repeated: each number is a cycle of the learning rate, in steps."""
    return click.option(name, type=_COUNT, multiple=True, default=default, show_default=True)


@click.command(help=__doc__)
@click.option("--work", type=_FOLDER, default=Path("runs/scenes"), show_default=True)
@click.option("--out", type=_FOLDER, default=Path("runs/scenes/bundle"), show_default=True)
@click.option("--coglm-scenes", type=_COUNT, default=100_000, show_default=True)
@click.option("--sr-scenes", type=_COUNT, default=4_000, show_default=True)
@_cycles("--coglm-steps", 1100, 2100, 2000)
@_cycles("--direct-steps", 900, 1300)
@_cycles("--iterative-steps", 1400)
def main(
    work: Path,
    out: Path,
    coglm_scenes: int,
    sr_scenes: int,
    coglm_steps: tuple[int, ...],
    direct_steps: tuple[int, ...],
    iterative_steps: tuple[int, ...],
) -> None:
    _keep_freed_memory()
    text_model = records.text_model(work)
    vocabulary = text.vocabulary_for(text_model, presets.TOKENIZER.codebook_size)
    coglm_config = presets.coglm_config(vocabulary)
    direct_config = presets.direct_sr_config(vocabulary)
    iterative_config = presets.iterative_sr_config(vocabulary)
    slots = coglm_config.max_text

    tokenizer_params = tokenizer.run(work / "tokenizer")
    coarse = records.tokenize(
        work, tokenizer_params, text_model, range(coglm_scenes), slots=slots, fine=False
    )
    coglm_params = transformers.run_coglm(
        coarse,
        coglm_config,
        text.first_chinese(text_model, presets.TOKENIZER.codebook_size),
        work / "coglm",
        cycles=coglm_steps,
    )
    fine = records.tokenize(
        work, tokenizer_params, text_model, range(sr_scenes), slots=slots, fine=True
    )
    direct_params = transformers.run_direct_sr(
        fine, coglm_params, direct_config, work / "direct_sr", cycles=direct_steps
    )
    cluster_labels = clusters.cluster_codebook(
        np.asarray(tokenizer_params["codebook"]), presets.NUM_CLUSTERS
    )
    drafts = transformers.drafts(
        fine, direct_params, direct_config, cluster_labels, work / "drafts.npy"
    )
    iterative_params = transformers.run_iterative_sr(
        fine,
        drafts,
        coglm_params,
        coglm_config,
        iterative_config,
        work / "iterative_sr",
        cycles=iterative_steps,
    )
    tokenizer_params = tokenizer.run_other_strides(tokenizer_params, work / "tokenizer")
    made = bundle.Bundle(
        coglm_config,
        direct_config,
        iterative_config,
        presets.TOKENIZER,
        presets.SAMPLING,
        coglm=coglm_params,
        direct=direct_params,
        iterative=iterative_params,
        tokenizer=tokenizer_params,
        text_model=text_model,
        cluster_labels=cluster_labels,
    )
    bundle.save(out, made)
    click.echo(f"the bundle is at {out}")


if __name__ == "__main__":
    main()
