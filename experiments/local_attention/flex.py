"""PyTorch's FlexAttention as a peer, where PyTorch is installed and sees a GPU."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.local_attention.programs import Inputs, Program
from pallas_kernels.local_attention.window import Window


def obstacle() -> str | None:
    """Why it cannot run here, or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def compile_flex(inputs: Inputs, window: Window, direction: str) -> Program:
    """The same attention of the same arrays, with the window as a block mask built beforehand.

    Its arrays are [b, h, cells, d], PyTorch's fastest layout. Python dispatches the calls one by
    one, so times below about 0.1 ms may be those of the dispatch.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # PyTorch compiles each shape separately and stops doing so after a few recompilations.
    torch._dynamo.reset()
    _, y, x, _, _ = inputs[0].shape
    q, k, v, dout = (_to_torch(a) for a in inputs)
    mask = create_block_mask(
        mask_of(window, (y, x)), B=None, H=None, Q_LEN=q.shape[2], KV_LEN=k.shape[2], device="cuda"
    )
    attend = torch.compile(flex_attention, dynamic=False)
    if direction != "forward":
        for a in (q, k, v):
            a.requires_grad_()

    def once() -> list[Any]:
        if direction == "forward":
            with torch.no_grad():
                return [attend(q, k, v, block_mask=mask)]
        out = attend(q, k, v, block_mask=mask)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    def run(calls: int) -> None:
        for _ in range(calls):
            once()
        torch.cuda.synchronize()

    run(1)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(a.nbytes for a in once())
    torch.cuda.synchronize()
    temporary = max(0, torch.cuda.max_memory_allocated() - before - outputs)
    shapes = [inputs[0].shape, *(a.shape for a in inputs[:3])]

    def outputs_in_jax() -> list[jax.Array]:
        return [_to_jax(a, shape) for a, shape in zip(once(), shapes, strict=False)]

    return Program(run, outputs_in_jax, 1, temporary)


def mask_of(window: Window, grid: tuple[int, int]) -> Any:
    """Whether query number q sees key number k, both in raster order, for `create_block_mask`."""
    columns, key_columns = grid[1], grid[1] // window.ratio
    row_radius, column_radius = window.radius

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        row = k // key_columns - q // columns // window.ratio
        column = k % key_columns - q % columns // window.ratio
        return (abs(row) <= row_radius) & (abs(column) <= column_radius)

    return sees


def _to_torch(array: jax.Array) -> Any:
    """[b, y, x, h, d] to [b, h, y * x, d]."""
    import torch

    b, y, x, h, d = array.shape
    # PyTorch cannot read NumPy's bfloat16.
    host = torch.from_numpy(np.array(array.astype(jnp.float32))).reshape(b, y * x, h, d)
    return host.to("cuda", getattr(torch, str(array.dtype))).transpose(1, 2).contiguous()


def _to_jax(tensor: Any, shape: tuple[int, ...]) -> jax.Array:
    host = tensor.detach().float().transpose(1, 2).cpu().numpy()
    return jnp.asarray(host.reshape(shape))
