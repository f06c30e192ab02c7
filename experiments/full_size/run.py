"""How fast is a picture made at the published size, as a multiple of the device's bounds?

\b
    python -m experiments.full_size.run --json results.json
    python -m experiments.full_size.run --small          # tries the code out, anywhere

Text to 480 pixels with 19.5 billion random parameters, one network on the device after another.
Decoding is bounded by the bytes of the weights, super-resolution by its products; bandwidth and
matrix rate are measured in the same run. Beside it, one token at a time over all 3,600 cells with
the same network.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp

from cogview2_jax import config as configs
from cogview2_jax.decoding.sampling import sample_clusters
from cogview2_jax.description import Description
from cogview2_jax.pipeline import memory
from cogview2_jax.pipeline.memory import NETWORK_OF, PRECISIONS
from cogview2_jax.sharding import Execution
from experiments import results
from experiments.full_size.memory import GIB, PUBLISHED
from experiments.generation_speed import bounds, one_by_one, workload
from experiments.local_attention.bounds import Rates
from experiments.local_attention.report import device_name

# The stages that a bound is stated for, and the most times of it that they should take.
LIMITS = {"base": 1.5, "direct": 2.0, "iterative": 2.0}
SMALL = Description(
    workload.SMALL.coglm,
    workload.SMALL.direct,
    workload.SMALL.iterative,
    configs.HVQVAEConfig(
        channels=8,
        encoder_multipliers=(1, 1, 1),
        encoder_blocks=1,
        decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
        groups=4,
        z_channels=8,
        codebook_size=workload.SMALL.image_tokens,
        codebook_dim=8,
    ),
    configs.Sampling(),
    {},
)
_STEPS = 64  # of decoding one token at a time; all cost the same


def random_params(description: Description, network: str, dtype: str) -> Any:
    """Random parameters of a network, made on the device."""
    shapes = memory.parameters(description, network, PRECISIONS[dtype])

    def one(number: int, path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), number)
        if like.dtype == jnp.int8:
            return jax.random.randint(key, like.shape, -127, 128, jnp.int8)
        if path[-1].key in ("scale", "kernel_scale"):
            return jnp.full(like.shape, 1 if path[-1].key == "scale" else 2e-4, like.dtype)
        return 0.02 * jax.random.normal(key, like.shape, like.dtype)

    paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
    make = jax.jit(one, static_argnums=(1, 2))
    return jax.tree.unflatten(tree, [make(n, *leaf) for n, leaf in enumerate(paths)])


def _run(program: Any, params: Any, arguments: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(program(params, *arguments))


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def bound(
    description: Description, stage: str, batch: int, found: Rates, dtype: str
) -> float | None:
    """The least seconds of a stage; None where none is stated."""
    if stage == "base":
        itemsize = 1 if dtype == "int8" else PRECISIONS[dtype].params
        size = itemsize if isinstance(itemsize, int) else jnp.dtype(itemsize).itemsize
        return bounds.base_seconds(description.coglm_config, batch, found, size)
    if stage == "direct":
        return batch * bounds.direct_flops(description.direct_config) / found.flops
    if stage == "iterative":
        return batch * bounds.iterative_flops(description.iterative_config) / found.flops
    return None


def peak_bytes() -> int | None:
    """The most device memory since the process began; None where the device does not say."""
    found = jax.devices()[0].memory_stats()
    return found.get("peak_bytes_in_use") if found else None


def measure(
    description: Description, dtype: str, batches: tuple[int, ...], repeats: int
) -> dict[str, Any]:
    """Figures of every stage and batch, of one token at a time, and of whole pictures."""
    precision = PRECISIONS[dtype]
    compute = jnp.dtype(precision.compute).name
    rates = [bounds.rates(compute)]
    params, network, one_by_one_seconds = None, "", 0.0
    stages: list[dict[str, Any]] = []
    for stage in NETWORK_OF:
        if NETWORK_OF[stage] != network:
            params = None  # released before the next one is made
            network = NETWORK_OF[stage]
            params = random_params(description, network, dtype)
        for batch in batches:
            arguments = memory.example(description, stage, batch)
            program = memory.lowered(description, stage, batch, precision).compile()
            seconds = fastest(functools.partial(_run, program, params, arguments), repeats)
            planned = sum(memory.usage_of(program, params))
            row: dict[str, Any] = {
                "stage": stage,
                "batch": batch,
                "seconds": seconds,
                "planned": planned,
            }
            stages.append(row | {"peak": peak_bytes()})
            click.echo(f"{stage:10s} batch {batch:2d} {seconds:9.3f} s", err=True)
        if stage == "base":
            one_by_one_seconds = _one_by_one(description, params, dtype)
    rates.append(bounds.rates(compute))
    found = Rates(max(each.flops for each in rates), max(each.bytes for each in rates))
    for row in stages:
        least = bound(description, row["stage"], row["batch"], found, dtype)
        row["bound"] = least
        row["times_bound"] = row["seconds"] / least if least else None
    whole = {
        str(batch): sum(row["seconds"] for row in stages if row["batch"] == batch)
        for batch in batches
    }
    return {
        "device": device_name(),
        "dtype": dtype,
        "gigabytes_a_second": round(found.bytes / 1e9, 2),
        "teraflops": round(found.flops / 1e12, 3),
        "stages": stages,
        "whole_seconds": whole,
        "pictures_a_minute": {batch: 60 * int(batch) / seconds for batch, seconds in whole.items()},
        "one_token_at_a_time_seconds": one_by_one_seconds,
        "times_faster_than_one_token_at_a_time": one_by_one_seconds / whole[str(min(batches))],
    }


def _one_by_one(description: Description, params: Any, dtype: str) -> float:
    """Seconds of one picture's fine cells, drawn one after another by CogLM."""
    config, sampling = description.coglm_config, description.sampling.base
    fine = description.direct_config.num_image_tokens
    number = config.vocabulary.num_image
    clusters = min(memory.CLUSTERS, number)
    labels, key = jnp.arange(number) % clusters, jax.random.key(0)

    def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
        return sample_clusters(jax.random.fold_in(key, i), logits, labels, clusters, sampling)

    length, execution = config.max_text + 1 + fine, Execution(PRECISIONS[dtype])
    steps = min(_STEPS, fine)
    call = one_by_one.decoder(params, config, draw, length, steps, execution)
    return fastest(call, 2) * fine / steps


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['device']}, {found['dtype']}: {found['gigabytes_a_second']} GB/s,"
        f" {found['teraflops']} TFLOP/s",
        f"{'stage':10s}{'batch':>6s}{'seconds':>11s}{'bound':>11s}{'times':>7s}{'peak GiB':>10s}"
        f"{'planned':>9s}",
    ]
    for row in found["stages"]:
        least = f"{row['bound']:11.4f}{row['times_bound']:7.2f}" if row["bound"] else " " * 18
        peak = f"{row['peak'] / GIB:10.2f}" if row["peak"] else f"{'-':>10s}"
        lines.append(
            f"{row['stage']:10s}{row['batch']:6d}{row['seconds']:11.4f}{least}{peak}"
            f"{row['planned'] / GIB:9.2f}"
        )
    for batch, seconds in found["whole_seconds"].items():
        minute = found["pictures_a_minute"][batch]
        lines.append(f"whole, batch {batch}: {seconds:.3f} s, {minute:.2f} pictures a minute")
    lines.append(
        f"one token at a time: {found['one_token_at_a_time_seconds']:.1f} s,"
        f" {found['times_faster_than_one_token_at_a_time']:.1f} times"
    )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--dtype", type=click.Choice([*PRECISIONS]), default="bfloat16", show_default=True)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 4, 16))
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--small", is_flag=True, help="Small networks.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    dtype: str, batches: tuple[int, ...], repeats: int, small: bool, json_file: Path | None
) -> None:
    begin = time.monotonic()
    found = measure(SMALL if small else PUBLISHED, dtype, batches, repeats)
    click.echo(table(found))
    for row in found["stages"]:
        most = LIMITS.get(row["stage"])
        if most and row["times_bound"] > most:
            click.echo(
                f"{row['stage']}, batch {row['batch']}: {row['times_bound']:.2f} times its bound,"
                f" at most {most} hoped for",
                err=True,
            )
    if json_file:
        results.write(json_file, found, None, begin)


if __name__ == "__main__":
    main()
