"""The InceptionV3 that FID is measured with, and its weights from a user's file.

It is the network of `inception-2015-12-05` (the TensorFlow graph of Heusel et al., arXiv
1706.08500), which differs from the ImageNet one of today: average pools leave the padding out, the
last block has a max pool, the classifier has 1,008 classes. Its weights are published as
`pt_inception-2015-12-05-6726825d.pth` by pytorch-fid, and as `weights-inception-2015-12-05-…` by
torch-fidelity; names here are those of that file. Batch normalisation is folded into the kernels.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# How pictures get to 299 pixels and −1…1. "tensorflow": as the original graph and torch-fidelity
# do, pixel i of the result at i · in / out of the picture. "torch": as pytorch-fid does, with the
# centres of pixels aligned. FIDs of the two differ in the second digit.
Resize = Literal["tensorflow", "torch"]

SIDE = 299
NUM_FEATURES, NUM_CLASSES = 2048, 1008
_EPSILON = 1e-3  # of batch normalisation
_ADVICE = (
    "FID needs the weights of pt_inception-2015-12-05-6726825d.pth, not those of torchvision's"
    " Inception"
)


class Activations(NamedTuple):
    """`pool` [b, 2048] is what FID, KID, precision and recall compare; `logits` [b, 1008], without
    the classifier's bias, are what the Inception Score reads. float32.
    """

    pool: Array
    logits: Array


# A convolution: name, features, kernel (y, x). Those of stride 2 are in `_HALVED`.
_Conv = tuple[str, int, tuple[int, int]]
_Branch = tuple[_Conv, ...]


class _Mixed(NamedTuple):
    """Branches side by side; a branch of `split` ends in two convolutions of the same input.
    `pool` names the last branch's pool, and its convolution has `pooled` features, or none.
    """

    branches: tuple[_Branch, ...]
    pool: Literal["average", "max", "halve"]
    pooled: int = 0
    split: tuple[str, ...] = ()


def _block_a(pooled: int) -> _Mixed:
    return _Mixed(
        (
            (("branch1x1", 64, (1, 1)),),
            (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
            (
                ("branch3x3dbl_1", 64, (1, 1)),
                ("branch3x3dbl_2", 96, (3, 3)),
                ("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        "average",
        pooled,
    )


def _block_c(inner: int) -> _Mixed:
    return _Mixed(
        (
            (("branch1x1", 192, (1, 1)),),
            (
                ("branch7x7_1", inner, (1, 1)),
                ("branch7x7_2", inner, (1, 7)),
                ("branch7x7_3", 192, (7, 1)),
            ),
            (
                ("branch7x7dbl_1", inner, (1, 1)),
                ("branch7x7dbl_2", inner, (7, 1)),
                ("branch7x7dbl_3", inner, (1, 7)),
                ("branch7x7dbl_4", inner, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ),
        ),
        "average",
        192,
    )


def _block_e(pool: Literal["average", "max"]) -> _Mixed:
    return _Mixed(
        (
            (("branch1x1", 320, (1, 1)),),
            (
                ("branch3x3_1", 384, (1, 1)),
                ("branch3x3_2a", 384, (1, 3)),
                ("branch3x3_2b", 384, (3, 1)),
            ),
            (
                ("branch3x3dbl_1", 448, (1, 1)),
                ("branch3x3dbl_2", 384, (3, 3)),
                ("branch3x3dbl_3a", 384, (1, 3)),
                ("branch3x3dbl_3b", 384, (3, 1)),
            ),
        ),
        pool,
        192,
        split=("branch3x3_2b", "branch3x3dbl_3b"),
    )


_BLOCKS: dict[str, _Mixed] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _Mixed(
        (
            (("branch3x3", 384, (3, 3)),),
            (
                ("branch3x3dbl_1", 64, (1, 1)),
                ("branch3x3dbl_2", 96, (3, 3)),
                ("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        "halve",
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _Mixed(
        (
            (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))),
            (
                ("branch7x7x3_1", 192, (1, 1)),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, (3, 3)),
            ),
        ),
        "halve",
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}
_HALVED = {
    "Mixed_6a": {"branch3x3", "branch3x3dbl_3"},
    "Mixed_7a": {"branch3x3_2", "branch7x7x3_4"},
}


def _conv(x: Array, name: str, features: int, kernel: tuple[int, int], **options: Any) -> Array:
    return nn.relu(nn.Conv(features, kernel, name=name, **({"padding": "SAME"} | options))(x))


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class _Block(nn.Module):
    mixed: _Mixed
    halved: frozenset[str]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        parts = []
        for branch in self.mixed.branches:
            out = before = x
            for name, features, kernel in branch:
                options = {"strides": 2, "padding": "VALID"} if name in self.halved else {}
                if name in self.mixed.split:  # beside the one before it
                    parts.append(out)
                    out = before
                before, out = out, _conv(out, name, features, kernel, **options)
            parts.append(out)
        if self.mixed.pool == "average":
            x = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        elif self.mixed.pool == "max":
            x = nn.max_pool(x, (3, 3), padding="SAME")
        else:
            x = _halve(x)
        if self.mixed.pooled:
            x = _conv(x, "branch_pool", self.mixed.pooled, (1, 1))
        return jnp.concatenate([*parts, x], axis=-1)


class Inception(nn.Module):
    """Pictures float32 [b, 299, 299, 3] in −1…1 → `Activations`."""

    @nn.compact
    def __call__(self, x: Array) -> Activations:
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), strides=2, padding="VALID")
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x = _halve(_conv(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = _conv(x, "Conv2d_3b_1x1", 80, (1, 1))
        x = _halve(_conv(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        for name, mixed in _BLOCKS.items():
            x = _Block(mixed, frozenset(_HALVED.get(name, ())), name=name)(x)
        pool = x.mean((1, 2))
        return Activations(pool, nn.Dense(NUM_CLASSES, use_bias=False, name="fc")(pool))


def shapes() -> Any:
    """The parameter tree, as `jax.ShapeDtypeStruct`s."""
    picture = jnp.zeros((1, SIDE, SIDE, 3))
    return jax.eval_shape(lambda: Inception().init(jax.random.key(0), picture))["params"]


@functools.partial(jax.jit, static_argnames="resize")
def apply(params: Any, pictures: Array, *, resize: Resize = "tensorflow") -> Activations:
    """`Activations` of pictures uint8 [b, y, x, 3] of any one size."""
    made: Activations = Inception().apply({"params": params}, resized(pictures, resize))
    return made


def resized(pictures: Array, how: Resize) -> Array:
    """Pictures uint8 [b, y, x, 3] as float32 [b, 299, 299, 3] in −1…1. Bilinear between the two
    nearest pixels, without antialiasing, whatever the size: so FID is defined.
    """
    rows, columns = (jnp.asarray(_weights(side, how)) for side in pictures.shape[1:3])
    x = pictures.astype(jnp.float32)
    x = jnp.einsum("oy,byxc,px->bopc", rows, x, columns, precision="highest")
    return (x - 128) / 128 if how == "tensorflow" else x * (2 / 255) - 1


def _weights(side: int, how: Resize) -> np.ndarray:
    """float32 [299, side]: what each pixel of a line takes of each pixel of the picture."""
    place = np.arange(SIDE) * (side / SIDE)
    if how == "torch":
        place = np.maximum((np.arange(SIDE) + 0.5) * (side / SIDE) - 0.5, 0)
    low = np.minimum(place.astype(int), side - 1)
    share = place - low
    weights = np.zeros((SIDE, side), np.float32)
    np.add.at(weights, (np.arange(SIDE), low), 1 - share)
    np.add.at(weights, (np.arange(SIDE), np.minimum(low + 1, side - 1)), share)
    return weights


# --- The published weights ------------------------------------------------------------------------


def read_weights(file: str | os.PathLike[str]) -> Any:
    """The parameter tree in a file of the published weights, .pth or .safetensors. No code in the
    file is run.

    Raises ValueError, in one line, with everything that is missing or of another shape; OSError if
    the file cannot be read.
    """
    path = Path(file)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    from cogview2_jax.published.torch_files import Tensor, TorchFile

    with TorchFile(path) as opened:
        content = opened.content
        if not isinstance(content, dict):
            raise ValueError(f"{path} has no tensors by name: {_ADVICE}")
        tensors = {name: one for name, one in content.items() if isinstance(one, Tensor)}
        found = {name: (one.shape, one.read) for name, one in tensors.items()}
        return _params(path, found)


def _of_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    from cogview2_jax.files import require_file

    require_file(path)
    try:
        with safe_open(str(path), "numpy") as opened:
            found = {
                name: (
                    tuple(opened.get_slice(name).get_shape()),
                    functools.partial(opened.get_tensor, name),
                )
                for name in opened.keys()
            }
            return _params(path, found)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def _params(
    path: Path, found: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]
) -> Any:
    """The tree, from tensors by their published names: shape, and a function that reads it."""
    tree = shapes()
    layers = {
        ".".join(key.key for key in keys[:-1]): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if keys[-1].key == "kernel"
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        if name == "fc":
            wanted["fc.weight"] = shape[::-1]
            continue
        y, x, inputs, features = shape
        wanted[f"{name}.conv.weight"] = features, inputs, y, x
        for part in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{name}.bn.{part}"] = (features,)
    wrong = [f"no {name}" for name in wanted if name not in found]
    wrong += [
        f"{name} is {list(found[name][0])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name][0] != shape
    ]
    if wrong:
        listed = "; ".join(wrong[:5]) + ("; …" if len(wrong) > 5 else "")
        raise ValueError(f"{path} has {len(wrong)} wrong tensors ({listed}): {_ADVICE}")

    def read(name: str) -> np.ndarray:
        values = found[name][1]().astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} is not finite: copy or download it again")
        return values

    params: dict[str, Any] = {}
    for name in layers:
        *blocks, layer = name.split(".")
        place = params
        for block in blocks:
            place = place.setdefault(block, {})
        if name == "fc":
            place[layer] = {"kernel": read("fc.weight").T.astype(np.float32)}
            continue
        scale = read(f"{name}.bn.weight") / np.sqrt(read(f"{name}.bn.running_var") + _EPSILON)
        kernel = read(f"{name}.conv.weight").transpose(2, 3, 1, 0) * scale
        bias = read(f"{name}.bn.bias") - read(f"{name}.bn.running_mean") * scale
        place[layer] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return params
