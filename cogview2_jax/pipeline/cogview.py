"""A bundle with the whole pipeline as methods: strings and pictures in and out."""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from cogview2_jax import bundle as bundles
from cogview2_jax.bundle import Bundle
from cogview2_jax.checks import check_count, check_temperature
from cogview2_jax.config import TOKEN_STRIDE, Grid
from cogview2_jax.keys import one_key
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.pipeline import editing, settings
from cogview2_jax.pipeline.editing import Box
from cogview2_jax.pipeline.prompts import (
    PromptTokens,
    caption_ids,
    caption_text,
    image_keys,
    prompt_tokens,
)
from cogview2_jax.pipeline.reach import last_stage, require_stage, what_is_missing
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
from cogview2_jax.tokenizer.pictures import Picture, fit_picture, open_picture

Array = jax.Array
_Tree = TypeVar("_Tree")

STAGES = tuple(settings.STAGES)
# Draw numbers above any candidate's, so that no two stages share a key.
_DIRECT_DRAW, _ITERATIVE_DRAW = 2**32 - 1, 2**32 - 2


@dataclass(frozen=True)
class CogView:
    """A bundle with the whole pipeline as methods; made by `cogview2_jax.load`.

    Prompts may be English or Chinese. Pictures come in as `open_picture` takes them (paths, bytes,
    PIL images, uint8 arrays) and go out as uint8 [y, x, 3]. The same key, made by `jax.random.key`
    or the older `jax.random.PRNGKey`, gives the same pictures. The first call of a method compiles,
    later ones with the same `num_images` do not. A wrong argument raises ValueError in one line.

    `execution` is the precision of the transformers, and the mesh over which batches and parameters
    are sharded. Images do not depend on it, except for rounding. The parameters in `bundle` are
    placed accordingly.
    """

    bundle: Bundle
    execution: Execution = Execution()

    def __post_init__(self) -> None:
        object.__setattr__(self, "bundle", bundles.place(self.bundle, self.execution))

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

        def draw(candidate: int) -> Array:
            return decode_image(
                self._decoding_params,
                *tokens.base,
                keys(candidate),
                self.bundle.cluster_labels,
                config=self.bundle.coglm_config,
                **self._sampling,
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
        config = self.bundle.coglm_config
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        opened = open_picture(picture)
        edit = editing.plan(box, (opened.height, opened.width), self.bundle.direct_config)
        tokens, keys = self._drawing([prompt], key, num_images)
        rows = len(tokens.english)
        ids, is_text = (np.asarray(array)[0] for array in tokens.base)
        crop = editing.cut(opened, edit)
        coarse = self._picture_tokens(crop, config.grid)[0]
        filling = inputs.infill(edit.mask, ids[is_text].tolist(), coarse, config)

        def of_each(array: np.ndarray) -> Any:
            return self._shard_over_mesh(np.repeat(array[None], rows, axis=0))

        def draw(candidate: int) -> Array:
            return decode_infilling(
                self._decoding_params,
                # The first four fields are those of the network's input.
                inputs.NetworkInput(*(of_each(array) for array in filling[:4])),
                of_each(filling.slot_of_cell),
                keys(candidate),
                self.bundle.cluster_labels,
                config=config,
                **self._sampling,
            )

        made = self._best_of(tokens, draw, candidates)
        if stage != "base":
            ratio = self.bundle.direct_config.ratio
            may_change = edit.mask.repeat(ratio, axis=0).repeat(ratio, axis=1).reshape(-1)
            drawn = self._direct(tokens, made, keys(_DIRECT_DRAW))
            kept = self._picture_tokens(crop, self.bundle.direct_config.grid)
            made = np.where(may_change, drawn, kept)
        if stage == "full":
            made = self._iterative(tokens, made, of_each(may_change), keys(_ITERATIVE_DRAW))
        return editing.paste(opened, self._pixels(made, stage)[:num_images], edit)

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
        if not len(pictures):
            raise ValueError("pictures must have at least one: got none")
        grid = self.bundle.coglm_config.grid
        coarse = np.concatenate([self._picture_tokens(picture, grid) for picture in pictures])
        tokens, coarse = self._whole_batch((self._tokens([prompt]).repeat(len(coarse)), coarse))
        scores = self._scores(tokens, coarse)[: len(pictures)]
        return np.argsort(-scores, kind="stable"), scores

    # Parts of the methods above, host arrays in and out.

    @property
    def _size(self) -> tuple[int, int]:
        return editing.picture_size(self.bundle.direct_config)

    @property
    def _sampling(self) -> dict[str, Any]:
        """Arguments that the stages with cluster sampling share."""
        return {
            "execution": self.execution,
            # Static: without this, another number of candidates would compile again.
            "sampling": dataclasses.replace(self.bundle.sampling, candidates=1),
            "num_clusters": self.bundle.num_clusters,
        }

    @functools.cached_property
    def _decoding_params(self) -> Any:
        """CogLM's parameters, one tree for each layer. Made once, outside the decoding programs:
        each would take the stack apart again.
        """
        return jax.jit(coglm.unstacked)(self.bundle.params("coglm"))

    def _last_stage(self, asked: str | None) -> str:
        if asked is not None:
            require_stage(asked, self.networks)
            return asked
        last = last_stage(self.networks)
        if last != STAGES[-1]:
            warnings.warn(what_is_missing(STAGES[-1], self.networks), stacklevel=3)
        return last

    def _tokens(self, prompts: Sequence[str]) -> PromptTokens:
        bundle = self.bundle
        return prompt_tokens(
            prompts,
            bundle.text_model,
            bundle.coglm_config,
            bundle.direct_config.text_slots,
            bundle.iterative_config.text_slots,
        )

    def _drawing(
        self, prompts: Sequence[str], key: Array, num_images: int
    ) -> tuple[PromptTokens, Callable[[int], Array]]:
        """The tokens of every image of every prompt, and a function: draw number → keys."""
        key = one_key(key)
        tokens = self._whole_batch(self._tokens(prompts).repeat(num_images))
        hashes = np.array([zlib.crc32(prompt.encode()) for prompt in prompts], np.uint32)
        return tokens, lambda draw: self._whole_batch(
            image_keys(key, hashes, num_images, np.uint32(draw))
        )

    def _whole_batch(self, tree: _Tree) -> _Tree:
        """Arrays [b, …] on the mesh, with the last row repeated until the batch splits evenly."""
        sharding = self.execution.sharding
        if sharding is None:
            return tree
        parts = sharding.parts("batch")

        def whole(array: Any) -> Any:
            return array[np.minimum(np.arange(-(-len(array) // parts) * parts), len(array) - 1)]

        return self._shard_over_mesh(jax.tree.map(whole, tree))

    def _shard_over_mesh(self, tree: _Tree) -> _Tree:
        sharding = self.execution.sharding
        if sharding is None:
            return tree
        placed: _Tree = jax.device_put(tree, sharding.named("batch"))
        return placed

    def _best_of(
        self, tokens: PromptTokens, draw: Callable[[int], Array], candidates: int | None
    ) -> np.ndarray:
        """Base tokens, int32 [b, cells]: the best of each image's `draw(candidate)`."""
        if candidates is None:
            candidates = self.bundle.sampling.candidates
        candidates = check_count("candidates", candidates)
        drawn = [draw(candidate) for candidate in range(candidates)]
        if candidates == 1:
            return np.asarray(drawn[0])
        best = np.argmax([self._scores(tokens, np.asarray(coarse)) for coarse in drawn], axis=0)
        return np.stack(drawn)[best, np.arange(len(best))]

    def _scores(self, tokens: PromptTokens, coarse: np.ndarray) -> np.ndarray:
        scores = caption_score(
            self.bundle.params("coglm"),
            self._shard_over_mesh(coarse),
            *tokens.base,
            tokens.english,
            config=self.bundle.coglm_config,
            execution=self.execution,
        )
        return np.asarray(scores)

    def _direct(self, tokens: PromptTokens, coarse: np.ndarray, keys: Array) -> np.ndarray:
        fine = super_resolve_direct(
            self.bundle.params("direct"),
            *tokens.direct,
            self._shard_over_mesh(coarse),
            keys,
            self.bundle.cluster_labels,
            config=self.bundle.direct_config,
            **self._sampling,
        )
        return np.asarray(fine)

    def _iterative(
        self, tokens: PromptTokens, fine: np.ndarray, may_change: np.ndarray, keys: Array
    ) -> np.ndarray:
        refined = super_resolve_iterative(
            self.bundle.params("iterative"),
            *tokens.iterative,
            self._shard_over_mesh(fine),
            self._shard_over_mesh(may_change),
            keys,
            config=self.bundle.iterative_config,
            execution=self.execution,
            sampling=self.bundle.sampling,
        )
        return np.asarray(refined)

    def _pixels(self, ids: np.ndarray, stage: str) -> np.ndarray:
        """Image tokens of a stage as the tokenizer draws them: uint8 [b, y, x, 3]."""
        config = self.bundle.coglm_config if stage == "base" else self.bundle.direct_config
        pictures = image_tokenizer.to_pixels(
            self.bundle.params("tokenizer"),
            self._shard_over_mesh(ids),
            grid=config.grid,
            stride=TOKEN_STRIDE,
            config=self.bundle.tokenizer_config,
        )
        return np.asarray(pictures)

    def _picture_tokens(self, picture: Picture, grid: Grid) -> np.ndarray:
        pixels = fit_picture(picture, grid[0] * TOKEN_STRIDE, grid[1] * TOKEN_STRIDE)
        ids = image_tokenizer.to_tokens(
            self.bundle.params("tokenizer"),
            pixels[None],
            stride=TOKEN_STRIDE,
            config=self.bundle.tokenizer_config,
        )
        return np.asarray(ids)
