"""A bundle with the whole pipeline as methods: strings and pictures in and out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cogview2_jax import bundle as bundles
from cogview2_jax.checks import check_count
from cogview2_jax.config import TOKEN_STRIDE
from cogview2_jax.keys import one_key
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import editing, patch_completion, settings
from cogview2_jax.pipeline.editing import Box
from cogview2_jax.pipeline.parts import DIRECT_DRAW, ITERATIVE_DRAW, Parts
from cogview2_jax.pipeline.reach import last_stage, require_stage, what_is_missing
from cogview2_jax.pipeline.stages import decode_image
from cogview2_jax.tokenizer.pictures import Picture, fit_picture, open_picture

Array = jax.Array

STAGES = tuple(settings.STAGES)
# The stage whose tokens a step of `_steps` yields.
_STAGE_OF = {"candidate": "base", "base": "base", "direct": "direct"}
_STAGE_OF |= {"iterative": "full", "round": "full"}


@dataclass(frozen=True)
class CogView(Parts):
    """A bundle with the whole pipeline as methods; made by `cogview2_jax.load`.

    Prompts may be English or Chinese. Pictures come in as `open_picture` takes them (paths, bytes,
    PIL images, uint8 arrays) and go out as uint8 [y, x, 3]. The same key, made by `jax.random.key`
    or the older `jax.random.PRNGKey`, gives the same pictures. The first call of a method compiles,
    later ones with the same `num_images` do not. A wrong argument raises ValueError in one line.

    `execution` is the precision of the transformers, and the mesh over which batches and parameters
    are sharded. Images do not depend on it, except for rounding. The parameters in `bundle` are
    placed accordingly.
    """

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that the bundle has, in the order of training."""
        return tuple(name for name in bundles.NETWORKS if getattr(self.bundle, name))

    def generate(
        self,
        prompt: str,
        num_images: int = settings.NUM_IMAGES,
        *,
        key: Array,
        stage: str | None = None,
        candidates: int | None = None,
    ) -> np.ndarray:
        """Pictures of a prompt: uint8 [num_images, y, x, 3], 192×192 with the bundle that ships.

        `stage` is the last one to run: "base" (its small picture enlarged), "direct" or "full". The
        default is the last one that the model has networks for, with a warning when that is not
        "full". The base stage draws each picture `candidates` times (None: as often as the bundle's
        `sampling` says) and keeps the one with the best `caption_score` (the paper's
        post-selection).
        """
        stage = self._last_stage(stage)
        made = self.generate_stages(
            [prompt], key=key, num_images=num_images, candidates=candidates, stages=(stage,)
        )
        return made[stage][0]

    def generate_stages(
        self,
        prompts: Sequence[str],
        key: Array,
        num_images: int = settings.NUM_IMAGES,
        *,
        candidates: int | None = None,
        keep_best: bool = False,
        stages: Sequence[str] = STAGES,
        progress: Callable[[str], None] = lambda part: None,
    ) -> dict[str, np.ndarray]:
        """Pictures after each of `stages`: stage → uint8 [prompts, num_images, y, x, 3], one batch.

        Those of "base" are enlarged bicubically to the size of the others. `progress` is called
        with "base", "direct", "iterative" and "pixels" as each is finished.

        With `keep_best`, `candidates` is how many base pictures a prompt gets in all; the
        `num_images` with the best `caption_score` are kept, best first.
        """
        if not stages:
            raise ValueError(f"stages must be of {', '.join(STAGES)}: got none")
        for stage in stages:
            require_stage(stage, self.networks)
        num_images = check_count("num_images", num_images)
        last = max(stages, key=STAGES.index)
        steps = self._steps(prompts, key, num_images, last, candidates, keep_best)
        grids = {}
        for part, grid in steps:
            if part != "candidate":
                grids[_STAGE_OF[part]] = grid
                progress(part)
        made = {stage: self._pixels(grids[stage], stage) for stage in stages}
        progress("pixels")
        count = len(prompts) * num_images
        return {
            stage: self._enlarged(pictures[:count]).reshape(
                len(prompts), num_images, *self._size, 3
            )
            for stage, pictures in made.items()
        }

    def watch(
        self,
        prompt: str,
        num_images: int = settings.NUM_IMAGES,
        *,
        key: Array,
        stage: str | None = None,
        candidates: int | None = None,
        keep_best: bool = False,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The pictures of `generate` as they come to be: each "candidate" of the base stage, the
        chosen ones ("base"), then after "direct" and after each "round".

        Yields the step and uint8 [num_images, y, x, 3]; the last ones are those of `generate`. What
        is not asked for is not computed, so that whoever stops in between cancels the rest.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        steps = self._steps(
            [prompt], key, num_images, stage, candidates, keep_best, each_round=True
        )
        for part, grid in steps:
            pictures = self._pixels(np.asarray(grid), _STAGE_OF[part])[:num_images]
            yield part, self._enlarged(pictures)

    def _enlarged(self, pictures: np.ndarray) -> np.ndarray:
        return np.stack([fit_picture(picture, *self._size) for picture in pictures])

    def _steps(
        self,
        prompts: Sequence[str],
        key: Array,
        num_images: int,
        last: str,
        candidates: int | None,
        keep_best: bool,
        each_round: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """Image tokens [b, cells] of each "candidate", and after "base", "direct" and "iterative",
        up to the stage `last`; with `each_round`, after each "round" in place of "iterative".
        """
        tokens, keys = self._drawing(prompts, key, num_images)

        # The images of a prompt share its prefill; on a mesh each device has its own images'.
        alone = self.execution.sharding is None
        read = tokens.take(np.arange(len(prompts)) * num_images) if alone else tokens

        def draw(keys: Array) -> Array:
            return decode_image(
                self._decoding_params,
                *read.base,
                keys,
                self.bundle.cluster_labels,
                config=self.bundle.coglm_config,
                **self._sampling,
            )

        coarse: list[np.ndarray] = []
        number = self._candidates(candidates, num_images if keep_best else None)
        for one in self._drawn(tokens, draw, keys, number, one_by_one=each_round):
            coarse.append(one)
            yield "candidate", one
        if keep_best:
            count = self.bundle.sampling.candidates if candidates is None else candidates
            count = max(count, num_images)
            base = self._best_of_all(tokens, coarse, count, len(prompts), num_images)
        else:
            base = self._best_of(tokens, coarse)
        yield "base", base
        if last == "base":
            return
        fine = self._direct(tokens, base, keys(DIRECT_DRAW))
        yield "direct", fine
        if last == "direct":
            return
        everywhere, drawn = np.ones(fine.shape, bool), keys(ITERATIVE_DRAW)
        if not each_round:
            yield "iterative", self._iterative(tokens, fine, everywhere, drawn)
            return
        for number in range(self.bundle.iterative_config.rounds):
            fine = self._iterative(tokens, fine, everywhere, drawn, (number, number + 1))
            yield "round", fine

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
        `candidates` are as in `generate`.
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
        made = self._redraw(tokens, tokens, filling, crop, fine, keys, stage, candidates)
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
    ) -> np.ndarray:
        """The picture with a part redrawn as published: uint8 [num_images, y, x, 3], at its size.

        The part is a `box`, as in `infill`, or the white pixels of a `mask` of the picture's size
        (`patch_completion.picture_mask`). The model sees a square of 20/14 of the part's longer
        side, as far as the picture allows, and only the pixels of redrawn cells change. A crop no
        larger than the base model's pictures is drawn by the base stage alone. `prompt` may have
        one token less than in `generate`. `stage` and `candidates` are as in `generate`. Raises as
        `patch_completion.plan_mask` for a part that is too thin or too long.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        opened = open_picture(picture)
        config = self.bundle.direct_config
        patch = patch_completion.plan_part(box, mask, (opened.height, opened.width), config)
        tokens, keys = self._drawing([prompt], key, num_images)
        read = self._whole_batch(self._tokens([prompt], start_token=True).repeat(num_images))
        top, left, bottom, right = patch.crop
        if bottom - top <= config.coglm.grid[0] * TOKEN_STRIDE:
            stage = STAGES[0]
        cells = patch.coarse if stage == STAGES[0] else patch.fine
        part = editing.Edit(top, left, bottom - top, right - left, cells)
        crop = editing.cut(opened, part)
        filling = patch_completion.sequence(
            patch.coarse, *self._known(tokens, crop), self.bundle.coglm_config
        )
        made = self._redraw(tokens, read, filling, crop, patch.fine, keys, stage, candidates)
        return editing.paste(opened, made[:num_images], part, cells_only=True)

    def caption(
        self,
        picture: Picture,
        *,
        language: str = settings.LANGUAGES[0],
        key: Array | None = None,
        top_k: int = settings.TOP_K,
        temperature: float = settings.TEMPERATURE,
    ) -> str:
        """A caption of a picture, in English ("en") or Chinese ("zh"), of at least one word.

        Greedy without a `key` and at `temperature` 0; otherwise each token is drawn from the
        `top_k` most probable. Only tokens of the language are taken.
        """
        (said,) = self.token_captions(
            [self.picture_tokens(picture)],
            language,
            keys=None if key is None else one_key(key)[None],
            top_k=top_k,
            temperature=temperature,
        )
        return said

    def captions(
        self, pictures: Sequence[Picture], *, language: str = settings.LANGUAGES[0]
    ) -> list[str]:
        """A caption of each picture, as `caption` without a key, several at a time.

        Up to rounding: where two tokens are as probable, a batch may take the other one.
        """
        images = [self.picture_tokens(picture) for picture in pictures]
        return self.token_captions(images, language)

    def rank(self, prompt: str, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """How well each picture fits the prompt: the likelihood of the prompt as its caption.

        Returns the pictures' numbers, best first, int [n], and their scores in the order given,
        float32 [n].
        """
        scores = self.scores([prompt], pictures)[0]
        return np.argsort(-scores, kind="stable"), scores

    def scores(self, texts: Sequence[str], pictures: Sequence[Picture]) -> np.ndarray:
        """The likelihood of each text as the caption of each picture: float32 [texts, pictures].

        A score is the mean log-likelihood of a text's tokens (`stages.caption_score`). Pairs run in
        batches of one size, so that one compilation serves any number of texts and pictures.
        """
        if not len(pictures):
            raise ValueError("pictures must have at least one: got none")
        return self.token_scores(texts, [self.picture_tokens(picture) for picture in pictures])

    def _last_stage(self, asked: str | None) -> str:
        if asked is not None:
            require_stage(asked, self.networks)
            return asked
        last = last_stage(self.networks)
        if last != STAGES[-1]:
            warnings.warn(what_is_missing(STAGES[-1], self.networks), stacklevel=3)
        return last
