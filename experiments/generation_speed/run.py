"""How fast is a picture made, beside PyTorch, one token at a time, and the machine's bounds?

    python -m experiments.generation_speed.run [--json FILE] [--plot FILE] [--small]
    python -m experiments.generation_speed.run --compiled [CASE …]

The first measures on this device and prints a table; README.md says what the rows are. The second
compiles decoding at the published size for a GPU that need not be there, and counts the bytes that
a token moves; it exits with 1 if they are above the limits.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.decoding.sampling import sample_clusters
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from experiments.generation_speed import (
    best_torch,
    bounds,
    compiled,
    one_by_one,
    peers,
    report,
    workload,
)
from experiments.generation_speed.workload import Networks, Sizes
from experiments.local_attention.bounds import Rates
from experiments.local_attention.report import device_name
from pallas_kernels import local_attention_2d
from pallas_kernels.local_attention.window import Window

# Of the iterative rounds of a PyTorch peer, and of the steps of decoding one by one: all cost the
# same, so a part is timed and scaled.
TIMED_ROUNDS, TIMED_STEPS = 2, 100
# A peer whose logits are farther from ours than this computes something else.
TOLERANCE = 2e-3
WINDOW = Window(9, 9)  # of the local attention that is timed alone


class Times(NamedTuple):
    """Seconds by the clock and of all threads of the process, of the fastest call."""

    wall: float
    cpu: float

    def scaled(self, factor: float) -> "Times":
        return Times(self.wall * factor, self.cpu * factor)


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Times, Any]:
    """The fastest of several calls, and what the last one returned."""
    times = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        times.append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return min(times), result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = report.STAGES[:-1]
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=2, help="calls of ours; the fastest counts")
    parser.add_argument("--small", action="store_true", help="small networks: tries the code out")
    parser.add_argument("--no-torch", action="store_true", help="without the PyTorch peers")
    parser.add_argument("--json", type=Path, dest="json_file", help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument(
        "--compiled",
        nargs="*",
        choices=list(compiled.CASES),
        help="bytes moved on a GPU, see above; default: every case",
    )
    arguments = parser.parse_args(argv)
    if arguments.compiled is not None:
        return compiled.main(arguments.compiled)
    missing = "PyTorch is left out" if arguments.no_torch else peers.obstacle()
    if missing:
        print(missing, file=sys.stderr)
    sizes = workload.SMALL if arguments.small else Sizes()
    record = measure(sizes, tuple(arguments.stages), arguments.repeats, not missing)
    print(report.table(record))
    if arguments.json_file:
        arguments.json_file.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        report.plot(record, arguments.plot)
    return 0


def measure(
    sizes: Sizes, stages: tuple[str, ...], repeats: int, with_torch: bool
) -> dict[str, Any]:
    """The record of one run: see `report.record`. Raises SystemExit if a peer's logits differ."""
    made = workload.networks(sizes)
    found: dict[str, dict[str, Times]] = {name: {} for name in report.ROWS}
    rates = [bounds.rates()]

    def keep(row: str, stage: str, times: Times) -> None:
        found[row][stage] = times
        print(f"{row:<20} {stage:<16} {times.wall:9.3f} s", file=sys.stderr, flush=True)

    for stage, call in workload.our_stages(made, stages).items():
        keep("ours", stage, timed(call, repeats)[0])
    for row, times in decode_one_by_one(made).items():
        keep(row, "whole", times)
    if with_torch:
        for peer in (best_torch.Best, peers.Published):
            for stage, times in peer_stages(peer(made.labels, sizes.clusters), made, stages):
                keep(peer.name, stage, times)
    attention = local_attention(sizes, with_torch)
    rates.append(bounds.rates())
    highest = Rates(max(rate.flops for rate in rates), max(rate.bytes for rate in rates))
    about = {
        "device": device_name(),
        "jax": jax.__version__,
        "torch": peers.version() if with_torch else None,
        "sizes": vars(sizes),
        "rates": {
            "gigabytes_a_second": round(highest.bytes / 1e9, 2),
            "gigaflops": round(highest.flops / 1e9, 1),
        },
    }
    return about | report.record(found, bounds.bounds(sizes, highest), attention)


def decode_one_by_one(made: Networks) -> dict[str, Times]:
    """Seconds of all fine cells, (c) and (d) of `one_by_one`, from the time of a step."""
    sizes = made.sizes
    config, fine = sizes.coglm, sizes.direct.num_image_tokens
    steps, window = one_by_one.window_steps(sizes.coarse, sizes.direct.ratio)
    text = config.max_text + 1
    lengths = {
        "one_token_at_a_time": (fine, text + fine),
        "sliding_window": (steps, text + config.num_image_tokens // 4 + 1 + window),
    }
    params = jax.jit(coglm.unstacked)(made.coglm)
    key, labels, how = jax.random.key(0), jnp.asarray(made.labels), made.sampling.base

    def draw(logits: jax.Array, i: jax.Array) -> jax.Array:
        return sample_clusters(jax.random.fold_in(key, i), logits, labels, sizes.clusters, how)

    found = {}
    for row, (number, length) in lengths.items():
        timed_steps = min(TIMED_STEPS, window)
        call = one_by_one.decoder(params, config, draw, length, timed_steps)
        call()
        found[row] = timed(call, 2)[0].scaled(number / timed_steps)
    return found


def peer_stages(
    peer: peers.Published, made: Networks, stages: tuple[str, ...]
) -> Iterator[tuple[str, Times]]:
    """A PyTorch peer's time of each stage, after its logits were compared with ours."""
    with peers.inference():
        yield from _peer_base(peer, made, stages)
        if "direct" in stages:
            yield "direct", _peer_direct(peer, made)
        if "iterative" in stages:
            yield "iterative", _peer_iterative(peer, made)


def _peer_base(
    peer: peers.Published, made: Networks, stages: tuple[str, ...]
) -> Iterator[tuple[str, Times]]:
    model, config, sampling = peers.weights(made.coglm), made.sizes.coglm, made.sampling
    for stage in stages:
        if not stage.startswith("stage1"):
            continue
        batch = workload.batch_of(stage)
        logits, step = peer.begin(model, made.text, batch, config, sampling.text_upweight)
        cells = workload.coarse_cells(made)[:, :1]
        after = step(peers.tensor(np.repeat(cells[0], batch)).long(), 0)
        compare(stage, peer, workload.first_logits(made, cells), (logits[0], after[0]))

        def decode(batch: int = batch) -> Any:
            return peer.decode(
                model, made.text, batch, config, sampling.base, sampling.text_upweight
            )

        yield stage, timed(decode)[0]


def _peer_direct(peer: peers.Published, made: Networks) -> Times:
    model, config = peers.weights(made.direct), made.sizes.direct
    given = workload.direct_input(made)
    theirs = tuple(peers.tensor(array) for array in given[:3])
    if isinstance(peer, best_torch.Best):
        peer.direct_logits(model, theirs, config)  # compiles
    times, (_, logits) = timed(lambda: peer.direct(model, theirs, config, made.sampling.direct))
    ours = jax.jit(direct_sr.apply, static_argnames="config")(made.direct, given, config=config)
    compare("direct", peer, ours[0], logits)
    return times


def _peer_iterative(peer: peers.Published, made: Networks) -> Times:
    model, config = peers.weights(made.iterative), made.sizes.iterative
    given = workload.iterative_input(made)
    theirs = tuple(peers.tensor(array) for array in given[:3])
    if isinstance(peer, best_torch.Best):
        peer.iterative_logits(model, theirs, config)  # compiles
    schedule = inputs.lopar_schedule(config)
    top_k = tuple(min(k, config.vocabulary.num_image) for k in made.sampling.iterative_top_k)
    # The first round again and again: the logits of the last one can be compared.
    rounds = np.repeat(schedule[:1], TIMED_ROUNDS, axis=0)
    times, (_, logits) = timed(lambda: peer.iterative(model, theirs, config, rounds, top_k))
    ours = jax.jit(iterative_sr.apply, static_argnames="config")(
        made.iterative, given, config=config
    )
    compare("iterative", peer, ours[0], logits)
    return times.scaled(len(schedule) / TIMED_ROUNDS)


def compare(stage: str, peer: peers.Published, ours: Any, theirs: Any) -> None:
    apart = max(
        float(np.abs(np.asarray(mine) - np.asarray(other)).max())
        for mine, other in zip(ours, theirs, strict=True)
    )
    if not apart < TOLERANCE:
        raise SystemExit(f"{stage}: logits of {peer.name} are {apart:.2g} from ours: no peer")


def local_attention(sizes: Sizes, with_torch: bool) -> dict[str, float]:
    """Milliseconds of one local attention over the fine grid, 9×9, float32: the fastest call."""
    grid, heads, dim = sizes.direct.grid, sizes.heads, sizes.coglm.transformer.head_dim
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, *grid, heads, dim))
    attend = jax.jit(
        lambda q, k, v: local_attention_2d(q, k, v, window=(WINDOW.rows, WINDOW.columns))
    )
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: jax.block_until_ready(attend(q, k, v))}
    if with_torch:
        calls |= best_torch.local_attention(WINDOW, grid, heads, dim)
    found = {}
    for name, call in calls.items():
        call()
        found[name] = round(1e3 * timed(call, 10)[0].wall, 2)
    return found


if __name__ == "__main__":
    sys.exit(main())
