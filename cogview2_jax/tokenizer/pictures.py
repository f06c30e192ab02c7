"""Pictures as they come in: opened, turned upright, cropped and resized."""

import numpy as np
from PIL import Image

Picture = np.ndarray | Image.Image


def fit_picture(picture: Picture, height: int, width: int) -> np.ndarray:
    """A picture as uint8 [height, width, 3]: resized to cover that, then cropped at the centre.

    Shrinking averages areas, as Scenes pictures are shrunk; enlarging is bicubic. Raises ValueError
    for an array that is not uint8 [y, x, 3].
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(
                f"picture must be uint8 [y, x, 3]: got {picture.dtype} {picture.shape}"
            )
        picture = Image.fromarray(picture)
    picture = picture.convert("RGB")
    scale = max(height / picture.height, width / picture.width)
    size = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    if size != picture.size:
        way = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        picture = picture.resize(size, way)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))
