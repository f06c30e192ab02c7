"""What differs between the networks in training: a `Task`, which each network's builder makes.

task = coglm_task(bundle, Path("records"), options)
params = run(task, options, Path("run"))
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cogview2_jax.bundle import Bundle
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    TransformerConfig,
)
from cogview2_jax.data import reading
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.pipeline.settings import STAGES
from cogview2_jax.sharding import Execution
from cogview2_jax.training import checkpoint, metrics, samples
from cogview2_jax.training.batches import Rows
from cogview2_jax.training.loop import process_rows
from cogview2_jax.training.losses import Mean, Metrics
from cogview2_jax.training.options import Options
from cogview2_jax.training.step import TrainState

Array = jax.Array
Params = Any
Loss = Callable[[Params, Any, Array | None], tuple[Mean, Metrics, Any]]


class Task(NamedTuple):
    """A network and what it is trained on.

    Attributes:
        network: its configuration.
        axes: names of the parameters' axes, for `sharding`.
        params: trained parameters to start from, or None for `init(key)`.
        trained: a tree of bool, which parameters are trained, or None when all are.
        loss: (params, batch, dropout key or None) → loss, metrics, what `revise` needs.
        read, read_validation: step → this process's rows of a batch. There are `validation_batches`
        validation batches.
        ids_of: step → the numbers of the records in its batch.
        settings: JSON values that must not change when a run is resumed.
        put: (bundle, trained parameters) → the bundle with them.
        sampler: prompts → a function that draws them with given parameters, as one picture.
        extra, revise: as in `step.make_step`.
        before_step, watch: as in `loop.Hooks`.
    """

    name: str
    network: Any
    execution: Execution
    init: Callable[[Array], Params]
    axes: Params
    params: Params | None
    trained: Params | None
    loss: Loss
    read: Callable[[int], Any]
    read_validation: Callable[[int], Any]
    validation_batches: int
    ids_of: Callable[[int], list[int]]
    tokens_per_sample: int
    flops_per_sample: float
    settings: checkpoint.Settings
    put: Callable[[Bundle, Params], Bundle]
    sampler: Callable[[Sequence[str]], Callable[[Params], np.ndarray]]
    extra: Callable[[Params], Any] = lambda params: ()
    revise: Any = None
    before_step: Callable[[int, TrainState], TrainState] | None = None
    watch: Callable[[TrainState, bool], metrics.Watched] | None = None


class TokenData(NamedTuple):
    """Token records as a transformer's batches: this process's rows of every step."""

    records: reading.Records
    layout: RecordLayout
    training_numbers: Sequence[int] | np.ndarray
    validation_numbers: Sequence[int] | np.ndarray
    rows: Callable[[int], Rows]
    validation_rows: Callable[[int], Rows]
    validation_batches: int
    ids_of: Callable[[int], list[int]]


def token_data(folder: Path | TokenData, options: Options, execution: Execution) -> TokenData:
    """The records in `folder`, or those given. Raises ValueError, in one line, where there are
    none.
    """
    if isinstance(folder, TokenData):
        return folder
    part, parts = process_rows(execution.sharding, options.batch_size)
    records = reading.Records(folder)
    tokens = functools.partial(
        reading.tokens,
        records,
        options.batch_size,
        seed=options.seed,
        process_index=part,
        process_count=parts,
        validation_share=options.validation,
    )
    training = tokens()
    unseen = validation_part(lambda: tokens(validation=True, epochs=1), options)
    layout = records.manifest.layout
    assert layout is not None  # `reading.tokens` has refused pictures
    first_row = part * (options.batch_size // parts)
    return TokenData(
        records,
        layout,
        reading.training_numbers(records, options.validation),
        reading.validation_numbers(records, options.validation),
        lambda step: Rows(training[step], first_row, options.batch_size),
        lambda step: Rows(unseen[step], first_row, options.batch_size),
        len(unseen),
        functools.partial(record_numbers, records, options),
    )


def validation_part(made: Callable[[], Any], options: Options, most: int = 16) -> Any:
    """Up to `most` batches of the validation split; none without one."""
    if not options.validation:
        return ()
    batches = made()
    return batches[: min(len(batches), most)]


def record_numbers(records: reading.Records, options: Options, step: int) -> list[int]:
    """The numbers of the records in a step's batch."""
    numbers = reading.record_numbers(
        records, options.batch_size, step, seed=options.seed, validation_share=options.validation
    )
    return [int(number) for number in numbers]


def transformer_task(
    name: str,
    network: CogLMConfig | DirectSRConfig | IterativeSRConfig,
    data: TokenData,
    options: Options,
    sample: Callable[[np.random.Generator, Rows], Any],
    settings: checkpoint.Settings,
    bundle: Bundle,
    stage: str,
    unseen: Callable[[np.random.Generator, Rows], Any] | None = None,
    **given: Any,
) -> Task:
    """The task of a transformer; `sample` turns rows of records into a batch, `unseen` those of
    validation, if in another way, and `given` are the other fields of `Task`. `stage` is the first
    stage of the pipeline that the transformer runs in.
    """
    unseen = unseen or sample
    trained = STAGES[stage][-2]  # the tokenizer comes last

    def put(bundle: Bundle, params: Params) -> Bundle:
        replaced: dict[str, Any] = {trained: params}
        return bundle._replace(**replaced)

    def read(step: int) -> Any:
        return sample(np.random.default_rng((options.seed, 0, step)), data.rows(step))

    def read_validation(step: int) -> Any:
        return unseen(np.random.default_rng((options.seed, 1, step)), data.validation_rows(step))

    return Task(
        name=name,
        network=network,
        read=read,
        read_validation=read_validation,
        validation_batches=data.validation_batches,
        ids_of=data.ids_of,
        flops_per_sample=metrics.flops_per_sample(network),
        settings={
            "records": checkpoint.describe(data.records.manifest),
            **reading.split_settings(options.validation),
            **settings,
        },
        put=put,
        sampler=functools.partial(samples.of_prompts, bundle, put, stage),
        **given,
    )


def starting_params(
    start: str | None,
    known: dict[str, Params],
    from_coglm: Callable[[Params], Params] = lambda params: params,
) -> tuple[str, Params | None]:
    """Where training starts, and the parameters there; None for fresh ones.

    `known` holds the bundle's parameters, empty for a network that it lacks. Without a `start`, the
    first that the bundle has is taken, else "nothing". `from_coglm` turns CogLM's parameters into
    this network's. Raises ValueError for a start that the bundle lacks.
    """
    start = start or next((name for name, params in known.items() if params), "nothing")
    if start == "nothing":
        return start, None
    if start not in known:
        names = ", ".join([*known, "nothing"])
        raise ValueError(f"start must be one of {names} for this network: got {start!r}")
    if not known[start]:
        raise ValueError(
            f"start {start!r} needs parameters that the model lacks: train them first, or give"
            " another start"
        )
    return start, from_coglm(known[start]) if start == "coglm" else known[start]


def unrolled(sizes: TransformerConfig) -> TransformerConfig:
    """`sizes` with the scan over layers unrolled, for few layers on a CPU: there the scan costs a
    third of a step, and few layers still compile quickly.
    """
    few = sizes.num_layers <= 8 and jax.default_backend() == "cpu"
    return dataclasses.replace(sizes, unroll=sizes.num_layers) if few else sizes
