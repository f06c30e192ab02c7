"""A bundle with the whole pipeline as methods: strings and pictures in and out."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cogview2_jax import config as configs
from cogview2_jax.bundle import Bundle
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline.prompts import PromptTokens, caption_text, image_keys, prompt_tokens
from cogview2_jax.pipeline.stages import (
    caption_score,
    decode_caption,
    decode_image,
    decode_infilling,
    super_resolve_direct,
    super_resolve_iterative,
)
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.pictures import Picture, fit_picture

Array = jax.Array
Box = tuple[float, float, float, float]

STRIDE = configs.TOKEN_STRIDE
STAGES = ("base", "direct", "full")
# Numbers of draws beyond any candidate's, so that no two stages share a key.
_DIRECT_DRAW, _ITERATIVE_DRAW = 2**32 - 1, 2**32 - 2


def coarse_mask(box: Box, grid: configs.Grid) -> np.ndarray:
    """The cells of `grid` whose centres lie in `box`, (top, left, bottom, right): bool [y, x].

    Raises ValueError for a box that is empty, leaves the picture or holds no centre.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"box must be (top, left, bottom, right) with 0 <= top < bottom <= 1"
            f" and 0 <= left < right <= 1: got {tuple(box)}"
        )
    rows, columns = ((np.arange(side) + 0.5) / side for side in grid)
    inside_rows = (rows >= top) & (rows < bottom)
    mask = inside_rows[:, None] & ((columns >= left) & (columns < right))
    if not mask.any():
        raise ValueError(f"box must hold the centre of a cell of the {grid} grid: got {tuple(box)}")
    return mask


@dataclass(frozen=True)
class CogView:
    """A bundle with the whole pipeline as methods; see `cogview2_jax.load`.

    Prompts may be English or Chinese. Pictures are uint8 [y, x, 3]. The same key gives the same
    pictures. The first call of a kind compiles, later ones of the same `num_images` do not. A
    wrong argument raises ValueError in one line.
    """

    bundle: Bundle
    execution: Execution = Execution()

    def generate(
        self,
        prompt: str,
        num_images: int = 4,
        *,
        key: Array,
        stage: str = "full",
        candidates: int | None = None,
    ) -> np.ndarray:
        """Pictures of a prompt: uint8 [num_images, y, x, 3], 192×192 with the bundle that ships.

        `stage` is the last one to run: "base" (its small picture enlarged), "direct" or "full".
        Each picture is the best of `candidates` drawn by the base stage, judged by `caption_score`
        (the paper's post-selection); None takes the number of the bundle's `sampling`.
        """
        made = self.generate_stages(
            [prompt], key=key, num_images=num_images, candidates=candidates, stages=(stage,)
        )
        return made[stage][0]

    def generate_stages(
        self,
        prompts: Sequence[str],
        key: Array,
        num_images: int = 4,
        *,
        candidates: int | None = None,
        stages: Sequence[str] = STAGES,
        progress: Callable[[str], None] = lambda part: None,
    ) -> dict[str, np.ndarray]:
        """Pictures after each of `stages`: stage → uint8 [prompts, num_images, y, x, 3], one batch.

        Those of "base" are enlarged bicubically to the size of the others. `progress` is called
        with "base", "direct", "iterative" and "pixels" as each is finished.
        """
        if not stages or not set(stages) <= set(STAGES):
            raise ValueError(f"stages must be of {', '.join(STAGES)}: got {', '.join(stages)}")
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1: got {num_images}")
        bundle = self.bundle
        tokens = self._tokens(prompts).repeat(num_images)
        keys = self._keys(prompts, key, num_images)

        def draw(candidate: int) -> Array:
            return decode_image(
                bundle.params("coglm"),
                *tokens.base,
                keys(candidate),
                bundle.cluster_labels,
                config=bundle.coglm_config,
                execution=self.execution,
                sampling=bundle.sampling,
                num_clusters=bundle.num_clusters,
            )

        grids = {"base": self._best_of(tokens, draw, candidates)}
        progress("base")
        if "direct" in stages or "full" in stages:
            grids["direct"] = self._direct(tokens, grids["base"], keys(_DIRECT_DRAW))
            progress("direct")
        if "full" in stages:
            everywhere = np.ones(grids["direct"].shape, bool)
            grids["full"] = self._iterative(
                tokens, grids["direct"], everywhere, keys(_ITERATIVE_DRAW)
            )
            progress("iterative")
        made = {stage: self._pictures(grids[stage], stage) for stage in stages}
        progress("pixels")
        shape = (len(prompts), num_images, *self._size, 3)
        return {stage: pictures.reshape(shape) for stage, pictures in made.items()}

    def infill(
        self,
        prompt: str,
        picture: Picture,
        box: Box,
        num_images: int = 1,
        *,
        key: Array,
        candidates: int | None = None,
    ) -> np.ndarray:
        """The picture with what is in `box` drawn anew: uint8 [num_images, y, x, 3].

        `box` is (top, left, bottom, right) in 0…1; whole coarse cells are replaced, those whose
        centre it holds. Only their fine cells are super-resolved, and the whole picture passes
        once through the tokenizer (the published editing, without its crop round the box).
        `candidates` is as in `generate`.
        """
        bundle, config = self.bundle, self.bundle.coglm_config
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1: got {num_images}")
        mask = coarse_mask(box, config.grid)
        tokens = self._tokens([prompt])
        ids, is_text = (array[0] for array in tokens.base)
        coarse = self._picture_tokens(picture, config.grid)[0]
        filling = inputs.infill(mask, ids[is_text].tolist(), coarse, config)
        ratio = bundle.direct_config.ratio
        may_change = mask.repeat(ratio, axis=0).repeat(ratio, axis=1).reshape(-1)

        def of_each(array: np.ndarray) -> Any:
            return np.repeat(array[None], num_images, axis=0)

        tokens = tokens.repeat(num_images)
        keys = self._keys([prompt], key, num_images)

        def draw(candidate: int) -> Array:
            return decode_infilling(
                bundle.params("coglm"),
                # The first four fields are those of a layout.
                inputs.NetworkInput(*(of_each(array) for array in filling[:4])),
                of_each(filling.slot_of_cell),
                keys(candidate),
                bundle.cluster_labels,
                config=config,
                execution=self.execution,
                sampling=bundle.sampling,
                num_clusters=bundle.num_clusters,
            )

        filled = self._best_of(tokens, draw, candidates)
        drawn = self._direct(tokens, filled, keys(_DIRECT_DRAW))
        kept = self._picture_tokens(picture, bundle.direct_config.grid)
        start = np.where(may_change, drawn, kept)
        full = self._iterative(tokens, start, of_each(may_change), keys(_ITERATIVE_DRAW))
        return self._pictures(full, "full")

    def caption(
        self,
        picture: Picture,
        *,
        language: str = "en",
        key: Array | None = None,
        top_k: int = 10,
        temperature: float = 1.0,
    ) -> str:
        """A caption of a picture, in English ("en") or Chinese ("zh").

        The most probable word each time, or, with a `key`, one of the `top_k` most probable.
        """
        if language not in ("en", "zh"):
            raise ValueError(f"language must be en or zh: got {language}")
        config = self.bundle.coglm_config
        ids = decode_caption(
            self.bundle.params("coglm"),
            self._picture_tokens(picture, config.grid),
            np.array([language == "en"]),
            jax.random.key(0)[None] if key is None else key[None],
            config=config,
            execution=self.execution,
            top_k=1 if key is None else top_k,
            temperature=temperature,
        )
        return caption_text(np.asarray(ids)[0], self.bundle.text_model, config.vocabulary)

    def rank(self, prompt: str, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """How well each picture fits the prompt, by its likelihood as a caption of it.

        Returns the pictures' numbers, best first, int [n], and their scores in the order given,
        float32 [n].
        """
        if not len(pictures):
            raise ValueError("pictures must have at least one: got none")
        grid = self.bundle.coglm_config.grid
        coarse = np.concatenate([self._picture_tokens(picture, grid) for picture in pictures])
        scores = self._scores(self._tokens([prompt]).repeat(len(coarse)), coarse)
        return np.argsort(-scores, kind="stable"), scores

    # Parts of the above, host arrays in and out.

    @property
    def _size(self) -> tuple[int, int]:
        rows, columns = self.bundle.direct_config.grid
        return rows * STRIDE, columns * STRIDE

    def _tokens(self, prompts: Sequence[str]) -> PromptTokens:
        bundle = self.bundle
        return prompt_tokens(
            prompts,
            bundle.text_model,
            bundle.coglm_config,
            bundle.direct_config.text_slots,
            bundle.iterative_config.text_slots,
        )

    def _keys(self, prompts: Sequence[str], key: Array, num_images: int) -> Callable[[int], Array]:
        hashes = np.array([zlib.crc32(prompt.encode()) for prompt in prompts], np.uint32)
        return lambda draw: image_keys(key, hashes, num_images, np.uint32(draw))

    def _best_of(
        self, tokens: PromptTokens, draw: Callable[[int], Array], candidates: int | None
    ) -> np.ndarray:
        """Base tokens, int32 [b, cells]: of what `draw(candidate)` makes, each image's best."""
        if candidates is None:
            candidates = self.bundle.sampling.candidates
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1: got {candidates}")
        drawn = [draw(candidate) for candidate in range(candidates)]
        if candidates == 1:
            return np.asarray(drawn[0])
        best = np.argmax([self._scores(tokens, np.asarray(coarse)) for coarse in drawn], axis=0)
        return np.stack(drawn)[best, np.arange(len(best))]

    def _scores(self, tokens: PromptTokens, coarse: np.ndarray) -> np.ndarray:
        scores = caption_score(
            self.bundle.params("coglm"),
            coarse,
            *tokens.base,
            tokens.english,
            config=self.bundle.coglm_config,
            execution=self.execution,
        )
        return np.asarray(scores)

    def _direct(self, tokens: PromptTokens, coarse: np.ndarray, keys: Array) -> np.ndarray:
        bundle = self.bundle
        fine = super_resolve_direct(
            bundle.params("direct"),
            *tokens.direct,
            coarse,
            keys,
            bundle.cluster_labels,
            config=bundle.direct_config,
            execution=self.execution,
            sampling=bundle.sampling,
            num_clusters=bundle.num_clusters,
        )
        return np.asarray(fine)

    def _iterative(
        self, tokens: PromptTokens, fine: np.ndarray, may_change: np.ndarray, keys: Array
    ) -> np.ndarray:
        refined = super_resolve_iterative(
            self.bundle.params("iterative"),
            *tokens.iterative,
            fine,
            may_change,
            keys,
            config=self.bundle.iterative_config,
            execution=self.execution,
            sampling=self.bundle.sampling,
        )
        return np.asarray(refined)

    def _pictures(self, ids: np.ndarray, stage: str) -> np.ndarray:
        config = self.bundle.coglm_config if stage == "base" else self.bundle.direct_config
        pictures = image_tokenizer.to_pixels(
            self.bundle.params("tokenizer"),
            ids,
            grid=config.grid,
            stride=STRIDE,
            config=self.bundle.tokenizer_config,
        )
        return np.stack([fit_picture(picture, *self._size) for picture in np.asarray(pictures)])

    def _picture_tokens(self, picture: Picture, grid: configs.Grid) -> np.ndarray:
        pixels = fit_picture(picture, grid[0] * STRIDE, grid[1] * STRIDE)
        ids = image_tokenizer.to_tokens(
            self.bundle.params("tokenizer"),
            pixels[None],
            stride=STRIDE,
            config=self.bundle.tokenizer_config,
        )
        return np.asarray(ids)
