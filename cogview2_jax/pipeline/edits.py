"""Pictures redrawn in part, as methods of a bundle."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from cogview2_jax.checks import check_count
from cogview2_jax.config import TOKEN_STRIDE, Grid
from cogview2_jax.keys import key_batch
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import editing, patch_completion, settings
from cogview2_jax.pipeline.editing import Box
from cogview2_jax.pipeline.parts import VARIED_DRAW, Parts
from cogview2_jax.pipeline.prompts import caption_text
from cogview2_jax.pipeline.reach import last_stage, require_stage, what_is_missing
from cogview2_jax.styles import PLAIN, Style, find_style, in_style
from cogview2_jax.tokenizer.pictures import Picture, fit_picture, open_picture

Array = jax.Array

STAGES = tuple(settings.STAGES)


class Edits(Parts):
    """Infilling, editing, variations and continued pictures; see `cogview.CogView`."""

    def infill(
        self,
        prompt: str,
        picture: Picture,
        box: Box,
        num_images: int = settings.NUM_INFILLED,
        *,
        key: Array,
        stage: str | None = None,
        candidates: int | None = None,
    ) -> np.ndarray:
        """The picture with its `box` redrawn, at its own size: uint8 [num_images, y, x, 3].

        `box` is (top, left, bottom, right) in 0…1 of the whole picture, upright. The model sees a
        crop around the box, with the aspect ratio of its own pictures and as large as the picture
        allows; pixels outside the crop do not change (see `editing`). The coarse cells with their
        centre in the box are redrawn, and only their fine cells are super-resolved. `stage` and
        `candidates` are as in `edit`.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        opened = open_picture(picture)
        edit = editing.plan(box, (opened.height, opened.width), self.bundle.direct_config)
        tokens, keys = self._drawing([prompt], key, num_images)
        crop = editing.cut(opened, edit)
        filling = inputs.infill(edit.mask, *self._known(tokens, crop), self.bundle.coglm_config)
        ratio = self.bundle.direct_config.ratio
        fine = edit.mask.repeat(ratio, axis=0).repeat(ratio, axis=1)
        made = self._redraw(tokens, tokens, [filling], crop, fine[None], keys, stage, candidates)
        return editing.paste(opened, made[:num_images], edit)

    def edit(
        self,
        prompt: str,
        picture: Picture,
        *,
        key: Array,
        box: Box | None = None,
        mask: Picture | None = None,
        num_images: int = settings.NUM_EDITED,
        stage: str | None = None,
        candidates: int | None = None,
        style: str = PLAIN,
    ) -> np.ndarray:
        """The picture with a part redrawn as published: uint8 [num_images, y, x, 3], at its size.

        The part is a `box`, as in `infill`, or the white pixels of a `mask` of the picture's size
        (`patch_completion.picture_mask`). The model sees a square of 20/14 of the part's longer
        side, as far as the picture allows, and only the pixels of redrawn cells change. A crop no
        larger than the base model's pictures is drawn by the base stage alone. `prompt` may have
        one token less than in `generate`. `stage` and `style` are as in `generate`, but "none" is
        the default style, as published. The base stage draws the part `candidates` times and keeps
        the best (None: `Sampling.candidates_of(edits=True)`). Raises as
        `patch_completion.plan_mask` for a part that is too thin or too long.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        opened = open_picture(picture)
        patch = patch_completion.plan_part(
            box, mask, (opened.height, opened.width), self.bundle.direct_config
        )
        found = find_style(self.bundle.styles, style)
        return self._complete(prompt, opened, patch, num_images, key, stage, candidates, found)

    def outpaint(
        self,
        prompt: str,
        picture: Picture,
        *,
        key: Array,
        top: float = 0.0,
        left: float = 0.0,
        bottom: float = 0.0,
        right: float = 0.0,
        num_images: int = settings.NUM_EDITED,
        stage: str | None = None,
        candidates: int | None = None,
    ) -> np.ndarray:
        """The picture continued beyond its border: uint8 [num_images, y, x, 3], larger than it.

        `top`, `left`, `bottom` and `right` say by how much, as parts of the picture's height and
        width, 0 to 1. What is new is drawn as `edit` does, after a text of the whole larger
        picture; the cells across the border are redrawn too, all other pixels stay bit-equal.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        opened = open_picture(picture)
        canvas, mask = patch_completion.larger_canvas(opened, (top, left, bottom, right))
        patch = patch_completion.plan_mask(mask, self.bundle.direct_config, touched=True)
        return self._complete(prompt, canvas, patch, num_images, key, stage, candidates)

    def vary(
        self,
        picture: Picture,
        prompt: str | None = None,
        *,
        key: Array,
        keep: float = settings.KEPT,
        num_images: int = settings.NUM_EDITED,
        stage: str | None = None,
        candidates: int | None = None,
    ) -> np.ndarray:
        """New versions of a picture: uint8 [num_images, y, x, 3], of the model's size.

        Each redraws another random rectangle as `edit` does, and keeps a share `keep` of the coarse
        cells (0 to below 1) with their fine ones. A picture of another shape is cropped in the
        middle. `prompt` describes it; None takes its English `caption`.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        if not 0 <= keep < 1:
            raise ValueError(f"keep must be at least 0 and less than 1: got {keep}")
        crop = fit_picture(open_picture(picture), *self._size)
        if prompt is None:
            prompt = self._short_caption(crop)
        tokens, keys = self._drawing([prompt], key, num_images)
        read = self._tokens_of_images([prompt], num_images, start_token=True)
        config = self.bundle.coglm_config
        known = self._known(tokens, crop)
        masks = _rectangles(keys(VARIED_DRAW), config.grid, keep)
        fillings = [patch_completion.sequence(mask, *known, config) for mask in masks]
        ratio = self.bundle.direct_config.ratio
        fine = masks.repeat(ratio, axis=1).repeat(ratio, axis=2)
        made = self._redraw(tokens, read, fillings, crop, fine, keys, stage, candidates)
        return self._enlarged(made[:num_images])

    def _complete(
        self,
        prompt: str,
        picture: Image.Image,
        patch: patch_completion.Patch,
        num_images: int,
        key: Array,
        stage: str,
        candidates: int | None,
        style: Style | None = None,
    ) -> np.ndarray:
        """The picture with the cells of `patch` redrawn: uint8 [num_images, y, x, 3].

        Super-resolution reads the prompt with its `<start_of_image>`.
        """
        styled = in_style(style, prompt)
        tokens, keys = self._drawing([styled], key, num_images)
        scored = tokens if style is None else self._tokens_of_images([prompt], num_images)
        read = self._tokens_of_images([styled], num_images, start_token=True)
        config = self.bundle.coglm_config
        top, left, bottom, right = patch.crop
        if bottom - top <= config.grid[0] * TOKEN_STRIDE:
            stage = STAGES[0]
        cells = patch.coarse if stage == STAGES[0] else patch.fine
        part = editing.Edit(top, left, bottom - top, right - left, cells)
        crop = editing.cut(picture, part)
        filling = patch_completion.sequence(patch.coarse, *self._known(tokens, crop), config)
        made = self._redraw(
            scored, read, [filling], crop, patch.fine[None], keys, stage, candidates, style
        )
        return editing.paste(picture, made[:num_images], part, cells_only=True)

    def _short_caption(self, crop: np.ndarray) -> str:
        """An English caption that leaves room for a `<start_of_image>`."""
        (said,) = self.token_captions([self.picture_tokens(crop)])
        vocabulary, most = self.bundle.coglm_config.vocabulary, self.bundle.coglm_config.max_text
        ids, is_text = (np.asarray(array)[0] for array in self._tokens([said]).base)
        return caption_text(ids[is_text][: most - 1], self.bundle.text_model, vocabulary)

    def _enlarged(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        return np.stack([fit_picture(picture, *self._size) for picture in pictures])

    def _last_stage(self, asked: str | None) -> str:
        if asked is not None:
            require_stage(asked, self.networks)
            return asked
        last = last_stage(self.networks)
        if last != STAGES[-1]:
            warnings.warn(what_is_missing(STAGES[-1], self.networks), stacklevel=3)
        return last


def _rectangles(keys: Array, grid: Grid, keep: float) -> np.ndarray:
    """For each key a rectangle of random shape and place with a share 1 − `keep` of the cells, as
    nearly as whole rows and columns allow: bool [b, y, x].
    """
    rows, columns = grid
    number = max(round((1 - keep) * rows * columns), 1)
    masks = np.zeros((len(keys), rows, columns), bool)
    for mask, data in zip(masks, jax.random.key_data(key_batch(keys)), strict=True):
        rng = np.random.default_rng(np.asarray(data))
        height = int(rng.integers(-(-number // columns), min(rows, number) + 1))
        width = min(round(number / height), columns)
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        mask[top : top + height, left : left + width] = True
    return masks
