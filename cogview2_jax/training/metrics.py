"""Figures and pictures of a training run: JSON lines, TensorBoard, speed and utilisation."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    TransformerConfig,
)
from cogview2_jax.tokenizer.hvqvae import HVQVAE


class Log:
    """`metrics.jsonl`, a line for each call, and TensorBoard event files in `folder`; pictures
    also as PNG in `folder/samples`.

    After a restart the lines of steps past `start` are dropped, as those steps are repeated. Raises
    OSError, in one line, when something cannot be written, as on a full disk.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        # The library's own writer has a thread. On a full disk the thread dies, and the next call
        # waits for it forever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event, self._folder = event_pb2.Event, folder
        file = folder / "metrics.jsonl"
        with _writing(folder):
            (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
            if file.exists():
                kept = [line for line in file.read_bytes().splitlines() if _step_of(line) <= start]
                partial = file.with_suffix(".partial")
                partial.write_bytes(b"".join(line + b"\n" for line in kept))
                partial.replace(file)
            self._file = file.open("a")
            self._board = EventsWriter(str(folder / "tensorboard" / "events"))
            # TensorBoard drops what it has of these steps.
            began = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._board.write_event(self._event(step=start + 1, session_log=began))

    def figures(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX import summary

        with _writing(self._folder / "metrics.jsonl"):
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
        self._show(step, [summary.scalar(name, value) for name, value in values.items()])

    def picture(self, step: int, pixels: np.ndarray) -> Path:
        """`pixels` uint8 [y, x, 3]. Returns the file."""
        from tensorboardX import summary

        samples = self._folder / "samples"
        file = samples / f"step_{step:08d}.png"
        with _writing(file):
            samples.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(file)
        self._show(step, [summary.image("samples", pixels, dataformats="HWC")])
        return file

    def _show(self, step: int, summaries: list[Any]) -> None:
        with _writing(self._folder / "tensorboard"):
            for one in summaries:
                event = self._event(step=step, wall_time=time.time(), summary=one)
                self._board.write_event(event)
            self._board.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was written has been flushed, and errors have been reported.
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def _writing(what: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{what} could not be written: {error.strerror or error}") from error


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinite for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def matrix_rate(dtype: Any = jnp.float32) -> float:
    """FLOP/s of a large matrix product on one device, measured now: the best of those that fit in
    a quarter of a second, and of 8 at least.
    """
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()  # compiles
    times: list[float] = []
    while len(times) < 8 or sum(times) < 0.25:
        begin = time.perf_counter()
        multiply(a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times)


class MatrixRate:
    """The highest FLOP/s seen so far on all devices: the denominator of utilisation.

    A large matrix product is timed when this is made and again when a figure is asked for, at most
    once in `again_after` seconds, since another program may have used the machine the first time.
    The run's own rate counts as well, so utilisation is never above 1; 1 says that no product was
    seen to run faster than the training step.
    """

    def __init__(self, dtype: Any = jnp.float32, again_after: float = 60.0) -> None:
        self._dtype, self._again_after = dtype, again_after
        self.highest, self._measured = 0.0, -math.inf
        self._measure()

    def utilisation(self, flops_per_second: float) -> float:
        """A rate of all devices as a share of the highest seen so far, itself included."""
        if time.monotonic() - self._measured >= self._again_after:
            self._measure()
        self.highest = max(self.highest, flops_per_second)
        return flops_per_second / self.highest

    def _measure(self) -> None:
        self.highest = max(self.highest, jax.device_count() * matrix_rate(self._dtype))
        self._measured = time.monotonic()


@dataclass(frozen=True)
class Costs:
    """Costs of one step on all devices: tokens, and FLOPs to compare with `matrix_rate`. 0 and None
    where they are not known.
    """

    tokens: int = 0
    flops: float = 0.0
    matrix_rate: MatrixRate | None = None


class Speed:
    """Times the steps that were finished since `restart`."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.restart()

    def restart(self) -> None:
        self._since, self._counted = time.monotonic(), 0

    def step(self) -> None:
        self._counted += 1

    def figures(self) -> dict[str, float]:
        """Seconds a step, and with `Costs` tokens per second and utilisation; nothing where no
        step was counted. The steps must be finished, not only dispatched.
        """
        passed = time.monotonic() - self._since
        if not self._counted or passed <= 0:
            return {}
        seconds = passed / self._counted
        figures = {"step_seconds": seconds}
        if self._costs.tokens:
            figures["tokens_per_second"] = self._costs.tokens / seconds
        if self._costs.flops and self._costs.matrix_rate:
            rate = self._costs.flops / seconds
            figures["utilisation"] = self._costs.matrix_rate.utilisation(rate)
        return figures


class Watched(NamedTuple):
    """Figures of a state, and a warning in one line or ""."""

    figures: dict[str, float]
    warning: str = ""


def flops_per_sample(config: CogLMConfig | DirectSRConfig | IterativeSRConfig) -> float:
    """FLOPs of the matrix products of one training sample, forward and backward (three times the
    forward pass; what rematerialisation repeats is not counted).

    Pairs of query and key count where a network computes their score: all pairs of a dense
    attention, the window's of a local one.
    """
    if isinstance(config, CogLMConfig):
        length = config.text_slots + 1 + config.num_image_tokens
        forward = _stack(config.transformer, length, pairs=length**2)
        logits = length * config.vocabulary.size * config.transformer.hidden_size
    elif isinstance(config, DirectSRConfig):
        sizes, fine = config.coglm.transformer, config.num_image_tokens
        windows = config.window[0] * config.window[1]
        windows += config.cross_window[0] * config.cross_window[1]
        pairs = config.num_prefix**2 + fine * windows
        forward = _stack(sizes, config.num_prefix + fine, pairs)
        logits = fine * config.coglm.vocabulary.num_image * sizes.hidden_size
    else:
        sizes, fine = config.transformer, config.num_image_tokens
        seen = config.text_slots + config.window[0] * config.window[1]
        forward = _stack(sizes, config.text_slots + fine, config.text_slots**2 + fine * seen)
        logits = fine * config.vocabulary.num_image * sizes.hidden_size
    return 3 * (forward + 2.0 * logits)


def tokenizer_flops_per_sample(config: HVQVAEConfig, side: int, strides: Sequence[int]) -> float:
    """FLOPs of a picture of `side` pixels, encoded once and decoded at each of `strides`, forward
    and backward. All operations, as XLA counts those of the forward pass; nothing is compiled.
    """
    model = HVQVAE(config)

    def forward(params: Any, images: jax.Array) -> list[jax.Array]:
        levels = model.apply({"params": params}, images, method="vectors")
        return [
            model.apply(
                {"params": params}, levels[config.strides.index(s)], s, method="reconstruct"
            )
            for s in strides
        ]

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)["params"], images)
    counted = jax.jit(forward).lower(params, images).cost_analysis() or {}
    return 3.0 * counted.get("flops", 0.0)


def _stack(sizes: TransformerConfig, length: int, pairs: int) -> float:
    """Forward FLOPs of all layers: four e×e and two e×f matrices a token, and two products a
    pair.
    """
    e = sizes.hidden_size
    weights = 4 * e * e + 2 * e * sizes.mlp_ratio * e
    return 2.0 * sizes.num_layers * (length * weights + 2 * pairs * e)
