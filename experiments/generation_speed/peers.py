"""The same networks in plain PyTorch, as published: keys and values grow by concatenation, masks
are dense, windows are unfolded, nothing is compiled.

They read our parameters and compute our logits, which `run.py` checks. Texts are ids without pads,
the same for every sample of a batch. PyTorch is optional: see `obstacle`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cogview2_jax.config import ClusterSampling, CogLMConfig, DirectSRConfig, IterativeSRConfig
from pallas_kernels.local_attention.window import Window

Weights = dict[str, Any]
Tensor = Any
MASKED_SCORE = -10000.0


def obstacle() -> str | None:
    """Why the peers cannot run here, or None if they can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: its rows are left out (pip install torch)"
    return None


def version() -> str:
    import torch

    return str(torch.__version__)


def inference() -> Any:
    """The context in which the peers run."""
    import torch

    return torch.inference_mode()


def tensor(array: Any) -> Tensor:
    """An array of ours as a tensor of its dtype."""
    import torch

    return torch.from_numpy(np.array(array))


def weights(params: Any) -> Weights:
    """Our parameters as tensors: tables, and a list of layers with matrices [out, in]."""

    def layer(number: int) -> Weights:
        found: Weights = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"]):
            *_, module, kind = (key.key for key in path)
            if module == "query_key_value":
                module = path[-3].key
            one = np.asarray(leaf[number])
            found[f"{module}.{kind}"] = tensor(np.ascontiguousarray(one.T))
        return found

    number = jax.tree.leaves(params["layers"])[0].shape[0]
    tables = ("position_embeddings", "extra_position_embeddings")
    positions = np.concatenate([np.asarray(params[name]) for name in tables if name in params])
    return {
        "words": tensor(params["word_embeddings"]),
        "positions": tensor(positions),
        "norm": [tensor(params["final_layernorm"][kind]) for kind in ("scale", "bias")],
        "layers": [layer(n) for n in range(number)],
    }


# --- What both peers share ------------------------------------------------------------------------


def _norm(layer: Weights, name: str, x: Tensor) -> Tensor:
    from torch.nn.functional import layer_norm

    return layer_norm(x, x.shape[-1:], layer[f"{name}.scale"], layer[f"{name}.bias"], 1e-5)


def linear(layer: Weights, name: str, x: Tensor) -> Tensor:
    from torch.nn.functional import linear

    return linear(x, layer[f"{name}.kernel"], layer[f"{name}.bias"])


def block(layer: Weights, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    from torch.nn.functional import gelu

    x = x + _norm(layer, "third_layernorm", attend(_norm(layer, "input_layernorm", x)))
    out = linear(layer, "dense_h_to_4h", _norm(layer, "post_attention_layernorm", x))
    out = linear(layer, "dense_4h_to_h", gelu(out, approximate="tanh"))
    return x + _norm(layer, "fourth_layernorm", out)


def split_heads(packed: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[b, s, n·e] to n tensors [b, h, s, e / h]; n is 3 of QKV, 2 of a cache."""
    b, s, _ = packed.shape
    width = 3 if packed.shape[-1] % 3 == 0 else 2
    split = packed.reshape(b, s, width, heads, -1).permute(2, 0, 3, 1, 4)
    return tuple(split)


def joined(out: Tensor) -> Tensor:
    """[b, h, s, d] to [b, s, h·d]."""
    return out.transpose(1, 2).flatten(2)


def embed(model: Weights, tokens: Tensor, positions: Tensor) -> Tensor:
    return model["words"][tokens] + model["positions"][positions]


def logits_of(model: Weights, hidden: Tensor, number: int) -> Tensor:
    from torch.nn.functional import layer_norm, linear

    hidden = layer_norm(hidden, hidden.shape[-1:], *model["norm"], 1e-5)
    return linear(hidden, model["words"][:number])


def _drawn_from_clusters(
    logits: Tensor, labels: Tensor, number: int, sampling: ClusterSampling
) -> Tensor:
    """A token for each row of logits [rows, v], by the published two steps: int64 [rows]."""
    import torch

    scaled = logits / sampling.temperature
    sums = torch.zeros(len(logits), number)
    sums.scatter_add_(1, labels.expand_as(scaled), torch.softmax(scaled, -1))
    kept, of_kept = sums.topk(min(sampling.top_clusters, number))
    cluster = of_kept.gather(1, torch.multinomial(kept, 1))
    within = (scaled / sampling.within_temperature).masked_fill(labels != cluster, -torch.inf)
    return torch.multinomial(torch.softmax(within, -1), 1)[:, 0]


class Published:
    """The released algorithm."""

    name = "published"

    def __init__(self, labels: np.ndarray, clusters: int) -> None:
        import torch

        self.labels, self.clusters = torch.from_numpy(labels).long()[None], clusters

    # Stage 1.

    def begin(
        self, model: Weights, text: Sequence[int], batch: int, config: CogLMConfig, upweight: float
    ) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
        """Runs `text <start_of_image>`: the logits [b, v] of cell 0, and a function (cell i
        int64 [b], i) → logits of cell i + 1.
        """
        import torch

        length, vocabulary = len(text), config.vocabulary
        heads = config.transformer.num_heads
        total = length + 1 + config.num_image_tokens
        mask = torch.ones(total, total).tril()
        mask[:, :length] = 1
        weight = torch.zeros(total)
        weight[:length] = upweight
        caches: list[Tensor] = [torch.zeros(batch, 0, 2 * config.transformer.hidden_size)] * len(
            model["layers"]
        )

        def extend(tokens: Tensor, positions: Tensor) -> Tensor:
            x = embed(model, tokens, positions)
            for number, layer in enumerate(model["layers"]):

                def attend(x: Tensor, layer: Weights = layer, number: int = number) -> Tensor:
                    packed = linear(layer, "qkv", x)
                    q = split_heads(packed, heads)[0]
                    width = packed.shape[-1] // 3
                    caches[number] = torch.cat([caches[number], packed[..., width:]], dim=1)
                    b, t, _ = caches[number].shape
                    k, v = caches[number].view(b, t, 2, heads, -1).permute(2, 0, 3, 1, 4)
                    seen = mask[None, None, t - q.shape[2] : t, :t]
                    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + weight[:t]
                    scores = scores * seen + MASKED_SCORE * (1 - seen)
                    return linear(layer, "dense", joined(torch.softmax(scores, -1) @ v))

                x = block(layer, x, attend)
            return logits_of(model, x[:, -1], vocabulary.num_image)

        tokens = torch.tensor([*text, vocabulary.start_of_image]).expand(batch, -1)
        positions = torch.tensor([*range(length), config.image_position - 1])[None]

        def step(tokens: Tensor, i: int) -> Tensor:
            return extend(tokens[:, None], torch.tensor([[config.image_position + i]]))

        return extend(tokens, positions), step

    def decode(
        self,
        model: Weights,
        text: Sequence[int],
        batch: int,
        config: CogLMConfig,
        sampling: ClusterSampling,
        upweight: float,
    ) -> Tensor:
        """All cells of `batch` pictures, int64 [b, cells]."""
        import torch

        logits, step = self.begin(model, text, batch, config, upweight)
        drawn = []
        for i in range(config.num_image_tokens):
            drawn.append(_drawn_from_clusters(logits, self.labels, self.clusters, sampling))
            if i + 1 < config.num_image_tokens:
                logits = step(drawn[-1], i)
        return torch.stack(drawn, 1)

    # Super-resolution.

    def direct_logits(
        self, model: Weights, given: tuple[Tensor, ...], config: DirectSRConfig
    ) -> Tensor:
        """Logits [cells, v] of one picture; `given` is tokens, positions [1, s] and the mask
        [1, p, p] of the prefix.
        """
        tokens, positions, mask = given
        windows = self._direct_windows(config)
        heads, prefix = config.coglm.transformer.num_heads, config.num_prefix
        x = embed(model, tokens, positions)
        for layer in model["layers"]:
            x = self._direct_block(layer, x, mask, windows, heads, prefix)
        return logits_of(model, x[0, prefix:], config.coglm.vocabulary.num_image)

    def _direct_block(
        self, layer: Weights, x: Tensor, mask: Tensor, windows: Any, heads: int, prefix: int
    ) -> Tensor:
        import torch

        def attend(x: Tensor) -> Tensor:
            first = split_heads(linear(layer, "qkv", x[:, :prefix]), heads)
            fine = split_heads(linear(layer, "qkv_plus", x[:, prefix:]), heads)
            dense = joined(self._dense(first[0], first[1], first[2], mask))
            local = joined(self._windowed_over_two(first, fine, windows))
            out = linear(layer, "dense", dense), linear(layer, "dense_plus", local)
            return torch.cat(out, dim=1)

        return block(layer, x, attend)

    def direct(
        self,
        model: Weights,
        given: tuple[Tensor, ...],
        config: DirectSRConfig,
        sampling: ClusterSampling,
    ) -> tuple[Tensor, Tensor]:
        """All fine cells int64 [cells], and their logits."""
        logits = self.direct_logits(model, given, config)
        return _drawn_from_clusters(logits, self.labels, self.clusters, sampling), logits

    def iterative_logits(
        self, model: Weights, given: tuple[Tensor, ...], config: IterativeSRConfig
    ) -> Tensor:
        """Logits [cells, v] of one picture; `given` is tokens, positions [1, s] and the mask
        [1, text slots].
        """
        tokens, positions, words = given
        windows = self._iterative_windows(config, words)
        heads, slots = config.transformer.num_heads, config.text_slots
        x = embed(model, tokens, positions)
        for layer in model["layers"]:
            x = self._iterative_block(layer, x, words, windows, heads, slots)
        return logits_of(model, x[0, slots:], config.vocabulary.num_image)

    def _iterative_block(
        self, layer: Weights, x: Tensor, words: Tensor, windows: Any, heads: int, slots: int
    ) -> Tensor:
        import torch

        def attend(x: Tensor) -> Tensor:
            q, k, v = split_heads(linear(layer, "qkv", x), heads)
            text = self._dense(q[:, :, :slots], k[:, :, :slots], v[:, :, :slots], words[:, None])
            image = self._windowed_and_text(q, k, v, slots, words, windows)
            return linear(layer, "dense", joined(torch.cat([text, image], dim=2)))

        return block(layer, x, attend)

    def iterative(
        self,
        model: Weights,
        given: tuple[Tensor, ...],
        config: IterativeSRConfig,
        reset: np.ndarray,
        top_k: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        """The rounds of `reset`, bool [rounds, cells], each with its `top_k`: the cells int64
        [cells], and the logits of the last round.
        """
        import torch

        tokens, positions, words = given
        cells = tokens[0, config.text_slots :].clone()
        for masked, k in zip(torch.from_numpy(reset), top_k, strict=False):
            shown = cells.masked_fill(masked, config.vocabulary.start_of_image)
            row = torch.cat([tokens[0, : config.text_slots], shown])[None]
            logits = self.iterative_logits(model, (row, positions, words), config)
            cells = torch.where(masked, self._top_k(logits, k), cells)
        return cells, logits

    def _top_k(self, logits: Tensor, k: int) -> Tensor:
        import torch

        limit = logits.topk(k)[0][:, -1:]
        kept = logits.masked_fill(logits < limit, -torch.inf)
        return torch.multinomial(torch.softmax(kept, -1), 1)[:, 0]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        import torch

        seen = mask[:, None].float()
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return torch.softmax(scores * seen + MASKED_SCORE * (1 - seen), -1) @ v

    # Windows by unfold: [b, h, d, keys of a window, cells].

    def _direct_windows(self, config: DirectSRConfig) -> Any:
        import torch

        fine, coarse = Window(*config.window), Window(*config.cross_window, ratio=config.ratio)
        y, x = np.indices(config.grid) // config.ratio
        parent = torch.from_numpy((y * config.coglm.grid[1] + x).reshape(-1))
        return fine, config.grid, coarse, config.coglm.grid, parent

    def _iterative_windows(self, config: IterativeSRConfig, words: Tensor) -> Any:
        return Window(*config.window), config.grid

    def _unfolded(self, t: Tensor, window: Window, grid: tuple[int, int]) -> Tensor:
        from torch.nn.functional import unfold

        b, h, _, d = t.shape
        cells = t.permute(0, 1, 3, 2).reshape(b * h, d, *grid)
        found = unfold(cells, (window.rows, window.columns), padding=window.radius)
        return found.view(b, h, d, window.rows * window.columns, -1)

    def _outside(self, window: Window, grid: tuple[int, int]) -> Tensor:
        """True at the keys of each cell's window that are out of the grid: [keys, cells]."""
        import torch
        from torch.nn.functional import unfold

        inside = unfold(
            torch.ones(1, 1, *grid), (window.rows, window.columns), padding=window.radius
        )
        return inside[0] == 0

    def _windowed_over_two(
        self, first: tuple[Tensor, ...], fine: tuple[Tensor, ...], windows: Any
    ) -> Tensor:
        import torch

        window, grid, cross, coarse_grid, parent = windows
        cells = coarse_grid[0] * coarse_grid[1]
        q = fine[0].transpose(-1, -2) / fine[0].shape[-1] ** 0.5
        parts = []
        for t in (1, 2):
            coarse = self._unfolded(first[t][:, :, -cells:], cross, coarse_grid)[..., parent]
            parts.append((coarse, self._unfolded(fine[t], window, grid)))
        outside = (self._outside(cross, coarse_grid)[:, parent], self._outside(window, grid))
        scores = [
            torch.einsum("bhdn,bhdkn->bhkn", q, keys).masked_fill(out, MASKED_SCORE)
            for keys, out in zip(parts[0], outside, strict=True)
        ]
        shares = torch.softmax(torch.cat(scores, dim=2), dim=2).split(
            [len(out) for out in outside], dim=2
        )
        return sum(
            torch.einsum("bhkn,bhdkn->bhnd", share, values)
            for share, values in zip(shares, parts[1], strict=True)
        )

    def _windowed_and_text(
        self, q: Tensor, k: Tensor, v: Tensor, slots: int, words: Tensor, windows: Any
    ) -> Tensor:
        import torch

        window, grid = windows
        q = q[:, :, slots:] / q.shape[-1] ** 0.5
        keys, values = (self._unfolded(t[:, :, slots:], window, grid) for t in (k, v))
        local = torch.einsum("bhnd,bhdkn->bhnk", q, keys)
        local = local.masked_fill(self._outside(window, grid).T, MASKED_SCORE)
        text = (q @ k[:, :, :slots].transpose(-1, -2)).masked_fill(
            ~words[:, None, None], -torch.inf
        )
        shares = torch.softmax(torch.cat([text, local], -1), -1)
        out = shares[..., :slots] @ v[:, :, :slots]
        return out + torch.einsum("bhnk,bhdkn->bhnd", shares[..., slots:], values)
