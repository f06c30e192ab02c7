"""Folders of small pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_pictures(folder: Path, count: int, seed: int = 0, side: int = 16) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png", compress_level=1)
    return folder


@pytest.fixture(scope="session")
def some(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("some") / "pictures", 250)
