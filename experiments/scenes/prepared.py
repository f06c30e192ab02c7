"""Small prepared folders of Scenes, as `cogview2 data prepare scenes` makes them."""

from pathlib import Path

from cogview2_jax.bundle import Bundle
from cogview2_jax.data import prepare, sources
from cogview2_jax.data.manifest import Layout
from experiments.scenes.presets import COARSE_STRIDE


def tokens(folder: Path, bundle: Bundle, scenes: int, *, fine: bool = True) -> Path:
    """Two token records a scene, English and Chinese, of the base model's grid and, if `fine`,
    that of super-resolution (64 and 192 pixels with the Scenes sizes).
    """
    more = (bundle.direct_config.grid[0] * COARSE_STRIDE,) if fine else ()
    layout = Layout.of(bundle.coglm_config, COARSE_STRIDE, *more)
    prepare.prepare_tokens(
        sources.Scenes(scenes),
        folder,
        layout,
        bundle.text_model,
        bundle.tokenizer,
        bundle.tokenizer_config,
        batch_size=16,
        apart=True,
    )
    return folder


def pictures(folder: Path, scenes: int) -> Path:
    """The scenes themselves, 192 pixels a side."""
    prepare.prepare_pictures(sources.Scenes(scenes), folder)
    return folder
