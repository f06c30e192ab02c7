"""What is timed: compiled programs, checked against each other, then run in turn."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.local_attention.window import Window

# The host needs some tens of microseconds to call a GPU program, as long as the fastest kernels
# take. So a program timed there attends several times, until it keeps the GPU busy this long.
_BUSY_SECONDS = 4e-4
_MOST_APPLICATIONS = 8
Inputs = tuple[jax.Array, ...]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Program:
    """`run(n)` calls the program n times and waits; a call attends `applications` times.

    `outputs` are those of one application, and `temporary` are its bytes apart from inputs and
    outputs.
    """

    run: Callable[[int], None]
    outputs: Callable[[], list[jax.Array]]
    applications: int
    temporary: int


def draw(
    grid: tuple[int, int], window: Window, *, batch: int, heads: int, dim: int, dtype: str
) -> Inputs:
    """q, k, v and the output's cotangent: random, because zeros and ones can run faster."""
    key_grid = grid[0] // window.ratio, grid[1] // window.ratio
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, *g, heads, dim) for g in (grid, key_grid, key_grid, grid)]
    q, k, v, dout = (
        jax.random.normal(key, s, jnp.float32).astype(dtype)
        for key, s in zip(keys, shapes, strict=True)
    )
    return q, k, v, dout


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """From (q, k, v, dout) to the output and the gradients by q, k and v."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    return both


def copies(inputs: Inputs, number: int) -> list[Inputs]:
    """The inputs and their copies, `number` in total."""
    return [inputs, *(tuple(a.copy() for a in inputs) for _ in range(number - 1))]


def compile_jax(function: Callable[..., Any], sets: list[Inputs]) -> Program:
    """One program that applies the function to each of several sets of inputs.

    The compiler cannot see that they are copies, so it leaves no application out. Together they are
    larger than a GPU's cache, while one set may not be.
    """

    def everything(*sets: Inputs) -> list[Any]:
        return [function(*arrays) for arrays in sets]

    compiled = jax.jit(everything).lower(*sets).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(
            f"{jax.default_backend()} does not report how much memory a program needs"
        )

    def run(calls: int) -> None:
        jax.block_until_ready([compiled(*sets) for _ in range(calls)])

    def outputs() -> list[jax.Array]:
        return jax.tree.leaves(compiled(*sets)[0])

    return Program(run, outputs, len(sets), int(analysis.temp_size_in_bytes))


def busy_applications(program: Program) -> int:
    """How many applications a program needs so that its time is not that of its launch."""
    if jax.default_backend() == "cpu":
        return 1
    program.run(1)
    start = time.perf_counter()
    program.run(10)
    seconds = (time.perf_counter() - start) / 10
    return max(1, min(_MOST_APPLICATIONS, math.ceil(_BUSY_SECONDS / seconds)))


def largest_error(got: list[jax.Array], expected: list[jax.Array]) -> float:
    """The largest error of all arrays, relative to the array's largest number if that is over 1."""

    @jax.jit
    def error(a: jax.Array, e: jax.Array) -> jax.Array:
        a, e = a.astype(jnp.float32), e.astype(jnp.float32)
        return jnp.abs(a - e).max() / jnp.maximum(1.0, jnp.abs(e).max())

    return max(float(error(a, e)) for a, e in zip(got, expected, strict=True))


def tolerance(dtype: str) -> float:
    """The largest error allowed between two implementations."""
    if dtype != "float32":
        return 3e-2
    # XLA multiplies float32 in TF32 on a GPU.
    return 1e-4 if jax.default_backend() == "cpu" else 1e-2


def time_in_turn(
    programs: dict[Name, Program], repeats: int
) -> tuple[dict[Name, list[float]], dict[Name, list[float]]]:
    """Seconds an application, by the clock and of all threads; in turn, so all share the load."""
    calls = {}
    for name, program in programs.items():
        program.run(1)
        start = time.perf_counter()
        program.run(1)
        # Some milliseconds of calls, none of which waits for the one before.
        calls[name] = max(1, min(50, int(5e-3 / (time.perf_counter() - start))))
    wall: dict[Name, list[float]] = {name: [] for name in programs}
    cpu: dict[Name, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            program.run(calls[name])
            count = calls[name] * program.applications
            wall[name].append((time.perf_counter() - start) / count)
            cpu[name].append((time.process_time() - cpu_start) / count)
    return wall, cpu
