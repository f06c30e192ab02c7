"""A bundle with the whole pipeline as methods: strings and pictures in and out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.checks import check_count
from cogview2_jax.keys import one_key
from cogview2_jax.pipeline import making, settings
from cogview2_jax.pipeline.edits import STAGES, Edits
from cogview2_jax.pipeline.making import Making, base_probability, direct_probability
from cogview2_jax.pipeline.parts import DIRECT_DRAW, ITERATIVE_DRAW
from cogview2_jax.pipeline.reach import require_stage
from cogview2_jax.pipeline.stages import decode_image
from cogview2_jax.styles import find_style, in_style
from cogview2_jax.tokenizer.pictures import Picture

Array = jax.Array

# The stage whose tokens a step of `_steps` yields.
_STAGE_OF = {"candidate": "base", "base": "base", "direct": "direct"}
_STAGE_OF |= {"iterative": "full", "round": "full"}


@dataclass(frozen=True)
class CogView(Edits):
    """A bundle with the whole pipeline as methods; made by `cogview2_jax.load`.

    Prompts may be English or Chinese. Pictures come in as `open_picture` takes them (paths, bytes,
    PIL images, uint8 arrays) and go out as uint8 [y, x, 3]. The same key, made by `jax.random.key`
    or the older `jax.random.PRNGKey`, gives the same pictures. The first call of a method compiles,
    later ones with the same `num_images` do not. A wrong argument raises ValueError in one line.

    `execution` is the precision of the transformers, and the mesh over which batches and parameters
    are sharded. Images do not depend on it, except for rounding. The parameters in `bundle` are
    placed accordingly; with `in_turn` they stay on the host, and each network is on the devices
    only while it is used.
    """

    def generate(
        self,
        prompt: str,
        num_images: int = settings.NUM_IMAGES,
        *,
        key: Array,
        stage: str | None = None,
        candidates: int | None = None,
        style: str | None = None,
    ) -> np.ndarray:
        """Pictures of a prompt: uint8 [num_images, y, x, 3], 192×192 with the bundle that ships.

        `stage` is the last one to run: "base" (its small picture enlarged), "direct" or "full". The
        default is the last one that the model has networks for, with a warning when that is not
        "full". The base stage draws each picture `candidates` times (None: as often as the bundle's
        `sampling` says) and keeps the one with the best `caption_score` (the paper's
        post-selection). `style` is a style of the bundle, or "none"; the default is its first one.
        """
        stage = self._last_stage(stage)
        made = self.generate_stages(
            [prompt],
            key=key,
            num_images=num_images,
            candidates=candidates,
            stages=(stage,),
            style=style,
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
        style: str | None = None,
        first: int | Sequence[int] = 0,
        progress: Callable[[str], None] = lambda part: None,
    ) -> dict[str, np.ndarray]:
        """Pictures after each of `stages`: stage → uint8 [prompts, num_images, y, x, 3], one batch.

        Those of "base" are enlarged bicubically to the size of the others. `progress` is called
        with "base", "direct", "iterative" and "pixels" as each is finished.

        With `keep_best`, `candidates` is how many base pictures a prompt gets in all; the
        `num_images` with the best `caption_score` are kept, best first. Images are numbered from
        `first` on, one number for all prompts or one for each: those of two calls, 0 to 3 and 4 to
        7, are those of one call of 8.
        """
        if not stages:
            raise ValueError(f"stages must be of {', '.join(STAGES)}: got none")
        for stage in stages:
            require_stage(stage, self.networks)
        num_images = check_count("num_images", num_images)
        last = max(stages, key=STAGES.index)
        numbers = [check_count("first", each, 0) for each in np.ravel(np.asarray(first))]
        if len(numbers) not in (1, len(prompts)):
            raise ValueError(f"first must be one number or {len(prompts)}: got {len(numbers)}")
        steps = self._steps(
            prompts, key, num_images, last, candidates, keep_best, style, first=numbers
        )
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
        style: str | None = None,
        confidence: bool = False,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The pictures of `generate` as they come to be: each "candidate" of the base stage, the
        chosen ones ("base"), then after "direct" and after each "round".

        Yields the step and uint8 [num_images, y, x, 3]; the last ones are those of `generate`. With
        `confidence` a step "confidence" follows, uint8 [num_images, y, x', 3], of
        `making.confidence`. What is not asked for is not computed, so that whoever stops in between
        cancels the rest.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        steps = self._steps(
            [prompt], key, num_images, stage, candidates, keep_best, style, each_round=True
        )
        grids = {}
        for part, grid in steps:
            grids[part] = np.asarray(grid)
            pictures = self._pixels(grids[part], _STAGE_OF[part])[:num_images]
            shown = self._enlarged(pictures)
            yield part, shown
        if confidence:
            sure = self._confidence(prompt, num_images, style, grids["base"], grids.get("direct"))
            yield "confidence", np.stack(making.confidence(Making(((part, shown),), *sure)))

    def making(
        self,
        prompt: str,
        num_images: int = settings.NUM_IMAGES,
        *,
        key: Array,
        stage: str | None = None,
        candidates: int | None = None,
        keep_best: bool = False,
        style: str | None = None,
        progress: Callable[[str], None] = lambda part: None,
    ) -> Making:
        """The pictures of `generate` at every step, and how sure the model was of each token.

        `making.animation` and `making.confidence` make pictures of it. `progress` is as in
        `generate_stages`.
        """
        stage = self._last_stage(stage)
        num_images = check_count("num_images", num_images)
        steps = self._steps(
            [prompt], key, num_images, stage, candidates, keep_best, style, each_round=True
        )
        grids = []
        for part, grid in steps:
            if part != "candidate":
                grids.append((part, np.asarray(grid)))
            if part in ("base", "direct"):
                progress(part)
        if stage == STAGES[-1]:
            progress("iterative")
        direct = grids[1][1] if len(grids) > 1 else None
        sure = self._confidence(prompt, num_images, style, grids[0][1], direct)
        pictures = tuple(
            (part, self._enlarged(self._pixels(grid, _STAGE_OF[part])[:num_images]))
            for part, grid in grids
        )
        progress("pixels")
        return Making(pictures, *sure)

    def _confidence(
        self,
        prompt: str,
        num_images: int,
        style: str | None,
        coarse: np.ndarray,
        fine: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The last two fields of `Making`, of tokens [b, cells]."""
        styled = in_style(find_style(self.bundle.styles, style), prompt)
        tokens = self._tokens_of_images([styled], num_images)
        config = self.bundle.direct_config
        drawn = self._shard_over_mesh(coarse)
        base = base_probability(
            self._params("coglm"),
            *tokens.base,
            drawn,
            config=config.coglm,
            text_upweight=self.bundle.sampling.text_upweight,
            execution=self.execution,
        )
        found = np.asarray(base)[:num_images].reshape(-1, *config.coglm.grid)
        if fine is None:
            return found, None
        direct = direct_probability(
            self._params("direct"),
            *tokens.direct,
            drawn,
            self._shard_over_mesh(fine),
            config=config,
            execution=self.execution,
        )
        return found, np.asarray(direct)[:num_images].reshape(-1, *config.grid)

    def _steps(
        self,
        prompts: Sequence[str],
        key: Array,
        num_images: int,
        last: str,
        candidates: int | None,
        keep_best: bool,
        style: str | None,
        each_round: bool = False,
        first: Sequence[int] = (0,),
    ) -> Iterator[tuple[str, Any]]:
        """Image tokens [b, cells] of each "candidate", and after "base", "direct" and "iterative",
        up to the stage `last`; with `each_round`, after each "round" in place of "iterative".
        """
        found = find_style(self.bundle.styles, style)
        styled = [in_style(found, prompt) for prompt in prompts]
        tokens, keys = self._drawing(styled, key, num_images, first)
        # Candidates are scored without the template, as published.
        scored = tokens if found is None else self._tokens_of_images(prompts, num_images)

        # The images of a prompt share its prefill; on a mesh each device has its own images'.
        alone = self.execution.sharding is None
        read = tokens.take(np.arange(len(prompts)) * num_images) if alone else tokens

        def draw(keys: Array) -> Array:
            return decode_image(
                self._params("coglm"),
                *read.base,
                keys,
                self.bundle.cluster_labels,
                config=self.bundle.coglm_config,
                **self._sampling(found),
            )

        coarse: list[np.ndarray] = []
        number = self._candidates(candidates, num_images if keep_best else None)
        for one in self._drawn(tokens, draw, keys, number, one_by_one=each_round):
            coarse.append(one)
            yield "candidate", one
        if keep_best:
            count = self.bundle.sampling.candidates if candidates is None else candidates
            count = max(count, num_images)
            base = self._best_of_all(scored, coarse, count, len(prompts), num_images)
        else:
            base = self._best_of(scored, coarse)
        yield "base", base
        if last == "base":
            return
        fine = self._direct(tokens, base, keys(DIRECT_DRAW), found)
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

    def caption(
        self,
        picture: Picture,
        *,
        language: str = settings.LANGUAGES[0],
        key: Array | None = None,
        top_k: int = settings.TOP_K,
        temperature: float = settings.TEMPERATURE,
        candidates: int = 1,
    ) -> str:
        """A caption of a picture, in English ("en") or Chinese ("zh"), of at least one word.

        Greedy without a `key` and at `temperature` 0; otherwise each token is drawn from the
        `top_k` most probable. Only tokens of the language are taken. Of several `candidates`, the
        greedy caption and others that are drawn with the `key`, the most likely one is returned.
        """
        keys = None if key is None else one_key(key)[None]
        images = [self.picture_tokens(picture)]
        return self.token_captions(
            images,
            language,
            keys=keys,
            top_k=top_k,
            temperature=temperature,
            candidates=candidates,
        )[0]

    def captions(
        self,
        pictures: Sequence[Picture],
        *,
        language: str = settings.LANGUAGES[0],
        key: Array | None = None,
        top_k: int = settings.TOP_K,
        temperature: float = settings.TEMPERATURE,
        candidates: int = 1,
    ) -> list[str]:
        """A caption of each picture, as `caption`, several at a time.

        Picture n is drawn from `fold_in(key, n)`. Greedy ones are those of `caption` up to
        rounding: where two tokens are as probable, a batch may take the other one.
        """
        images = [self.picture_tokens(picture) for picture in pictures]
        numbers = jnp.arange(len(images))
        keys = (
            None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(one_key(key), numbers)
        )
        return self.token_captions(
            images,
            language,
            keys=keys,
            top_k=top_k,
            temperature=temperature,
            candidates=candidates,
        )

    def rank(self, prompt: str, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """How well each picture fits the prompt: the likelihood of the prompt as its caption.

        Returns the pictures' numbers, best first, int [n], and their scores in the order given,
        float32 [n].
        """
        scores = self.scores([prompt], pictures)[0]
        return np.argsort(-scores, kind="stable"), scores

    def scores(
        self, texts: Sequence[str], pictures: Sequence[Picture], *, as_released: bool = False
    ) -> np.ndarray:
        """The likelihood of each text as the caption of each picture: float32 [texts, pictures].

        A score is the mean log-likelihood of a text's tokens (`stages.caption_score`) after the
        start token of its language, or always after `<start_of_chinese>`, as the released script
        has it. Pairs run in batches of one size, so that one compilation serves any number of texts
        and pictures.
        """
        if not len(pictures):
            raise ValueError("pictures must have at least one: got none")
        images = [self.picture_tokens(picture) for picture in pictures]
        return self.token_scores(texts, images, as_released=as_released)
