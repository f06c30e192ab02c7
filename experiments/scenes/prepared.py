"""Prepared folders of Scenes, as `cogview2 data prepare scenes` makes them."""

from pathlib import Path

from tqdm import tqdm

from cogview2_jax.bundle import Bundle
from cogview2_jax.data import prepare, scenes
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.data.sources import Source
from experiments.scenes.presets import COARSE_STRIDE


def tokens(
    folder: Path, bundle: Bundle, source: Source, *, fine: bool = True, workers: int = 1
) -> Path:
    """Records with the base model's grid and, if `fine`, that of super-resolution (64 and 192
    pixels with the Scenes sizes), one for each language: those of scene n are 2n and 2n + 1.
    """
    more = (bundle.direct_config.grid[0] * COARSE_STRIDE,) if fine else ()
    with tqdm(total=len(source), desc=folder.name) as bar:
        report = prepare.prepare_tokens(
            source,
            folder,
            RecordLayout.of(bundle.coglm_config, COARSE_STRIDE, *more),
            bundle.text_model,
            bundle.tokenizer,
            bundle.tokenizer_config,
            batch_size=16 if fine else 64,
            apart=True,
            workers=workers,
            progress=bar.update,
        )
    if report.records != len(scenes.LANGUAGES) * len(source):
        raise ValueError(f"{folder} has {report.records} records of {len(source)} scenes")
    return folder


def pictures(folder: Path, source: Source) -> Path:
    """The scenes themselves, 192 pixels a side."""
    with tqdm(total=len(source), desc=folder.name) as bar:
        prepare.prepare_pictures(source, folder, progress=bar.update)
    return folder
