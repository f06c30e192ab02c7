"""The same networks in the best plain PyTorch: a preallocated cache, a compiled decoding step,
`scaled_dot_product_attention`, and FlexAttention, compiled, for the windows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cogview2_jax.config import CogLMConfig, DirectSRConfig, IterativeSRConfig
from experiments.generation_speed.peers import (
    Published,
    Tensor,
    Weights,
    block,
    embed,
    joined,
    linear,
    logits_of,
    split_heads,
)
from experiments.local_attention.flex import mask_of
from pallas_kernels.local_attention.window import Window


class Best(Published):
    """The best plain PyTorch: same results."""

    name = "best_torch"

    def __init__(self, labels: np.ndarray, clusters: int) -> None:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        super().__init__(labels, clusters)
        self._layer_step = torch.compile(_cached_block, dynamic=False)
        # By itself: inductor fails where it is compiled together with the products around it.
        self._flex = torch.compile(flex_attention, dynamic=False)

    def begin(
        self, model: Weights, text: Sequence[int], batch: int, config: CogLMConfig, upweight: float
    ) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
        import torch

        length, vocabulary, sizes = len(text), config.vocabulary, config.transformer
        total = length + 1 + config.num_image_tokens
        shape = (batch, sizes.num_heads, total, sizes.head_dim)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in model["layers"]]
        slots = torch.arange(total)
        weight = torch.where(slots < length, upweight, 0.0)

        def extend(
            run: Callable[..., Tensor], tokens: Tensor, positions: Tensor, at: Tensor
        ) -> Tensor:
            x = embed(model, tokens, positions)
            seen = (slots < length) | ((at[:, None] >= length) & (slots <= at[:, None]))
            bias = torch.where(seen, weight, -torch.inf)[None, None]
            for layer, (keys, values) in zip(model["layers"], caches, strict=True):
                x = run(layer, x, keys, values, bias, at)
            return logits_of(model, x[:, -1], vocabulary.num_image)

        tokens = torch.tensor([*text, vocabulary.start_of_image]).expand(batch, -1)
        positions = torch.tensor([*range(length), config.image_position - 1])[None]

        def step(tokens: Tensor, i: int) -> Tensor:
            position = torch.tensor([[config.image_position + i]])
            at = torch.tensor([length + 1 + i])
            return extend(self._layer_step, tokens[:, None], position, at)

        return extend(_cached_block, tokens, positions, slots[: length + 1]), step

    def _top_k(self, logits: Tensor, k: int) -> Tensor:
        import torch

        kept, ids = logits.topk(k)
        return ids.gather(1, torch.multinomial(torch.softmax(kept, -1), 1))[:, 0]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    # Windows by FlexAttention: coarse cells or text first, then the cells.

    def _direct_windows(self, config: DirectSRConfig) -> Any:
        fine = mask_of(Window(*config.window), config.grid)
        cross = mask_of(Window(*config.cross_window, ratio=config.ratio), config.grid)
        return _block_mask(fine, cross, config.grid, config.coglm.num_image_tokens)

    def _iterative_windows(self, config: IterativeSRConfig, words: Tensor) -> Any:
        fine, known = mask_of(Window(*config.window), config.grid), words[0]

        def text(b: Any, h: Any, q: Any, k: Any) -> Any:
            return known[k]

        return _block_mask(fine, text, config.grid, config.text_slots)

    def _windowed_over_two(
        self, first: tuple[Tensor, ...], fine: tuple[Tensor, ...], windows: Any
    ) -> Tensor:
        import torch

        cells = windows.seq_lengths[1] - fine[0].shape[2]
        k, v = (torch.cat([first[t][:, :, -cells:], fine[t]], dim=2) for t in (1, 2))
        return self._flex(fine[0].contiguous(), k, v, block_mask=windows)

    def _windowed_and_text(
        self, q: Tensor, k: Tensor, v: Tensor, slots: int, words: Tensor, windows: Any
    ) -> Tensor:
        q, k, v = (t.contiguous() for t in (q[:, :, slots:], k, v))
        return self._flex(q, k, v, block_mask=windows)


def _cached_block(
    layer: Weights, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, at: Tensor
) -> Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    def attend(x: Tensor) -> Tensor:
        q, k, v = split_heads(linear(layer, "qkv", x), keys.shape[1])
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        out = scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return linear(layer, "dense", joined(out))

    return block(layer, x, attend)


def _block_mask(fine: Any, others: Any, grid: tuple[int, int], before: int) -> Any:
    """The mask of queries on the grid over `before` other keys, then the keys on the grid."""
    from torch.nn.attention.flex_attention import create_block_mask

    cells = grid[0] * grid[1]

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        other = others(b, h, q, k.clamp(max=before - 1))
        return ((k < before) & other) | ((k >= before) & fine(b, h, q, k - before))

    return create_block_mask(sees, B=None, H=None, Q_LEN=cells, KV_LEN=before + cells, device="cpu")


def local_attention(
    window: Window, grid: tuple[int, int], heads: int, dim: int
) -> dict[str, Callable[[], Any]]:
    """Compiled FlexAttention, and SDPA over all cells with a dense mask: float32, batch 1."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    cells = grid[0] * grid[1]
    q, k, v = torch.randn(3, 1, heads, cells, dim)
    sees = mask_of(window, grid)
    mask = create_block_mask(sees, B=None, H=None, Q_LEN=cells, KV_LEN=cells, device="cpu")
    dense = torch.from_numpy(window.dense_mask(grid).reshape(cells, cells))
    attend = torch.compile(flex_attention, dynamic=False)
    return {
        "flex_attention": lambda: attend(q, k, v, block_mask=mask),
        "global_sdpa": lambda: scaled_dot_product_attention(q, k, v, attn_mask=dense),
    }
