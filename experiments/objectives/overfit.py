"""Each objective on one fixed batch: the loss of a network that learns it comes near zero.

The step, the loss and the batch are those of `cogview2 train`; only the networks are small.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cogview2_jax.bundle import Bundle
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    TransformerConfig,
)
from cogview2_jax.data.sources import Scenes
from cogview2_jax.training.coglm import coglm_task
from cogview2_jax.training.options import (
    CogLMOptions,
    DirectSROptions,
    IterativeSROptions,
    Options,
    TokenizerOptions,
)
from cogview2_jax.training.super_resolution import direct_sr_task, iterative_sr_task
from cogview2_jax.training.task import Task
from cogview2_jax.training.tokenizer import tokenizer_task
from experiments.objectives import figures
from experiments.scenes import prepared


@dataclass(frozen=True)
class Size:
    """Sizes of the networks and the runs: `layers`, `width`, `steps` are the transformers'."""

    samples: int
    layers: int
    width: int
    steps: int
    channels: int
    codes: int
    tokenizer_steps: int


FULL = Size(32, 3, 128, steps=300, channels=32, codes=1024, tokenizer_steps=600)
QUICK = Size(8, 2, 64, steps=60, channels=16, codes=256, tokenizer_steps=60)
# On matrices; AdamW at a tenth of the rate on the rest.
MUON = Options(optimizer="muon", learning_rate=0.02, weight_decay=0.0)
SIDE = 32  # of the tokenizer's crops, in pixels
# CogLM's tasks, each alone and all three together; with enough text for a batch of 32 to have some.
MIXES = {
    "CogLM, generation": CogLMOptions("nothing", caption_ratio=0.0, text_ratio=0.0),
    "CogLM, captioning and patches": CogLMOptions("nothing", caption_ratio=1.0, text_ratio=0.0),
    "CogLM, masked text": CogLMOptions("nothing", caption_ratio=0.0, text_ratio=1.0),
    "CogLM, all three": CogLMOptions("nothing", caption_ratio=0.4, text_ratio=0.2),
}


def small(bundle: Bundle, layers: int, width: int) -> Bundle:
    """`bundle`'s text model and tokenizer with small transformers that are not trained yet."""
    sizes = TransformerConfig(layers, width, num_heads=4)
    base = dataclasses.replace(bundle.coglm_config, transformer=sizes)
    return bundle._replace(
        coglm_config=base,
        direct_config=dataclasses.replace(bundle.direct_config, coglm=base),
        iterative_config=dataclasses.replace(bundle.iterative_config, transformer=sizes),
        coglm={},
        direct={},
        iterative={},
    )


def with_small_grid(bundle: Bundle) -> Bundle:
    """The bundle with 4×4 cells, 12×12 after super-resolution: pictures of 32 and 96 pixels."""
    base: CogLMConfig = dataclasses.replace(bundle.coglm_config, grid=(4, 4))
    direct: DirectSRConfig = dataclasses.replace(bundle.direct_config, coglm=base)
    iterative: IterativeSRConfig = dataclasses.replace(bundle.iterative_config, grid=direct.grid)
    return bundle._replace(coglm_config=base, direct_config=direct, iterative_config=iterative)


def small_tokenizer(config: HVQVAEConfig, channels: int, codes: int) -> HVQVAEConfig:
    """All three strides, one block a level."""
    return dataclasses.replace(
        config, channels=channels, z_channels=2 * channels, codebook_size=codes
    )


def fixed(task: Task) -> Task:
    """The same task with its first batch at every step. The flag in a tokenizer's batch, whether to
    quantise, still follows the step.
    """
    first = task.read(0)
    if task.name == "tokenizer":
        return task._replace(read=lambda step: (first[0], task.read(step)[1]))
    return task._replace(read=lambda step: first)


def runs(bundle: Bundle, size: Size, work: Path) -> dict[str, Callable[[], figures.Curve]]:
    """Every objective, as a function that trains it under `work`, or resumes, and returns its loss
    by step.
    """
    coarse = small(bundle, size.layers, size.width)
    fine = with_small_grid(coarse)
    options = dataclasses.replace(MUON, num_steps=size.steps, batch_size=size.samples)
    scenes = max(size.samples, 32)

    def coarse_records() -> Path:
        return prepared.tokens(work / "records", coarse, Scenes(scenes), fine=False)

    def fine_records() -> Path:
        return prepared.tokens(work / "fine_records", fine, Scenes(scenes))

    def transformer(name: str, make: Callable[[], Task]) -> Callable[[], figures.Curve]:
        return lambda: figures.train(fixed(make()), options, work / figures.slug(name))

    def tokenizer() -> figures.Curve:
        longer = dataclasses.replace(options, num_steps=size.tokenizer_steps)
        pictures = prepared.pictures(work / "pictures", Scenes(scenes))
        config = small_tokenizer(bundle.tokenizer_config, size.channels, size.codes)
        own = TokenizerOptions(side=SIDE, start="nothing")
        small = bundle._replace(tokenizer_config=config)
        task = tokenizer_task(small, pictures, longer, own)
        return figures.train(fixed(task), longer, work / "tokenizer")

    def coglm(own: CogLMOptions) -> Callable[[], Task]:
        return lambda: coglm_task(coarse, coarse_records(), options, own)

    found = {"image tokenizer": tokenizer}
    found |= {name: transformer(name, coglm(mix)) for name, mix in MIXES.items()}
    found["direct SR"] = transformer(
        "direct SR",
        lambda: direct_sr_task(fine, fine_records(), options, DirectSROptions("nothing")),
    )
    found["iterative SR"] = transformer(
        "iterative SR",
        lambda: iterative_sr_task(fine, fine_records(), options, IterativeSROptions("nothing")),
    )
    return found
