"""Illustrations: open pictures of things in five styles, with English and Chinese names.

`gather` collects them from packages of the npm registry into a folder; `read_index` reads what the
folder holds, and `captions` names a picture in either language. The pictures are those of Fluent
Emoji (MIT), Noto Emoji (Apache 2.0) and Twemoji (CC BY 4.0), the names those of Unicode's CLDR.
"""

from cogview2_jax.data.illustrations.captions import (
    RELATIONS,
    STYLE_WORDS,
    captions,
    every_caption,
    frame_captions,
    single_captions,
)
from cogview2_jax.data.illustrations.frames import Frame, compose, draw_frame
from cogview2_jax.data.illustrations.index import PICTURES, SPLITS, Item, read_index
from cogview2_jax.data.illustrations.packages import STYLES

__all__ = [
    "PICTURES",
    "RELATIONS",
    "SPLITS",
    "STYLES",
    "STYLE_WORDS",
    "Frame",
    "Item",
    "captions",
    "compose",
    "draw_frame",
    "every_caption",
    "frame_captions",
    "read_index",
    "single_captions",
]
