"""`cogview2 train`: every network, from zero or from a model, by one loop and the same options."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import common
from cogview2_jax.cli.options import from_settings, take
from cogview2_jax.training.options import (
    CogLMOptions,
    ComputeOptions,
    DirectSROptions,
    IterativeSROptions,
    LoopOptions,
    Options,
    ProcessOptions,
    TokenizerOptions,
)

if TYPE_CHECKING:
    from cogview2_jax.training.task import Task

_prompt_option = click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="A prompt that --sample-every draws; may be repeated.",
)


def _with_options(own: type) -> Callable[[Any], Any]:
    """The options of every training command, those of one network first."""

    def decorate(command: Any) -> Any:
        command = from_settings(own, Options, LoopOptions, ComputeOptions, ProcessOptions)(command)
        command = click.option(
            "--out",
            type=click.Path(path_type=Path),
            required=True,
            metavar="DIR",
            help="Folder of the run: checkpoints, metrics, and at the end the model.",
        )(command)
        return common.bundle_option(command)

    return decorate


@click.group(
    "train",
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --allow-unknown --out records
  cogview2 train coglm records --steps 200 --validation 0.1 --out run
  cogview2 generate --bundle run/model "a red circle"
""",
)
@click.pass_context
def train_group(context: click.Context) -> None:
    """Train a network, from a model's parameters or from nothing.

    After a kill or an interruption, the same command resumes from the last checkpoint. To get a
    model from a run that was stopped early, repeat its command with --steps N, where N is the step
    of the last checkpoint.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@train_group.command(
    epilog="""\b
Examples:
  cogview2 data prepare photos --pictures --out picture_records
  cogview2 train tokenizer picture_records --start nothing --stride 8 --steps 2000 --out run
  cogview2 train tokenizer picture_records --bundle run/model --stride 4 --keep-others --out also_4
"""
)
@click.argument("pictures", type=click.Path(path_type=Path))
@_with_options(TokenizerOptions)
def tokenizer(pictures: Path, **chosen: Any) -> None:
    """Train the image tokenizer on PICTURES, prepared with --pictures."""

    def build(*given: Any) -> Task:
        from cogview2_jax.training.tokenizer import tokenizer_task

        return tokenizer_task(*given)

    _train(build, TokenizerOptions, pictures, (), chosen)


@train_group.command(
    epilog="""\b
Examples:
  cogview2 train coglm records --steps 200 --validation 0.1 --out run
  cogview2 train coglm records --start nothing --caption-ratio 0.3 --out run
"""
)
@click.argument("records", type=click.Path(path_type=Path))
@_prompt_option
@_with_options(CogLMOptions)
def coglm(records: Path, prompts: tuple[str, ...], **chosen: Any) -> None:
    """Train the base model on RECORDS: text to image, captioning, masked text."""

    def build(*given: Any) -> Task:
        from cogview2_jax.training.coglm import coglm_task

        return coglm_task(*given)

    _train(build, CogLMOptions, records, prompts, chosen)


@train_group.command(
    "direct-sr",
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --size 64 --size 192 --out fine_records
  cogview2 train direct-sr fine_records --steps 500 --freeze-base --out run
""",
)
@click.argument("records", type=click.Path(path_type=Path))
@_prompt_option
@_with_options(DirectSROptions)
def direct_sr(records: Path, prompts: tuple[str, ...], **chosen: Any) -> None:
    """Train direct super-resolution on RECORDS of two sizes."""

    def build(*given: Any) -> Task:
        from cogview2_jax.training.super_resolution import direct_sr_task

        return direct_sr_task(*given)

    _train(build, DirectSROptions, records, prompts, chosen)


@train_group.command(
    "iterative-sr",
    epilog="""\b
Examples:
  cogview2 train iterative-sr fine_records --steps 500 --out run
""",
)
@click.argument("records", type=click.Path(path_type=Path))
@_prompt_option
@_with_options(IterativeSROptions)
def iterative_sr(records: Path, prompts: tuple[str, ...], **chosen: Any) -> None:
    """Train iterative super-resolution on RECORDS of two sizes."""

    def build(*given: Any) -> Task:
        from cogview2_jax.training.super_resolution import iterative_sr_task

        return iterative_sr_task(*given)

    _train(build, IterativeSROptions, records, prompts, chosen)


# --- What they share ------------------------------------------------------------------------------


def _train(
    build: Callable[..., Task],
    own: type,
    source: Path,
    prompts: tuple[str, ...],
    chosen: dict[str, Any],
) -> None:
    """Check everything, train, write the model. `build` makes the task from the network's `own`
    options and the shared ones.
    """
    out: Path = chosen["out"]
    with common.refusing():
        own_options: Any = take(own, chosen)
        options = take(Options, chosen)
        loop, compute = take(LoopOptions, chosen), take(ComputeOptions, chosen)
        from cogview2_jax.training.processes import join, on_host

        join(take(ProcessOptions, chosen))
    import jax

    if prompts and not loop.sample_every:
        raise click.UsageError("--prompt goes with --sample-every N, the steps between pictures")
    folder = common.check_model(chosen["bundle"], prompts)
    with common.refusing():
        execution = compute.execution()
    common.check_writable(out)
    common.use_compilation_cache()
    if loop.sample_every and jax.process_count() > 1:
        raise click.UsageError("--sample-every works with one process only")
    from cogview2_jax import bundle as bundles
    from cogview2_jax.training import lock
    from cogview2_jax.training.loop import keep_freed_memory
    from cogview2_jax.training.run import going_on, run

    keep_freed_memory()
    _hush()
    with common.refusing(), lock.hold(out):
        options = going_on(options, out)
        bundle = bundles.load(folder, bundles.networks_in(folder))
        task = build(bundle, source, options, own_options, execution)
        sample = task.sampler(prompts) if loop.sample_every else None
        with _refusing_what_a_step_raises():
            params = on_host(run(task, options, out, loop, sample=sample))
            if jax.process_index() == 0:
                bundles.save(out / "model", task.put(bundle, params))
    if jax.process_index() == 0:
        click.echo(out / "model")


@contextlib.contextmanager
def _refusing_what_a_step_raises() -> Iterator[None]:
    import jax

    try:
        with common.refusing():
            yield
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise click.ClickException(
            "a training step does not fit the memory: give a smaller --batch-size, a larger"
            " --accumulate, or --remat all"
        ) from error


def _hush() -> None:
    """Silence orbax and tensorstore. A write that fails raises an error, printed in one line; they
    also log it from every writing thread, and warn of unfinished reads and writes.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        unfinished_read = inspect.iscoroutine(unraisable.object)
        if not unfinished_read and str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
