"""What would training the published networks take? Compiled for up to 1,024 devices, without one.

\b
    python -m experiments.scale_plan.run --json experiments/scale_plan/results.json
    python -m experiments.scale_plan.run --real        # on a GPU: a real step of 1 B parameters

The train steps of CogLM (5.9 B parameters) and direct super-resolution (7.7 B) are compiled for
meshes of H200, by XLA's CUDA compiler if it is installed (pip install '.[compile-gate]'), else by
the CPU compiler: that one is right about arguments, up to twice too high in temporaries, and says
nothing about collectives. README.md lists all assumptions.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
from tqdm import tqdm

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    Precision,
    Training,
    TransformerConfig,
)
from cogview2_jax.networks import coglm, direct_sr, inputs
from cogview2_jax.sharding import Execution, Sharding, make_mesh
from cogview2_jax.training import metrics
from cogview2_jax.training.coglm_samples import TrainingSample
from cogview2_jax.training.losses import coglm_loss, direct_sr_loss
from cogview2_jax.training.step import (
    TrainState,
    adamw,
    init_params,
    init_state,
    make_step,
    state_shardings,
    warmup_cosine,
)
from experiments.scale_plan import estimate
from experiments.scale_plan.estimate import GB, Machine

# data, fsdp, tensor
MESHES = (
    (1, 8, 1),
    (1, 4, 2),
    (1, 64, 1),
    (8, 8, 1),
    (1, 32, 2),
    (4, 64, 1),
    (32, 8, 1),
    (16, 64, 1),
    (128, 8, 1),
    (64, 8, 2),
)
PRECISION = Precision(compute=jnp.bfloat16)
TRAINING = Training(remat="all")
RECOMPUTED = 4 / 3  # one more forward pass than forward and backward


class Network(NamedTuple):
    """A network and the samples that a device (or a group along "tensor") sees in a step."""

    name: str
    config: Any
    module: Any
    samples: int


NETWORKS = (
    Network("CogLM", CogLMConfig(), coglm, 16),
    Network("direct SR", DirectSRConfig(), direct_sr, 4),
)


class Planned(NamedTuple):
    """A compiled step, its arguments, and the exact bytes of them on a device."""

    compiled: Any
    batch_size: int
    parameters: int
    optimizer: int
    batch: int


# --- The step, without arrays ---------------------------------------------------------------------


def batch_of(network: Network, size: int) -> Any:
    """Shapes of a batch of `size` samples."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    config = network.config
    if isinstance(config, CogLMConfig):
        length = config.text_slots + 1 + config.num_image_tokens
        tokens, seen = array(length), array(length, dtype=jnp.bool_)
        mask, kind = array(length, length, dtype=jnp.bool_), array(length, dtype=jnp.int8)
        return TrainingSample(tokens, tokens, tokens, mask, seen, kind)
    slots, fine = config.text_slots, config.num_image_tokens
    text = (array(slots), array(slots, dtype=jnp.bool_))
    return (
        *text,
        array(config.coglm.num_image_tokens),
        array(fine),
        array(fine, dtype=jnp.float32),
    )


def loss_of(network: Network, sharding: Sharding | None) -> Any:
    how: dict[str, Any] = {
        "config": network.config,
        "execution": Execution(PRECISION, TRAINING, sharding),
    }

    def base_loss(params: Any, batch: Any, key: Any) -> Any:
        return *coglm_loss(params, batch, **how), ()

    def direct_loss(params: Any, batch: Any, key: Any) -> Any:
        text, is_text, coarse, fine, weights = batch
        given = inputs.direct_super_resolution(text, is_text, coarse, network.config)
        return *direct_sr_loss(params, given, fine, weights, **how), ()

    return base_loss if isinstance(network.config, CogLMConfig) else direct_loss


def plan(network: Network, sharding: Sharding) -> Planned:
    """Compile the train step for a mesh; its devices need not exist."""
    module, config = network.module, network.config
    init = functools.partial(module.init_params, config=config)
    shapes, axes = jax.eval_shape(init, jax.random.key(0)), module.parameter_axes(config)
    optimizer = adamw(warmup_cosine(4e-4, 100_000, 10_000))

    def placed(shape: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    def state_of(params: Any) -> TrainState:
        return TrainState(params, optimizer.init(params), (), (), jnp.zeros((), jnp.int32))

    params = jax.tree.map(placed, shapes, sharding.of_tree(shapes, axes))
    state = jax.eval_shape(state_of, params)
    shardings = state_shardings(state, params, sharding)
    size = network.samples * sharding.parts("batch")
    batch = batch_of(network, size)
    step = make_step(
        loss_of(network, sharding),
        optimizer,
        precision=PRECISION,
        sharding=sharding,
        shardings=shardings,
    )
    rows = sharding.named("batch")
    # Local attention asks the default device which kernels to take.
    with jax.default_device(sharding.mesh.devices.flat[0]):
        lowered = step.lower(
            jax.tree.map(placed, state, shardings),
            jax.tree.map(lambda leaf: placed(leaf, rows), batch),
        )
    return Planned(
        lowered.compile(),
        size,
        *estimate.state_bytes(shapes, axes, sharding),
        estimate.batch_bytes(batch, sharding),
    )


def row(network: Network, mesh: tuple[int, int, int], devices: Sequence[Any]) -> dict[str, Any]:
    """All figures of one network on one mesh."""
    number = math.prod(mesh)
    sharding = Sharding(make_mesh(*mesh, devices=devices[:number]))
    begin = time.perf_counter()
    planned = plan(network, sharding)
    seconds = time.perf_counter() - begin
    memory = planned.compiled.memory_analysis()
    arguments = planned.parameters + planned.optimizer + planned.batch
    machine = Machine()
    moved = estimate.collectives(planned.compiled.as_text(), number)
    flops = planned.batch_size * metrics.flops_per_sample(network.config) / number
    step = estimate.step_seconds(flops * RECOMPUTED, moved, machine)
    total = arguments + memory.temp_size_in_bytes
    by_kind: dict[str, float] = defaultdict(float)
    for one in moved:
        by_kind[one.kind + (" between hosts" if one.between_hosts else "")] += one.received
    return {
        "network": network.name,
        "mesh": list(mesh),
        "batch": planned.batch_size,
        "parameter_bytes": planned.parameters,
        "optimizer_bytes": planned.optimizer,
        "argument_bytes": arguments,
        "argument_bytes_compiled": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "fits": [total <= machine.usable * size for size in machine.memories],
        "flops": flops,
        "collective_bytes": {kind: round(size) for kind, size in sorted(by_kind.items())},
        "compute_seconds": step.compute,
        "inside_seconds": step.inside,
        "between_seconds": step.between,
        "days": [
            estimate.days(each, planned.batch_size)
            for each in (step.overlapped, step.one_after_the_other)
        ],
        "utilisation": [
            flops / each / machine.peak for each in (step.overlapped, step.one_after_the_other)
        ],
        "compiled_in_seconds": round(seconds, 1),
    }


def devices_without_hardware(compiler: str, number: int) -> list[Any]:
    """`number` devices to compile for, a multiple of 8: H200, or virtual ones of a CPU."""
    if compiler == "cpu":
        jax.config.update("jax_num_cpu_devices", number)
        jax.config.update("jax_platforms", "cpu")
        return jax.devices()
    from jax.experimental import topologies

    from experiments.local_attention.compile_gate import TARGET

    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    hosts = number // estimate.HOST_DEVICES
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h200",
        topology=f"1x{hosts}x{estimate.HOST_DEVICES}",
        target_config=TARGET,
    )
    return list(topology.devices)


# --- A real step ----------------------------------------------------------------------------------


def real(layers: int, hidden: int, batch_size: int, steps: int) -> dict[str, Any]:
    """A step of CogLM on the devices that are here: predicted against measured."""
    sizes = TransformerConfig(num_layers=layers, hidden_size=hidden, num_heads=hidden // 64)
    network = Network("CogLM", CogLMConfig(sizes), coglm, batch_size)
    sharding = Sharding(make_mesh(fsdp=jax.device_count()))
    planned = plan(network, sharding)
    memory = planned.compiled.memory_analysis()
    init = functools.partial(coglm.init_params, config=network.config)
    axes = coglm.parameter_axes(network.config)
    params = init_params(init, jax.random.key(0), axes, sharding)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizer = adamw(warmup_cosine(4e-4, 100_000, 10_000))
    state = init_state(params, optimizer, sharding=sharding)
    del params
    rows = sharding.named("batch")
    batch = jax.tree.map(
        lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), rows),
        batch_of(network, planned.batch_size),
    )
    times = []
    for _ in tqdm(range(steps + 1), desc=f"{number / 1e9:.2f} B parameters"):
        begin = time.perf_counter()
        state, found = planned.compiled(state, batch)
        jax.block_until_ready(found)
        times.append(time.perf_counter() - begin)
    seconds = min(times[1:])
    flops = planned.batch_size * metrics.flops_per_sample(network.config) / jax.device_count()
    rate = metrics.matrix_rate(jnp.bfloat16)
    machine = dataclasses.replace(Machine(), peak=rate)
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "parameters": number,
        "batch": planned.batch_size,
        "loss": float(found["loss"]),
        "matrix_rate": rate,
        "predicted_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "measured_bytes": statistics.get("peak_bytes_in_use"),
        "predicted_seconds": flops * RECOMPUTED / (machine.peak * machine.achieved),
        "measured_seconds": seconds,
        "utilisation_of_matrix_rate": flops / seconds / rate,
        "utilisation_of_data_sheet": flops / seconds / Machine().peak,
    }


# --- Output ---------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    mesh = " × ".join(map(str, row["mesh"]))
    received = sum(row["collective_bytes"].values())
    fits = ["fits" if fit else "–" for fit in row["fits"]]
    waiting = row["inside_seconds"] + row["between_seconds"]
    days, used = row["days"], row["utilisation"]
    cells = (
        row["network"],
        f"{math.prod(row['mesh']):,}",
        mesh,
        f"{row['batch']:,}",
        *(f"{row[name] / GB:.1f}" for name in ("parameter_bytes", "optimizer_bytes")),
        f"{row['temporary_bytes'] / GB:.1f}",
        *fits,
        f"{row['flops'] / 1e12:.0f}",
        f"{received / GB:.1f}",
        f"{row['compute_seconds']:.2f} + {waiting:.2f}",
        f"{days[0]:.2f} – {days[1]:.2f}",
        f"{100 * used[0]:.0f} – {100 * used[1]:.0f} %",
    )
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| network | devices | data × FSDP × tensor | batch | parameters, GB | AdamW, GB |"
    " temporaries, GB | 80 GB | 141 GB | TFLOP | received, GB | computing + waiting, s |"
    " days for 30 M | utilisation |\n" + "| --- " * 14 + "|"
)


@click.command(help=__doc__)
@click.option(
    "--compiler",
    type=click.Choice(("auto", "cuda", "cpu")),
    default="auto",
    show_default=True,
    help="auto: CUDA's where it is installed.",
)
@click.option("--quick", is_flag=True, help="Two meshes only.")
@click.option("--real", "is_real", is_flag=True, help="Run a real step on the devices here.")
@click.option("--layers", default=24, show_default=True, help="Of the real step.")
@click.option("--hidden", default=1536, show_default=True, help="Width of the real step's layers.")
@click.option("--batch-size", default=64, show_default=True, help="A device, of the real step.")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    compiler: str,
    quick: bool,
    is_real: bool,
    layers: int,
    hidden: int,
    batch_size: int,
    steps: int,
    json_file: Path | None,
) -> None:
    results: dict[str, Any] = {"jax": jax.__version__}
    if is_real:
        results |= real(layers, hidden, batch_size, steps)
        for name, value in results.items():
            click.echo(f"{name:28s}{value}")
    else:
        if compiler == "auto":
            there = any(
                importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)
            )
            compiler = "cuda" if there else "cpu"
        meshes = MESHES[:2] if quick else MESHES
        devices = devices_without_hardware(compiler, max(map(math.prod, meshes)))
        pairs = [(network, mesh) for network in NETWORKS for mesh in meshes]
        rows = []
        for network, mesh in tqdm(pairs, desc=f"compiled for {compiler}"):
            rows.append(row(network, mesh, devices))
        results |= {"compiler": compiler, "assumed": dataclasses.asdict(Machine()), "rows": rows}
        click.echo("\n".join([HEADER, *map(line, rows)]))
        wrong = [r for r in rows if r["argument_bytes"] != r["argument_bytes_compiled"]]
        for each in wrong:
            ours, theirs = each["argument_bytes"], each["argument_bytes_compiled"]
            where = f"{each['network']} on {each['mesh']}"
            click.echo(f"{where}: arguments of {ours:,} bytes, {theirs:,} compiled", err=True)
        if wrong:
            raise click.ClickException("the arithmetic differs from the compiler's")
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
