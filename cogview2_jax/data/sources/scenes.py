"""Scenes as a source of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogview2_jax.data.sources.inputs import Input


class Scenes:
    """The first `length` examples of a split of Scenes, drawn on demand."""

    def __init__(self, length: int, split: str = "train", fields: Sequence[str] = ()) -> None:
        from cogview2_jax.data import scenes

        known = scenes.LANGUAGES
        if split not in scenes.SPLITS:
            raise ValueError(f"split must be one of {', '.join(scenes.SPLITS)}: got {split}")
        if not set(fields) <= set(known):
            raise ValueError(f"captions of Scenes are {', '.join(known)}: got {', '.join(fields)}")
        self._length, self._split, self._fields = length, split, tuple(fields or known)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"source": f"scenes/{self._split}", "caption_fields": list(self._fields)}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        from cogview2_jax.data import scenes

        example = scenes.example(self._split, index)
        captions = {field: example.captions[field] for field in self._fields}
        return Input(f"scenes/{self._split}/{index}", example.image, (captions,))
