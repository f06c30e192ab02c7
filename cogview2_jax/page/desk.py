"""What the page does for its visitors, one after another, over one model. Knows no web server."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from cogview2_jax.page.limits import Limits, Refused
from cogview2_jax.page.parts import drawn_part
from cogview2_jax.pipeline import making, reach
from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.styles import PLAIN
from cogview2_jax.tokenizer.pictures import PictureError, open_picture

MOST_SEED = 2**32 - 1


class Desk:
    """A model and the limits of what is asked of it.

    Every method checks its arguments and raises Refused. One step of the model runs at a time; a
    visitor who is cancelled ends after the step that is running.
    """

    def __init__(self, cv: CogView, limits: Limits = Limits()) -> None:
        self.cv, self.limits = cv, limits
        self.stage = reach.last_stage(cv.networks)
        self.rounds = cv.bundle.iterative_config.rounds
        self._turn = threading.Lock()

    def text(self, said: str | None) -> str:
        text, most = (said or "").strip(), self.limits.characters
        if not text:
            raise Refused("no_text")
        if len(text) > most:
            raise Refused("long_text", length=len(text), most=most)
        return text

    def picture(self, file: str | os.PathLike[str] | None) -> Image.Image:
        """An uploaded file, opened as every picture is, if it is small enough."""
        if not file:
            raise Refused("no_picture")
        try:
            if (size := os.path.getsize(file)) > (most := self.limits.file_bytes):
                raise Refused("large_file", size=size / 2**20, most=most / 2**20)
            return open_picture(Path(file).read_bytes(), most_pixels=self.limits.pixels)
        except PictureError as error:
            raise Refused("bad_picture", reason=error.reason) from error
        except OSError as error:
            raise Refused("no_picture") from error

    def styles(self) -> list[str]:
        """The names of the model's styles, the default first."""
        return [*(style.name for style in self.cv.bundle.styles), PLAIN]

    def generate(
        self, prompt: str | None, seed: Any, images: Any, candidates: Any, style: Any = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """As `CogView.watch`, with "confidence": the step, and uint8 [images, y, x, 3]."""
        text, limits = self.text(prompt), self.limits
        steps = self.cv.watch(
            text,
            whole(images, "images", 1, limits.images),
            key=_key(seed),
            stage=self.stage,
            candidates=whole(candidates, "candidates", 1, limits.candidates),
            style=style,
            confidence=True,
        )
        while True:
            with self._turn, _refusing():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def animations(self, steps: Sequence[tuple[str, np.ndarray]]) -> list[bytes]:
        """How each picture of these steps of `generate` came to be, as animated WebP."""
        return making.animations(steps, self.cv.bundle.coglm_config.grid)

    def edit(
        self,
        prompt: str | None,
        file: str | None,
        marks: str | None,
        numbers: str | None,
        seed: Any,
        images: Any,
    ) -> tuple[Image.Image, np.ndarray]:
        """The picture before, and after: uint8 [images, y, x, 3]."""
        text, opened = self.text(prompt), self.picture(file)
        part = drawn_part(marks, numbers or "", (opened.height, opened.width), self.limits)
        count = whole(images, "images", 1, self.limits.images)
        # Large pictures in fewer versions: all are in memory at once.
        count = min(count, max(2 * self.limits.pixels // (opened.width * opened.height), 1))
        with self._turn, _refusing():
            made = self.cv.edit(
                text, opened, **part, key=_key(seed), num_images=count, stage=self.stage
            )
        return opened, made

    def caption(self, file: str | None, language: str) -> str:
        opened = self.picture(file)
        with self._turn, _refusing():
            return self.cv.caption(opened, language=language)

    def best(self, prompt: str | None, files: Sequence[str]) -> list[tuple[int, float]]:
        """The pictures' numbers and scores, best first."""
        if not files:
            raise Refused("no_pictures")
        text, opened = self.text(prompt), [self.picture(file) for file in files]
        with self._turn, _refusing():
            order, scores = self.cv.rank(text, opened)
        return [(int(number), float(scores[number])) for number in order]


class _refusing:
    """Turns the model's own refusals (one line each) into Refused."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise Refused("refused", reason=str(error)) from error


def whole(number: Any, what: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    try:
        value = int(number)
        good = value == float(number) and low <= value <= high
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise Refused("range", what=what, low=low, high=high)
    return value


def _key(seed: Any) -> jax.Array:
    return jax.random.key(whole(seed, "seed", 0, MOST_SEED))
