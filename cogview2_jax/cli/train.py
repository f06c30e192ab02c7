"""`cogview2 train`: every network, from zero or from a model, by one loop and the same options."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.cli import common

if TYPE_CHECKING:
    import numpy as np

    from cogview2_jax.bundle import Bundle
    from cogview2_jax.sharding import Sharding
    from cogview2_jax.training.recipes import Options, Task

_SHARE = click.FloatRange(0, 1, max_open=True)
_COUNT = click.IntRange(1)
_OPTIONS = (
    common.bundle_option,
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        required=True,
        metavar="DIR",
        help="Folder of the run: checkpoints, metrics, and at the end the model.",
    ),
    click.option("--steps", "num_steps", type=_COUNT, default=1000, show_default=True, metavar="N"),
    click.option(
        "--batch-size",
        type=_COUNT,
        default=16,
        show_default=True,
        metavar="N",
        help="Of all devices.",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(0, min_open=True),
        default=4e-4,
        show_default=True,
        metavar="X",
        help="The highest.",
    ),
    click.option(
        "--warmup", type=_SHARE, default=0.1, show_default=True, metavar="X", help="Share of steps."
    ),
    click.option(
        "--final-rate",
        type=_SHARE,
        default=0.1,
        show_default=True,
        metavar="X",
        help="Share of the learning rate that is left at the end.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(("adamw", "muon")),
        default="adamw",
        show_default=True,
        help="muon is for matrices, with AdamW at a tenth of the rate for the rest.",
    ),
    click.option(
        "--weight-decay", type=click.FloatRange(0), default=0.01, show_default=True, metavar="X"
    ),
    click.option(
        "--clip",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        metavar="X",
        help="Largest norm of the gradient.",
    ),
    click.option(
        "--accumulate",
        type=_COUNT,
        default=1,
        show_default=True,
        metavar="N",
        help="Parts of a batch that are computed one after the other, to save memory.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(("float32", "bfloat16")),
        default="float32",
        show_default=True,
        help="What is computed in; parameters stay float32.",
    ),
    click.option(
        "--remat",
        type=click.Choice(("none", "products", "all")),
        default="none",
        show_default=True,
        help="What the backward pass computes again, to save memory: all but matrix products, or"
        " all of each layer.",
    ),
    click.option("--dropout", type=_SHARE, default=0.0, show_default=True, metavar="X"),
    click.option(
        "--average",
        type=_SHARE,
        default=0.0,
        show_default=True,
        metavar="X",
        help="Keep a moving average of the parameters, with this decay.",
    ),
    click.option("--z-loss", type=click.FloatRange(0), default=0.0, show_default=True, metavar="X"),
    click.option(
        "--held-out",
        type=_SHARE,
        default=0.0,
        show_default=True,
        metavar="X",
        help="Share of the records kept to validate with, at every save.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, metavar="N"
    ),
    click.option(
        "--save-every", type=_COUNT, default=200, show_default=True, metavar="N", help="Steps."
    ),
    click.option(
        "--log-every", type=_COUNT, default=20, show_default=True, metavar="N", help="Steps."
    ),
    click.option(
        "--sample-every",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Steps between pictures in DIR/samples; 0 for none.",
    ),
    click.option(
        "--skip-non-finite",
        is_flag=True,
        help="Pass over steps whose loss is not finite, instead of stopping.",
    ),
    click.option("--data", type=_COUNT, metavar="N", help="Devices that see other samples."),
    click.option(
        "--fsdp",
        type=_COUNT,
        default=1,
        show_default=True,
        metavar="N",
        help="Devices that see other samples and share the weights between them.",
    ),
    click.option(
        "--tensor",
        type=_COUNT,
        default=1,
        show_default=True,
        metavar="N",
        help="Devices that share each sample's heads and MLP.",
    ),
    click.option(
        "--distributed",
        is_flag=True,
        help="One of several processes, found from the environment (Slurm, Kubernetes, Open MPI).",
    ),
    click.option("--coordinator", metavar="HOST:PORT", help="Or by hand: of process 0."),
    click.option("--processes", type=_COUNT, metavar="N"),
    click.option("--process", type=click.IntRange(0), metavar="I"),
    click.option(
        "--peer-timeout",
        type=_COUNT,
        default=100,
        show_default=True,
        metavar="SECONDS",
        help="After which the death of another process ends this one.",
    ),
)
_prompt_option = click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Draw this at every --sample-every; may be repeated.",
)


def _start_option(*starts: str) -> Callable[[Any], Any]:
    return click.option(
        "--start",
        type=click.Choice((*starts, "nothing")),
        help="Parameters to start from. Default: the first of these that the model has.",
    )


def _with_options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.group(
    "train",
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --allow-unknown --out records
  cogview2 train coglm records --steps 200 --held-out 0.1 --out run
  cogview2 generate --bundle run/model "a red circle"
""",
)
@click.pass_context
def train_group(context: click.Context) -> None:
    """Train a network, from a model's parameters or from nothing.

    Killed, the same command goes on from the last checkpoint.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@train_group.command(
    epilog="""\b
Examples:
  cogview2 data prepare photos --pictures --out pictures
  cogview2 train tokenizer pictures --steps 2000 --start nothing --stride 8 --out run
  cogview2 train tokenizer pictures --bundle run/model --stride 4 --keep-others --out also_4
"""
)
@click.argument("pictures", type=click.Path(path_type=Path))
@click.option("--side", type=_COUNT, metavar="PIXELS", help="Of the crops. Default: 8 tokens.")
@click.option("--flip/--no-flip", default=True, show_default=True, help="Mirror half of the crops.")
@click.option(
    "--stride",
    "strides",
    type=_COUNT,
    multiple=True,
    metavar="PIXELS",
    help="Train this stride alone; may be repeated. Default: all at once.",
)
@click.option(
    "--keep-others",
    is_flag=True,
    help="Leave all that the other strides use as it is, so that their tokens stay the same.",
)
@click.option(
    "--clusters",
    type=_COUNT,
    metavar="N",
    help="Of the codebook, for sampling. Default: as before.",
)
@_start_option("model")
@_with_options
def tokenizer(
    pictures: Path,
    side: int | None,
    flip: bool,
    strides: tuple[int, ...],
    keep_others: bool,
    clusters: int | None,
    start: str | None,
    **chosen: Any,
) -> None:
    """Train the image tokenizer on PICTURES, prepared with --pictures."""

    def make(bundle: Bundle, options: Options, start: str, sharding: Sharding | None) -> Task:
        from cogview2_jax.training import recipes

        return recipes.tokenizer_task(
            bundle,
            pictures,
            options,
            side=side,
            flip=flip,
            strides=strides,
            keep_others=keep_others,
            start=start,
            sharding=sharding,
        )

    def finish(bundle: Bundle, params: Any) -> Bundle:
        import jax
        import numpy as np

        from cogview2_jax.tokenizer.clusters import cluster_codebook

        codebook = np.asarray(jax.device_get(params["codebook"]))
        number = clusters or bundle.num_clusters or max(1, min(500, len(codebook) // 16))
        labels = cluster_codebook(codebook, number)
        return bundle._replace(tokenizer=params, cluster_labels=labels)

    _train("tokenizer", ("model",), make, finish, start, (), chosen)


@train_group.command(
    epilog="""\b
Examples:
  cogview2 train coglm records --steps 200 --held-out 0.1 --out run
  cogview2 train coglm records --start nothing --caption-ratio 0.3 --out run
"""
)
@click.argument("records", type=click.Path(path_type=Path))
@click.option(
    "--caption-ratio",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    metavar="X",
    help="Share of pictures that are captioned, with masked patches, instead of drawn.",
)
@click.option(
    "--text-ratio",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="X",
    help="Share of samples that are masked spans of text alone.",
)
@click.option("--patch-size", type=_COUNT, default=4, show_default=True, metavar="N", help="Cells.")
@_start_option("model")
@_prompt_option
@_with_options
def coglm(
    records: Path,
    caption_ratio: float,
    text_ratio: float,
    patch_size: int,
    start: str | None,
    prompts: tuple[str, ...],
    **chosen: Any,
) -> None:
    """Train the base model on RECORDS: text to image, captioning, masked text."""

    def make(bundle: Bundle, options: Options, start: str, sharding: Sharding | None) -> Task:
        from cogview2_jax.training import recipes
        from cogview2_jax.training.batches import Mix

        mix = Mix(caption_ratio, text_ratio, patch_size)
        return recipes.coglm_task(bundle, records, options, mix=mix, start=start, sharding=sharding)

    def finish(bundle: Bundle, params: Any) -> Bundle:
        return bundle._replace(coglm=params)

    _train("coglm", ("model",), make, finish, start, prompts, chosen)


@train_group.command(
    "direct-sr",
    epilog="""\b
Examples:
  cogview2 data prepare photos/captions.jsonl --size 64 --size 192 --out fine_records
  cogview2 train direct-sr fine_records --steps 500 --freeze-base --out run
""",
)
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--freeze-base", is_flag=True, help="Train only what the base model has not.")
@_start_option("model", "coglm")
@_prompt_option
@_with_options
def direct_sr(
    records: Path,
    freeze_base: bool,
    start: str | None,
    prompts: tuple[str, ...],
    **chosen: Any,
) -> None:
    """Train direct super-resolution on RECORDS of two sizes."""

    def make(bundle: Bundle, options: Options, start: str, sharding: Sharding | None) -> Task:
        from cogview2_jax.training import recipes

        return recipes.direct_sr_task(
            bundle, records, options, start=start, freeze_base=freeze_base, sharding=sharding
        )

    def finish(bundle: Bundle, params: Any) -> Bundle:
        return bundle._replace(direct=params)

    _train("direct", ("model", "coglm"), make, finish, start, prompts, chosen)


@train_group.command(
    "iterative-sr",
    epilog="""\b
Examples:
  cogview2 train iterative-sr fine_records --steps 500 --out run
""",
)
@click.argument("records", type=click.Path(path_type=Path))
@_start_option("model", "coglm")
@_prompt_option
@_with_options
def iterative_sr(records: Path, start: str | None, prompts: tuple[str, ...], **chosen: Any) -> None:
    """Train iterative super-resolution on RECORDS of two sizes."""

    def make(bundle: Bundle, options: Options, start: str, sharding: Sharding | None) -> Task:
        from cogview2_jax.training import recipes

        return recipes.iterative_sr_task(bundle, records, options, start=start, sharding=sharding)

    def finish(bundle: Bundle, params: Any) -> Bundle:
        return bundle._replace(iterative=params)

    _train("iterative", ("model", "coglm"), make, finish, start, prompts, chosen)


# --- What they share ------------------------------------------------------------------------------

# The last stage that shows a network's work.
_STAGES = {"coglm": "base", "direct": "direct", "iterative": "full"}
_LOOP = ("save_every", "log_every", "sample_every", "skip_non_finite")
_ELSEWHERE = (
    *("bundle", "out", "remat", "dropout", "data", "fsdp", "tensor"),
    *("distributed", "coordinator", "processes", "process", "peer_timeout"),
)


def _train(
    network: str,
    starts: tuple[str, ...],
    make: Callable[[Any, Any, str, Any], Any],
    finish: Callable[[Any, Any], Any],
    start: str | None,
    prompts: tuple[str, ...],
    chosen: dict[str, Any],
) -> None:
    """Check everything, train, write the model."""
    _join(chosen)
    import jax

    folder = common.check_model(chosen["bundle"], prompts)
    from cogview2_jax import bundle as bundles
    from cogview2_jax.config import Training
    from cogview2_jax.sharding import Sharding, make_mesh
    from cogview2_jax.training import recipes
    from cogview2_jax.training.loop import keep_freed_memory

    out: Path = chosen["out"]
    options = {name: chosen[name] for name in chosen if name not in (*_LOOP, *_ELSEWHERE)}
    with common.refusing():
        training = Training(chosen["dropout"], chosen["remat"])
        described = recipes.Options(training=training, **options)
        sharding = None
        if jax.device_count() > 1:
            mesh = make_mesh(chosen["data"], chosen["fsdp"], chosen["tensor"])
            sharding = Sharding(mesh)
        elif max(chosen["data"] or 1, chosen["fsdp"], chosen["tensor"]) > 1:
            raise ValueError("--data, --fsdp and --tensor need several devices: there is one")
        there = bundles.networks_in(folder)
        known = {"model": network, "coglm": "coglm"}
        start = start or next((s for s in starts if known[s] in there), "nothing")
        if start != "nothing" and known[start] not in there:
            raise ValueError(f"--start {start}: bundle {folder} has no {known[start]}")
    common.check_writable(out)
    common.use_compilation_cache()
    keep_freed_memory()
    _hush()
    sampling = chosen["sample_every"] and (prompts or network == "tokenizer")
    if sampling and jax.process_count() > 1:
        raise click.UsageError("--sample-every goes with one process only")
    with common.refusing():
        bundle = bundles.load(folder, there)
        task = make(bundle, described, start, sharding)
        sample = _sampler(network, bundle, finish, task, prompts) if sampling else None
    loop = {name: chosen[name] for name in _LOOP}
    try:
        with common.refusing():
            params = recipes.run(task, described, out, sample=sample, sharding=sharding, **loop)
            made = finish(bundle, _on_host(params))
            if jax.process_index() == 0:
                bundles.save(out / "model", made)
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise click.ClickException(
            "the step does not fit the memory: give a smaller --batch-size, a larger --accumulate,"
            " or --remat all"
        ) from error
    if jax.process_index() == 0:
        click.echo(out / "model")


def _sampler(
    network: str, bundle: Bundle, finish: Callable[[Any, Any], Any], task: Task, prompts: Any
) -> Callable[[Any], np.ndarray]:
    """Parameters → a picture of what they draw: a row for each prompt, or crops over what the
    tokenizer makes of them at each stride.
    """
    import jax
    import numpy as np

    from cogview2_jax import bundle as bundles
    from cogview2_jax.pipeline.cogview import CogView
    from cogview2_jax.tokenizer import image

    if network == "tokenizer":
        config = bundle.tokenizer_config
        crops = task.read(0)[0][:8]

        @jax.jit
        def reconstruct(params: Any, pixels: Any) -> Any:
            images = pixels.astype("float32") / 255
            made = [images]
            for stride in config.strides:
                ids = image.encode(params, images, stride, config=config)
                made.append(image.decode(params, ids, stride, config=config))
            return jax.numpy.stack(made)

        def reconstructions(params: Any) -> np.ndarray:
            made = np.asarray(reconstruct(_on_host(params), crops)).clip(0, 1)
            return _tiles((made * 255).round().astype(np.uint8))

        return reconstructions

    stage = _STAGES[network]
    for before in bundles.NETWORKS[: bundles.NETWORKS.index(network)]:
        bundle.params(before)  # raises where it is missing, now and not at the first picture

    def draw(params: Any) -> np.ndarray:
        cv = CogView(finish(bundle, jax.device_put(_on_host(params))))
        made = cv.generate_stages(
            list(prompts), jax.random.key(0), 4, candidates=1, stages=(stage,)
        )
        return _tiles(made[stage])

    return draw


def _tiles(pictures: np.ndarray) -> np.ndarray:
    """[rows, columns, y, x, 3] → one picture."""
    rows, columns, y, x, channels = pictures.shape
    return pictures.transpose(0, 2, 1, 3, 4).reshape(rows * y, columns * x, channels)


def _on_host(params: Any) -> Any:
    """Parameters of any mesh as NumPy arrays, one leaf after the other."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, params)


def _join(chosen: dict[str, Any]) -> None:
    """Meet the other processes, if there are any, before jax looks for devices."""
    by_hand = [chosen[name] is not None for name in ("coordinator", "processes", "process")]
    if any(by_hand) and not all(by_hand):
        raise click.UsageError("--coordinator, --processes and --process go together")
    if not (chosen["distributed"] or any(by_hand)):
        return
    import jax

    try:
        jax.distributed.initialize(
            coordinator_address=chosen["coordinator"],
            num_processes=chosen["processes"],
            process_id=chosen["process"],
            heartbeat_timeout_seconds=chosen["peer_timeout"],
            # One that ends with an error waits for the others, who wait for it in the next step.
            shutdown_timeout_seconds=chosen["peer_timeout"],
        )
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise click.ClickException(f"the processes do not meet: {reason}") from error


def _hush() -> None:
    """A write that fails raises one error, which is told in one line. Orbax and tensorstore also
    log it, from every thread that wrote, and stumble over what they were still writing.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
