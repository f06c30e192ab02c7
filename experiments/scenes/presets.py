"""The Scenes sizes: the published networks, small enough to train from zero on two CPU cores."""

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

TOKENIZER = HVQVAEConfig(
    channels=32,
    encoder_blocks=1,
    # The decoder in use is that of stride 8; the other two are kept narrower.
    decoder_multipliers=((1, 1, 1, 2, 2), (1, 1, 2, 4), (1, 2, 2)),
    groups=8,
    z_channels=64,
    codebook_size=1024,
    codebook_dim=32,
)

NUM_CLUSTERS = 64
COARSE_STRIDE = FINE_STRIDE = 8
COARSE_PIXELS, FINE_PIXELS = 64, 192


def coglm_config(vocabulary: Vocabulary) -> CogLMConfig:
    return CogLMConfig(
        TransformerConfig(num_layers=6, hidden_size=256, num_heads=8),
        vocabulary,
        grid=(8, 8),
        max_text=22,
        num_positions=96,
        image_position=32,
    )


def direct_sr_config(vocabulary: Vocabulary) -> DirectSRConfig:
    return DirectSRConfig(coglm_config(vocabulary), ratio=3, text_slots=22)


def iterative_sr_config(vocabulary: Vocabulary) -> IterativeSRConfig:
    # Four layers: its task is local, and the bundle stays below 40 MB.
    return IterativeSRConfig(
        TransformerConfig(num_layers=4, hidden_size=256, num_heads=8),
        vocabulary,
        grid=(24, 24),
        text_slots=22,
        num_positions=32,
    )


SAMPLING = Sampling(
    base=ClusterSampling(temperature=1.0, top_clusters=2, within_temperature=1.0),
    direct=ClusterSampling(temperature=0.3, top_clusters=4, within_temperature=0.3),
    iterative_temperature=0.2,
    iterative_top_k=(20, 20, 20, 10, 10, 5),
    text_upweight=0.0,
    candidates=4,
    edit_candidates=8,
)
