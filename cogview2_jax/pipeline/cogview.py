"""Text → pictures, filling in, captions and ranking: the networks, loops and samplers put together.

Two layers. The functions at the top are pure, take parameters, arrays, keys and their
configuration, and are jitted with the configuration static: one compilation serves every prompt up
to the limit and every seed, a new batch size compiles anew. `CogView` below composes them over a
bundle, from strings and pictures to strings and pictures.

Image i of a batch is drawn from `keys[i]` alone, so what is beside it in the batch does not matter
(but for the last bits of float32, which may differ between batch sizes).

Paper (arXiv 2204.14217) sections 3.2 and 3.3; the released `cogview2_text2image.py` and
`cogview2_completion.py`.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm

from cogview2_jax import config as configs
from cogview2_jax.bundle import Bundle
from cogview2_jax.decoding import loops
from cogview2_jax.decoding.sampling import greedy, sample_clusters, sample_top_k
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.networks.attention import KVCache
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.pictures import Picture, fit_picture

Array = jax.Array
Params = dict
Box = tuple[float, float, float, float]

STRIDE = configs.TOKEN_STRIDE
STAGES = ("base", "direct", "full")
# Numbers of draws beyond any candidate's, so that no two stages share a key.
_DIRECT_DRAW, _ITERATIVE_DRAW = 2**32 - 1, 2**32 - 2
_ROWS_AT_ONCE = 600  # of logits in cluster sampling: bounds its memory at the published sizes

# --- The base model -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_clusters"))
def decode_image(
    params: Params,
    text: Array,
    is_text: Array,
    keys: Array,
    cluster_labels: Array,
    *,
    config: configs.CogLMConfig,
    sampling: configs.Sampling,
    num_clusters: int,
) -> Array:
    """Coarse image tokens of prompts.

    Args:
        text, is_text: int32, bool [b, max_text], from `inputs.right_padded`.
        keys: key array [b], one for each image.
        cluster_labels: int32 [num_image], each below `num_clusters`.

    Returns:
        int32 [b, cells], raster order.
    """
    unknown = jnp.full((text.shape[0], config.num_image_tokens), -1)
    layout = inputs.text_to_image(text, is_text, unknown, config)
    bias = inputs.text_key_bias(layout.is_text, sampling.text_upweight)
    slots = text.shape[1]
    draw = _cluster_sampler(keys, cluster_labels, num_clusters, sampling.base)
    return _fill(params, layout, bias, slots + 1, slots + 1, draw, _image_ids(config), config)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_clusters"))
def infill(
    params: Params,
    layout: inputs.NetworkInput,
    slot_of_cell: Array,
    keys: Array,
    cluster_labels: Array,
    *,
    config: configs.CogLMConfig,
    sampling: configs.Sampling,
    num_clusters: int,
) -> Array:
    """Coarse image tokens with the masked cells drawn anew: one compilation, whatever the mask.

    `layout` [b, s] and `slot_of_cell` [b, cells] are those of `inputs.infill`, stacked. Returns
    int32 [b, cells], raster order; kept cells are unchanged.
    """
    bias = inputs.text_key_bias(layout.is_text, sampling.text_upweight)
    length = layout.tokens.shape[1]
    first = length - config.num_image_tokens
    draw = _cluster_sampler(keys, cluster_labels, num_clusters, sampling.base)
    # The whole sequence is the prefix: the context sees itself in both directions, and the loop
    # passes over the slots that are known.
    filled = _fill(params, layout, bias, first, length, draw, _image_ids(config), config)
    return jnp.take_along_axis(filled, slot_of_cell - first, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "top_k", "temperature"))
def caption(
    params: Params,
    image: Array,
    english: Array,
    keys: Array,
    *,
    config: configs.CogLMConfig,
    top_k: int = 1,
    temperature: float = 1.0,
) -> Array:
    """Text ids of captions: `image` int32 [b, cells], `english` bool [b] → int32 [b, max_text].

    `top_k` 1 takes the most probable token each time. The caption ends before its first pad.
    """
    batch, vocabulary = image.shape[0], config.vocabulary
    unknown = jnp.full((batch, config.max_text), -1)
    layout, _ = inputs.captioning(image, unknown, jnp.ones(unknown.shape, bool), english, config)
    ids = (vocabulary.num_image, vocabulary.num_image + vocabulary.num_text)

    def draw(logits: Array, i: Array) -> Array:
        if top_k == 1:
            return greedy(logits)
        one = functools.partial(sample_top_k, k=top_k, temperature=temperature)
        return jax.vmap(one)(_fold(keys, i), logits)

    bias = jnp.zeros((1, layout.tokens.shape[1]))
    first = config.num_image_tokens + 1
    return _fill(params, layout, bias, first, first, draw, ids, config)


@functools.partial(jax.jit, static_argnames=("config",))
def caption_score(
    params: Params,
    image: Array,
    text: Array,
    is_text: Array,
    english: Array,
    *,
    config: configs.CogLMConfig,
) -> Array:
    """Mean log-likelihood of the text after its start token, given the image: float32 [b].

    `image` int32 [b, cells]; `text`, `is_text` [b, max_text] from `inputs.right_padded`;
    `english` bool [b]. Higher is better. Over the whole vocabulary and without up-weighting, as
    published.
    """
    layout, _ = inputs.captioning(image, text, is_text, english, config)
    hidden = coglm.hidden_states(
        params, layout.tokens, layout.positions, layout.mask, config=config
    )
    # The slot before each text slot predicts it.
    before = hidden[:, config.num_image_tokens : -1]
    log_probability = jax.nn.log_softmax(coglm.logits(params, before, config=config))
    of_text = jnp.take_along_axis(log_probability, text[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(is_text, of_text, 0), axis=-1) / jnp.sum(is_text, axis=-1)


def _fill(
    params: Params,
    layout: inputs.NetworkInput,
    bias: Array,
    first: int,
    prefix: int,
    draw: Callable[[Array, Array], Array],
    ids: tuple[int, int],
    config: configs.CogLMConfig,
) -> Array:
    """The slots from `first` on, int32 [b, s − first], those that hold −1 drawn in turn.

    Slots before `prefix` (at least `first`) run at once under the layout's mask, then every slot
    from `first` on runs by itself over the cache. `draw` is (logits [b, v] of `ids`, i) → [b],
    counted from 0.
    """
    known = layout.tokens
    tokens = jnp.maximum(known, 0)  # what stands for an unknown token is seen by nobody
    batch, length = tokens.shape
    cache = coglm.init_cache(config, batch, length)
    hidden, cache = coglm.extend(
        params,
        cache,
        tokens[:, :prefix],
        layout.positions[..., :prefix],
        layout.mask[:, :prefix],
        0,
        config=config,
        bias=bias,
    )
    logits = functools.partial(coglm.logits, params, config=config, ids=ids)

    def step(cache: KVCache, tokens: Array, i: Array) -> tuple[Array, KVCache]:
        slot = first + i
        hidden, cache = coglm.extend(
            params,
            cache,
            tokens[:, None],
            jax.lax.dynamic_slice_in_dim(layout.positions, slot, 1, axis=-1),
            jax.lax.dynamic_slice_in_dim(layout.mask, slot, 1, axis=1),
            slot,
            config=config,
            bias=bias,
        )
        return logits(hidden[:, 0]), cache

    def sample(_: Array, logits: Array, i: Array) -> Array:
        # Not the loop's key: every image has its own, inside `draw`.
        drawn = draw(logits, i) + ids[0]
        here = jax.lax.dynamic_index_in_dim(known, first + i, axis=1, keepdims=False)
        return jnp.where(here < 0, drawn, here)

    start = logits(hidden[:, first - 1])
    unused = jax.random.key(0)
    return loops.decode(step, sample, start, cache, unused, length - first)[0]


def _cluster_sampler(
    keys: Array, labels: Array, num_clusters: int, settings: configs.ClusterSampling
) -> Callable[[Array, Array], Array]:
    def one(key: Array, logits: Array) -> Array:
        return sample_clusters(key, logits, labels, num_clusters, settings, block=_ROWS_AT_ONCE)

    return lambda logits, i: jax.vmap(one)(_fold(keys, i), logits)


def _fold(keys: Array, number: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _image_ids(config: configs.CogLMConfig) -> tuple[int, int]:
    return 0, config.vocabulary.num_image


# --- Super-resolution -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_clusters"))
def super_resolve_direct(
    params: Params,
    text: Array,
    is_text: Array,
    coarse: Array,
    keys: Array,
    cluster_labels: Array,
    *,
    config: configs.DirectSRConfig,
    sampling: configs.Sampling,
    num_clusters: int,
) -> Array:
    """All fine tokens from the coarse ones in one pass: [b, coarse cells] → int32 [b, fine cells].

    `text`, `is_text` [b, text_slots] from `inputs.left_padded`; the rest as `decode_image`.
    """
    layout = inputs.direct_super_resolution(text, is_text, coarse, config)
    logits = direct_sr.apply(params, layout.tokens, layout.positions, layout.mask, config=config)
    return _cluster_sampler(keys, cluster_labels, num_clusters, sampling.direct)(
        logits, jnp.zeros((), jnp.int32)
    )


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def super_resolve_iterative(
    params: Params,
    text: Array,
    is_text: Array,
    fine: Array,
    may_change: Array,
    keys: Array,
    *,
    config: configs.IterativeSRConfig,
    sampling: configs.Sampling,
) -> Array:
    """Fine tokens refined in rounds of local parallel auto-regression: int32 [b, fine cells].

    `text`, `is_text` [b, text_slots] from `inputs.left_padded`; `fine` int32 [b, fine cells];
    `may_change` bool [b, fine cells], the cells that a round may reset (all of them, but when
    editing).
    """
    schedule = inputs.lopar_schedule(config)
    reset, write = (jnp.asarray(cells)[:, None] & may_change for cells in schedule)
    top_k = jnp.asarray(sampling.iterative_top_k)

    def predict(tokens: Array) -> Array:
        layout = inputs.iterative_super_resolution(text, is_text, tokens, config)
        return iterative_sr.apply(
            params, layout.tokens, layout.positions, layout.mask, config=config
        )

    def draw(_: Array, logits: Array, round_: Array) -> Array:
        one = functools.partial(
            sample_top_k,
            k=top_k[round_],
            temperature=sampling.iterative_temperature,
            max_k=max(sampling.iterative_top_k),
            block=_ROWS_AT_ONCE,
        )
        return jax.vmap(one)(_fold(keys, round_), logits)

    mask_token = config.vocabulary.start_of_image
    unused = jax.random.key(0)
    return loops.lopar(predict, draw, fine, reset, write, mask_token, unused)


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


# --- From strings and pictures --------------------------------------------------------------------


class PromptTokens(NamedTuple):
    """Prompts in the slots of each network: (tokens int32, is_text bool), [b, slots] each."""

    base: tuple[np.ndarray, np.ndarray]
    direct: tuple[np.ndarray, np.ndarray]
    iterative: tuple[np.ndarray, np.ndarray]
    english: np.ndarray  # bool [b]

    def repeat(self, number: int) -> "PromptTokens":
        """Each prompt `number` times in a row."""
        repeated: PromptTokens = jax.tree.map(lambda a: np.repeat(a, number, axis=0), self)
        return repeated


def prompt_tokens(
    prompts: Sequence[str],
    model: spm.SentencePieceProcessor,
    base: configs.CogLMConfig,
    direct_slots: int,
    iterative_slots: int,
) -> PromptTokens:
    """Prompts as every network reads them: super-resolution as much as it has slots for.

    Raises ValueError, in one line, for no prompt, an empty or over-long one, and for words outside
    the text model.
    """
    if not prompts:
        raise ValueError("prompts must have at least one: got none")
    vocabulary = base.vocabulary
    ids = [
        text.encode(model, prompt, vocabulary.num_image, max_tokens=base.max_text)
        for prompt in prompts
    ]
    return PromptTokens(
        inputs.right_padded(ids, base.max_text, vocabulary),
        inputs.left_padded([row[:direct_slots] for row in ids], direct_slots, vocabulary),
        inputs.left_padded([row[:iterative_slots] for row in ids], iterative_slots, vocabulary),
        np.array([not text.is_chinese(prompt) for prompt in prompts]),
    )


@functools.partial(jax.jit, static_argnames=("num_images",))
def image_keys(key: Array, prompt_hashes: Array, num_images: int, draw: Array) -> Array:
    """A key for every image of every prompt: [prompts · num_images].

    `prompt_hashes` is uint32 [prompts]. What an image is drawn from depends on the key, its
    prompt, its number and `draw` (the number of the candidate, or the stage) alone.
    """
    of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_hashes)
    numbers = jnp.arange(num_images)
    of_image = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_prompt, numbers)
    return _fold(of_image.reshape(-1), draw)


@dataclass(frozen=True)
class CogView:
    """A bundle with the whole pipeline as methods; see `cogview2_jax.load`.

    Prompts may be English or Chinese. Pictures are uint8 [y, x, 3]. The same key gives the same
    pictures. The first call of a kind compiles, later ones of the same `num_images` do not. A
    wrong argument raises ValueError in one line.
    """

    bundle: Bundle

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
            return infill(
                bundle.params("coglm"),
                # The first four fields are those of a layout.
                inputs.NetworkInput(*(of_each(array) for array in filling[:4])),
                of_each(filling.slot_of_cell),
                keys(candidate),
                bundle.cluster_labels,
                config=config,
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
        ids = caption(
            self.bundle.params("coglm"),
            self._picture_tokens(picture, config.grid),
            np.array([language == "en"]),
            jax.random.key(0)[None] if key is None else key[None],
            config=config,
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


def caption_text(
    ids: np.ndarray, model: spm.SentencePieceProcessor, vocabulary: configs.Vocabulary
) -> str:
    """Generated text ids as a string, up to the first pad or end piece."""
    ends = np.isin(ids, [vocabulary.pad, vocabulary.num_image + model.eos_id()])
    stop = int(np.argmax(ends)) if ends.any() else len(ids)
    return text.decode(model, ids[:stop].tolist(), vocabulary.num_image)
