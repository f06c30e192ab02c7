"""The steps of the pipeline over a bundle's parameters, host arrays in and out."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax import bundle as bundles
from cogview2_jax import placement
from cogview2_jax.bundle import Bundle
from cogview2_jax.checks import check_count, check_temperature
from cogview2_jax.config import TOKEN_STRIDE, Grid
from cogview2_jax.keys import fold_in_all, key_batch, one_key
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import editing, settings
from cogview2_jax.pipeline.prompts import (
    PromptTokens,
    caption_ids,
    caption_text,
    image_keys,
    prompt_tokens,
)
from cogview2_jax.pipeline.stages import (
    caption_score,
    decode_caption,
    decode_infilling,
    super_resolve_direct,
    super_resolve_iterative,
)
from cogview2_jax.sharding import Execution
from cogview2_jax.styles import Style
from cogview2_jax.tokenizer import image as image_tokenizer
from cogview2_jax.tokenizer.pictures import Picture, fit_picture

Array = jax.Array
_Tree = TypeVar("_Tree")

# Draw numbers above any candidate's, so that no two stages share a key.
DIRECT_DRAW, ITERATIVE_DRAW, VARIED_DRAW = 2**32 - 1, 2**32 - 2, 2**32 - 3


@dataclass(frozen=True)
class Parts:
    """A bundle, placed for an `execution`, and the pipeline's steps over its parameters.

    With `in_turn`, parameters stay on the host, and a transformer is on the devices until another
    one is used: the largest decides how much memory it takes. Of candidates, as many are drawn in
    one batch as make `at_once` pictures.
    """

    bundle: Bundle
    execution: Execution = Execution()
    in_turn: bool = False
    at_once: int = settings.DECODED_AT_ONCE
    _held: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bundle = bundles.place(self.bundle, self.execution, on_host=True)
        if not self.in_turn:
            trees = {name: getattr(bundle, name) for name in bundles.NETWORKS}
            bundle = bundle._replace(
                **{name: self._put(name, tree) for name, tree in trees.items() if tree}
            )
        object.__setattr__(self, "bundle", bundle)

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that the bundle has, in the order of training."""
        return tuple(name for name in bundles.NETWORKS if getattr(self.bundle, name))

    @property
    def _size(self) -> tuple[int, int]:
        return editing.picture_size(self.bundle.direct_config)

    def _sampling(self, style: Style | None = None) -> dict[str, Any]:
        """Arguments that the stages with cluster sampling share."""
        sampling = self.bundle.sampling
        if style is not None:
            sampling = dataclasses.replace(sampling, base=style.base, direct=style.direct)
        return {
            "execution": self.execution,
            # Static: without this, another number of candidates would compile again.
            "sampling": dataclasses.replace(sampling, candidates=1, edit_candidates=0),
            "num_clusters": self.bundle.num_clusters,
        }

    def _params(self, network: str) -> Any:
        """Parameters on the devices: CogLM's with one tree for each layer."""
        tree = self.bundle.params(network)
        if self.in_turn and network not in self._held:
            # The tokenizer is small, and stays.
            for other in self._held.keys() - {"tokenizer"} if network != "tokenizer" else ():
                del self._held[other]
            self._held[network] = self._put(network, tree)
        return self._held[network] if self.in_turn else tree

    def _put(self, network: str, tree: Any) -> Any:
        sharding = self.execution.sharding
        if network == "coglm":
            return placement.put_for_decoding(tree, self.bundle.coglm_config, sharding)
        return placement.put(tree, self.bundle.config_of(network), sharding)

    def _tokens(self, prompts: Sequence[str], *, start_token: bool = False) -> PromptTokens:
        bundle = self.bundle
        return prompt_tokens(
            prompts,
            bundle.text_model,
            bundle.coglm_config,
            bundle.direct_config.text_slots,
            bundle.iterative_config.text_slots,
            start_token=start_token,
        )

    def _tokens_of_images(
        self, prompts: Sequence[str], num_images: int, *, start_token: bool = False
    ) -> PromptTokens:
        """The tokens of every image of every prompt."""
        tokens = self._tokens(prompts, start_token=start_token)
        return self._whole_batch(tokens.repeat(num_images))

    def _drawing(
        self, prompts: Sequence[str], key: Array, num_images: int, first: Sequence[int] = (0,)
    ) -> tuple[PromptTokens, Callable[[int], Array]]:
        """`_tokens_of_images`, and a function: draw number → keys of the images from `first` on."""
        key = one_key(key)
        tokens = self._tokens_of_images(prompts, num_images)
        hashes = np.array([zlib.crc32(prompt.encode()) for prompt in prompts], np.uint32)
        numbers = np.broadcast_to(np.array(first, np.int32), len(prompts))
        return tokens, lambda draw: self._whole_batch(
            image_keys(key, hashes, num_images, np.uint32(draw), numbers)
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

    def _known(self, tokens: PromptTokens, crop: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The prompt's ids and the coarse ones of a crop [y, x, 3], for an infilling sequence."""
        ids, is_text = (np.asarray(array)[0] for array in tokens.base)
        return ids[is_text].tolist(), self._picture_tokens(crop, self.bundle.coglm_config.grid)[0]

    def _redraw(
        self,
        tokens: PromptTokens,
        read: PromptTokens,
        fillings: Sequence[inputs.Infill],
        crop: np.ndarray,
        fine: np.ndarray,
        keys: Callable[[int], Array],
        stage: str,
        candidates: int | None,
        style: Style | None = None,
    ) -> np.ndarray:
        """A crop with the missing cells of `fillings` drawn, up to `stage`: uint8 [b, y, x, 3].

        Candidates are scored with `tokens`; super-resolution has the prompts `read`, and rewrites
        the `fine` cells, bool [1 or b, y, x]. There is one filling for all images, or one for each.
        """
        times, images = self._candidates(candidates, edits=True), len(tokens.english)
        filling = jax.tree.map(lambda *rows: np.stack(rows), *fillings)
        fine = fine.reshape(len(fine), -1)

        def of_each(array: np.ndarray) -> Any:
            return self._shard_over_mesh(np.broadcast_to(array, (images, *array.shape[1:])))

        def draw(keys: Array) -> Array:
            return decode_infilling(
                self._params("coglm"),
                # The first four fields are those of the network's input.
                inputs.NetworkInput(*(of_each(array) for array in filling[:4])),
                of_each(filling.slot_of_cell),
                keys,
                self.bundle.cluster_labels,
                config=self.bundle.coglm_config,
                **self._sampling(style),
            )

        made = self._best_of(tokens, list(self._drawn(tokens, draw, keys, times)))
        if stage != "base":
            drawn = self._direct(read, made, keys(DIRECT_DRAW), style)
            kept = self._picture_tokens(crop, self.bundle.direct_config.grid)
            made = np.where(fine, drawn, kept)
        if stage == "full":
            made = self._iterative(read, made, of_each(fine), keys(ITERATIVE_DRAW))
        return self._pixels(made, stage)

    def _candidates(self, asked: int | None, keep: int | None = None, edits: bool = False) -> int:
        """How often each picture is drawn at the base stage; with `keep`, how often `keep` pictures
        are, so that there are `candidates` of them.
        """
        if asked is None:
            asked = max(self.bundle.sampling.candidates_of(edits=edits), keep or 1)
        candidates = check_count("candidates", asked)
        if keep is None:
            return candidates
        if candidates < keep:
            raise ValueError(
                f"candidates must be at least the {keep} pictures to keep: got {candidates}"
            )
        return -(-candidates // keep)

    def _drawn(
        self,
        tokens: PromptTokens,
        draw: Callable[[Array], Array],
        keys: Callable[[int], Array],
        candidates: int,
        *,
        one_by_one: bool = False,
    ) -> Iterator[np.ndarray]:
        """The candidates of all images, int32 [b, cells] each.

        `draw` is keys [b · n] → tokens [b · n, cells], n for each image. They are drawn in as few
        batches of one size as `at_once` allows: one batch is one compilation. Those that
        nobody asks for are not drawn, with `one_by_one` not even in the same batch.
        """
        images = len(tokens.english)
        most = 1 if one_by_one else max(1, min(candidates, self.at_once // images))
        together = next(n for n in range(most, 0, -1) if candidates % n == 0)
        for first in range(0, candidates, together):
            of_each = jnp.stack([keys(first + n) for n in range(together)], axis=1)
            batch = self._shard_over_mesh(of_each.reshape(images * together))
            cells = np.asarray(draw(batch)).reshape(images, together, -1)
            yield from np.moveaxis(cells, 1, 0)

    def _best_of(self, tokens: PromptTokens, drawn: Sequence[np.ndarray]) -> np.ndarray:
        """Base tokens, int32 [b, cells]: the best of each image's candidates, [b, cells] each."""
        if len(drawn) == 1:
            return drawn[0]
        best = np.argmax([self._scores(tokens, coarse) for coarse in drawn], axis=0)
        return np.stack(drawn)[best, np.arange(len(best))]

    def _best_of_all(
        self, tokens: PromptTokens, drawn: Sequence[np.ndarray], count: int, prompts: int, keep: int
    ) -> np.ndarray:
        """As `_best_of`, with the `keep` best of the first `count` candidates of each prompt, best
        first, whichever image they were drawn for.
        """
        rows = prompts * keep
        scores, pool = [], []
        for coarse in drawn:
            scores.append(self._scores(tokens, coarse)[:rows].reshape(prompts, keep))
            pool.append(coarse[:rows].reshape(prompts, keep, -1))
        found = np.concatenate(scores, axis=1)[:, :count]
        best = np.argsort(-found, axis=1, kind="stable")[:, :keep]
        kept = np.take_along_axis(np.concatenate(pool, axis=1), best[..., None], axis=1)
        return np.asarray(self._whole_batch(kept.reshape(rows, -1)))

    def _scores(self, tokens: PromptTokens, coarse: np.ndarray) -> np.ndarray:
        scores = caption_score(
            self._params("coglm"),
            self._shard_over_mesh(coarse),
            *tokens.base,
            tokens.english,
            config=self.bundle.coglm_config,
            execution=self.execution,
        )
        return np.asarray(scores)

    def picture_tokens(self, picture: Picture) -> np.ndarray:
        """A picture as the base model sees it: int32 [cells]. Raises as `open_picture`."""
        return self._picture_tokens(picture, self.bundle.coglm_config.grid)[0]

    def token_scores(
        self, texts: Sequence[str], images: Sequence[np.ndarray], *, as_released: bool = False
    ) -> np.ndarray:
        """`CogView.scores` of pictures that are `picture_tokens`: float32 [texts, pictures]."""
        text, picture = np.divmod(np.arange(len(texts) * len(images)), len(images))
        scores = self.pair_scores(texts, images, text, picture, as_released)
        return scores.reshape(len(texts), len(images))

    def pair_scores(
        self,
        texts: Sequence[str],
        images: Sequence[np.ndarray],
        text: np.ndarray,
        picture: np.ndarray,
        as_released: bool = False,
    ) -> np.ndarray:
        """The scores of pairs of a text and a picture that is `picture_tokens`: float32 [pairs].

        `text` and `picture` are their numbers, int [pairs].
        """
        read, coarse = self._tokens(texts), np.stack(images)
        if as_released:
            read = read._replace(english=np.zeros_like(read.english))
        scores = np.empty(len(text), np.float32)
        for start in range(0, len(text), settings.SCORED_AT_ONCE):
            # The last batch repeats the last pair, so that every batch has one size.
            batch = np.arange(start, start + settings.SCORED_AT_ONCE).clip(max=len(text) - 1)
            rows = self._whole_batch((read.take(text[batch]), coarse[picture[batch]]))
            scores[batch] = self._scores(*rows)[: len(batch)]
        return scores

    def token_captions(
        self,
        images: Sequence[np.ndarray],
        language: str = settings.LANGUAGES[0],
        *,
        keys: Array | None = None,
        top_k: int = settings.TOP_K,
        temperature: float = settings.TEMPERATURE,
        candidates: int = 1,
    ) -> list[str]:
        """`CogView.caption` of pictures that are `picture_tokens`; `keys` has one for each.

        More than one picture run in batches of one size, so that one compilation serves any number.
        """
        config = self.bundle.coglm_config
        top_k = check_count("top_k", top_k)
        temperature = check_temperature("temperature", temperature)
        candidates = check_count("candidates", candidates)
        if top_k > (most := config.vocabulary.num_text):
            raise ValueError(
                f"top_k must be at most {most}, the text pieces there are: got {top_k}"
            )
        decode = functools.partial(self._decoded_captions, images, language, temperature)
        if candidates == 1:
            return decode(keys, 1 if keys is None else top_k)
        if keys is None:
            raise ValueError(f"{candidates} candidates need a key: without one all are greedy")
        said = [decode(None, 1)]  # each has a caption for every picture
        for number in range(1, candidates):
            drawn = fold_in_all(key_batch(keys), jnp.asarray(number))
            said.append(decode(drawn, top_k))
        of_each = [list(dict.fromkeys(texts)) for texts in zip(*said, strict=True)]
        texts = [each for texts in of_each for each in texts]
        picture = np.repeat(np.arange(len(images)), [len(texts) for texts in of_each])
        scores = self.pair_scores(texts, images, np.arange(len(texts)), picture)
        ends = np.cumsum([len(texts) for texts in of_each])[:-1]
        return [
            mine[int(np.argmax(found))]
            for mine, found in zip(of_each, np.split(scores, ends), strict=True)
        ]

    def _decoded_captions(
        self,
        images: Sequence[np.ndarray],
        language: str,
        temperature: float,
        keys: Array | None,
        top_k: int,
    ) -> list[str]:
        """A caption of each picture: greedy without `keys`."""
        config = self.bundle.coglm_config
        allowed = caption_ids(self.bundle.text_model, config.vocabulary, language)
        size = 1 if len(images) == 1 else settings.CAPTIONED_AT_ONCE
        made: list[str] = []
        while len(made) < len(images):
            rows = np.arange(len(made), len(made) + size).clip(max=len(images) - 1)
            coarse = np.stack([images[row] for row in rows])
            drawn = jax.random.split(jax.random.key(0), size) if keys is None else keys[rows]
            image, english, drawn = self._whole_batch(
                (coarse, np.full(size, language == "en"), drawn)
            )
            ids = decode_caption(
                self._params("coglm"),
                image,
                english,
                allowed,
                drawn,
                config=config,
                execution=self.execution,
                top_k=top_k,
                temperature=temperature,
            )
            said = [
                caption_text(row, self.bundle.text_model, config.vocabulary)
                for row in np.asarray(ids)[:size]
            ]
            made += said[: len(images) - len(made)]
        return made

    def _direct(
        self, tokens: PromptTokens, coarse: np.ndarray, keys: Array, style: Style | None = None
    ) -> np.ndarray:
        fine = super_resolve_direct(
            self._params("direct"),
            *tokens.direct,
            self._shard_over_mesh(coarse),
            keys,
            self.bundle.cluster_labels,
            config=self.bundle.direct_config,
            **self._sampling(style),
        )
        return np.asarray(fine)

    def _iterative(
        self,
        tokens: PromptTokens,
        fine: np.ndarray,
        may_change: np.ndarray,
        keys: Array,
        rounds: tuple[int, int] | None = None,
    ) -> np.ndarray:
        refined = super_resolve_iterative(
            self._params("iterative"),
            *tokens.iterative,
            self._shard_over_mesh(fine),
            self._shard_over_mesh(may_change),
            keys,
            rounds,
            config=self.bundle.iterative_config,
            execution=self.execution,
            sampling=self.bundle.sampling,
        )
        return np.asarray(refined)

    def _pixels(self, ids: np.ndarray, stage: str) -> np.ndarray:
        """Image tokens of a stage as the tokenizer draws them: uint8 [b, y, x, 3]."""
        config = self.bundle.coglm_config if stage == "base" else self.bundle.direct_config
        pictures = image_tokenizer.to_pixels(
            self._params("tokenizer"),
            self._shard_over_mesh(ids),
            grid=config.grid,
            stride=TOKEN_STRIDE,
            config=self.bundle.tokenizer_config,
        )
        return np.asarray(pictures)

    def _picture_tokens(self, picture: Picture, grid: Grid) -> np.ndarray:
        pixels = fit_picture(picture, grid[0] * TOKEN_STRIDE, grid[1] * TOKEN_STRIDE)
        ids = image_tokenizer.to_tokens(
            self._params("tokenizer"),
            pixels[None],
            stride=TOKEN_STRIDE,
            config=self.bundle.tokenizer_config,
        )
        return np.asarray(ids)
