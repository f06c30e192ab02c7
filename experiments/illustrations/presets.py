"""The sizes of the illustrations bundle: small enough for 40 MB in half precision."""

from cogview2_jax.config import (
    ClusterSampling,
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Sampling,
    TransformerConfig,
    Vocabulary,
)

# One stride, that of the pipeline: the room is better spent on its decoder.
TOKENIZER = HVQVAEConfig(
    channels=40,
    encoder_multipliers=(1, 1, 2, 4),
    encoder_blocks=1,
    decoder_multipliers=((1, 1, 2, 4),),
    groups=8,
    z_channels=64,
    codebook_size=1024,
    codebook_dim=32,
)

NUM_CLUSTERS = 64
STRIDE = 8
COARSE_PIXELS, FINE_PIXELS = 64, 192
MAX_TEXT = 24


def coglm_config(vocabulary: Vocabulary) -> CogLMConfig:
    return CogLMConfig(
        TransformerConfig(num_layers=6, hidden_size=256, num_heads=8),
        vocabulary,
        grid=(COARSE_PIXELS // STRIDE, COARSE_PIXELS // STRIDE),
        max_text=MAX_TEXT,
        num_positions=96,
        image_position=32,
    )


def direct_sr_config(vocabulary: Vocabulary) -> DirectSRConfig:
    return DirectSRConfig(coglm_config(vocabulary), ratio=3, text_slots=MAX_TEXT)


def iterative_sr_config(vocabulary: Vocabulary) -> IterativeSRConfig:
    # Three layers: its task is local, and the bundle stays below 40 MB.
    return IterativeSRConfig(
        TransformerConfig(num_layers=3, hidden_size=256, num_heads=8),
        vocabulary,
        grid=(FINE_PIXELS // STRIDE, FINE_PIXELS // STRIDE),
        text_slots=MAX_TEXT,
        num_positions=32,
    )


SAMPLING = Sampling(
    base=ClusterSampling(temperature=0.7, top_clusters=8, within_temperature=0.7),
    direct=ClusterSampling(temperature=0.3, top_clusters=4, within_temperature=0.3),
    iterative_temperature=0.2,
    iterative_top_k=(20, 20, 20, 10, 10, 5),
    text_upweight=0.0,
    candidates=4,
)
