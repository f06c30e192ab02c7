"""What the hierarchy replaces, with our own network: a token at a time for all fine cells.

(c) One token at a time: every fine cell is one step of the cached decoding, over a cache of the
text and all cells. (d) CogView's sliding window: a window of half the side moves by a quarter over
the coarse grid; inside it the coarse cells are read and the fine ones are drawn one at a time,
except those that earlier windows have drawn.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cogview2_jax.config import CogLMConfig
from cogview2_jax.decoding import loops
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.networks.transformer import word_rows
from cogview2_jax.sharding import Execution

Array = jax.Array


def window_steps(coarse: int, ratio: int) -> tuple[int, int]:
    """(steps, cells in a window) of the sliding window over a square grid.

    The scheme is CogView's: nine windows, row by row except that the middle of the second row comes
    first. A window of the first two rows stops short of its lower border by 14/32 and 2/32 of its
    side, as CogView's 18 and 30 of 32 lines; a step is one cell from the first unknown one on.
    """
    side, move = coarse * ratio // 2, coarse * ratio // 4
    lines = [round(side * share / 32) for share in (18, 30, 30, 30, 30, 30, 32, 32, 32)]
    places = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]
    known: set[tuple[int, int]] = set()
    steps = 0
    for (i, j), height in zip(places, lines, strict=True):
        cells = [(move * i + y, move * j + x) for y in range(height) for x in range(side)]
        unknown = [number for number, cell in enumerate(cells) if cell not in known]
        steps += len(cells) - unknown[0] if unknown else 0
        known.update(cells)
    return steps, side * side


def decoder(
    params: Any,
    config: CogLMConfig,
    draw: Callable[[Array, Array], Array],
    length: int,
    number: int,
    execution: Execution = Execution(),
) -> Callable[[], Any]:
    """`number` steps of cached decoding, the last of those that fill a cache of `length` slots, as
    a call that compiles nothing. Every step reads the whole cache, so all cost the same. `draw` is
    (logits [1, num_image], step) → int32 [1].
    """
    slots = jnp.arange(length)

    def run(params: Any) -> Array:
        rows = word_rows(params, (0, config.vocabulary.num_image))
        shared: dict[str, Any] = {"config": config, "execution": execution}

        def step(cache: coglm.Cache, tokens: Array, i: Array) -> tuple[Array, coglm.Cache]:
            slot = length - number + i
            given = inputs.NetworkInput(
                tokens[:, None],
                jnp.full((1, 1), config.image_position, jnp.int32),
                (slots <= slot)[None, None],
            )
            bias = jnp.zeros((1, length))
            hidden, cache = coglm.extend(params, cache, given, slot, bias=bias, **shared)
            return coglm.next_logits(hidden[:, 0], rows, execution=execution), cache

        start = jnp.zeros((1, config.vocabulary.num_image))
        cache = coglm.init_cache(config, 1, length, execution)
        return loops.decode(step, draw, start, cache, number)[0]

    program = jax.jit(run).lower(params).compile()
    return lambda: jax.block_until_ready(program(params))
