"""The sizes of the illustrations bundle, below 40 MB in half precision: those of Scenes, but for a
larger tokenizer, longer texts and one layer less in iterative super-resolution.
"""

import dataclasses

from cogview2_jax.config import (
    ClusterSampling,
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    Vocabulary,
)
from experiments.scenes import presets as scenes

COARSE_PIXELS, FINE_PIXELS = scenes.COARSE_PIXELS, scenes.FINE_PIXELS
NUM_CLUSTERS = scenes.NUM_CLUSTERS
STRIDE = scenes.COARSE_STRIDE
MAX_TEXT = 20
# What the bundle draws: a small set drawn well is worth more than a large one drawn badly.
KINDS = ("animals", "food")

# One stride, that of the pipeline: the room is better spent on its decoder.
TOKENIZER = dataclasses.replace(
    scenes.TOKENIZER,
    channels=40,
    encoder_multipliers=(1, 1, 2, 4),
    decoder_multipliers=((1, 1, 2, 4),),
)

SAMPLING = dataclasses.replace(
    scenes.SAMPLING,
    base=ClusterSampling(temperature=0.7, top_clusters=8, within_temperature=0.7),
)


def coglm_config(vocabulary: Vocabulary) -> CogLMConfig:
    return dataclasses.replace(scenes.coglm_config(vocabulary), max_text=MAX_TEXT)


def direct_sr_config(vocabulary: Vocabulary) -> DirectSRConfig:
    return DirectSRConfig(coglm_config(vocabulary), ratio=3, text_slots=MAX_TEXT)


def iterative_sr_config(vocabulary: Vocabulary) -> IterativeSRConfig:
    like = scenes.iterative_sr_config(vocabulary)
    # Three layers: its task is local, and the bundle stays below 40 MB.
    transformer = dataclasses.replace(like.transformer, num_layers=3)
    return dataclasses.replace(like, transformer=transformer, text_slots=MAX_TEXT)
