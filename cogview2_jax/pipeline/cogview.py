"""A bundle with the whole pipeline as methods: strings and pictures in and out."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from cogview2_jax import bundle as bundles
from cogview2_jax.checks import check_count, check_temperature
from cogview2_jax.config import TOKEN_STRIDE
from cogview2_jax.keys import one_key
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import editing, patch_completion, settings
from cogview2_jax.pipeline.editing import Box
from cogview2_jax.pipeline.parts import DIRECT_DRAW, ITERATIVE_DRAW, Parts
from cogview2_jax.pipeline.prompts import caption_ids, caption_text
from cogview2_jax.pipeline.reach import last_stage, require_stage, what_is_missing
from cogview2_jax.pipeline.stages import decode_caption, decode_image
from cogview2_jax.tokenizer.pictures import Picture, fit_picture, open_picture

Array = jax.Array

STAGES = tuple(settings.STAGES)


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
        stages: Sequence[str] = STAGES,
        progress: Callable[[str], None] = lambda part: None,
    ) -> dict[str, np.ndarray]:
        """Pictures after each of `stages`: stage → uint8 [prompts, num_images, y, x, 3], one batch.

        Those of "base" are enlarged bicubically to the size of the others. `progress` is called
        with "base", "direct", "iterative" and "pixels" as each is finished.
        """
        if not stages:
            raise ValueError(f"stages must be of {', '.join(STAGES)}: got none")
        for stage in stages:
            require_stage(stage, self.networks)
        num_images = check_count("num_images", num_images)
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

        grids = {"base": self._best_of(tokens, draw, keys, candidates)}
        progress("base")
        if "direct" in stages or "full" in stages:
            grids["direct"] = self._direct(tokens, grids["base"], keys(DIRECT_DRAW))
            progress("direct")
        if "full" in stages:
            everywhere = np.ones(grids["direct"].shape, bool)
            grids["full"] = self._iterative(
                tokens, grids["direct"], everywhere, keys(ITERATIVE_DRAW)
            )
            progress("iterative")
        made = {stage: self._pixels(grids[stage], stage) for stage in stages}
        progress("pixels")
        count = len(prompts) * num_images
        return {
            stage: np.stack(
                [fit_picture(picture, *self._size) for picture in pictures[:count]]
            ).reshape(len(prompts), num_images, *self._size, 3)
            for stage, pictures in made.items()
        }

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
        config = self.bundle.coglm_config
        top_k = check_count("top_k", top_k)
        temperature = check_temperature("temperature", temperature)
        if top_k > (most := config.vocabulary.num_text):
            raise ValueError(
                f"top_k must be at most {most}, the text pieces there are: got {top_k}"
            )
        allowed = caption_ids(self.bundle.text_model, config.vocabulary, language)
        keys = (jax.random.key(0) if key is None else one_key(key))[None]
        image, english, keys = self._whole_batch(
            (self._picture_tokens(picture, config.grid), np.array([language == "en"]), keys)
        )
        ids = decode_caption(
            self._decoding_params,
            image,
            english,
            allowed,
            keys,
            config=config,
            execution=self.execution,
            top_k=1 if key is None else top_k,
            temperature=temperature,
        )
        return caption_text(np.asarray(ids)[0], self.bundle.text_model, config.vocabulary)

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
