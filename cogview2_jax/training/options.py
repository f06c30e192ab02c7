"""Every option of training: its default, its range and its help. The command line is built from
these.

Each class is one concern. Vary one with `dataclasses.replace`. A wrong value raises ValueError, in
one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogview2_jax.checks import check_settings, setting
from cogview2_jax.config import Precision, Training

if TYPE_CHECKING:
    from cogview2_jax.sharding import Execution

_START = "Parameters to start from. Default: the first of these that the model has."


@dataclass(frozen=True)
class Options:
    """How to train: the options that all networks share."""

    num_steps: int = setting(1000, "Total number of steps.", least=1, flag="steps", metavar="N")
    batch_size: int = setting(16, "Samples per step, over all devices.", least=1, metavar="N")
    learning_rate: float = setting(4e-4, "Peak learning rate.", above=0, metavar="X")
    warmup: float = setting(
        0.1,
        "Share of the steps in which the learning rate rises from 0.",
        least=0,
        below=1,
        metavar="X",
    )
    final_rate: float = setting(
        0.1, "Final learning rate, as a share of the peak.", least=0, below=1, metavar="X"
    )
    optimizer: str = setting(
        "adamw",
        "muon: Muon for matrices, AdamW at a tenth of the learning rate for the rest.",
        choices=("adamw", "muon"),
    )
    weight_decay: float = setting(
        0.01,
        "Weight decay of matrices and, with adamw, of embedding tables.",
        least=0,
        metavar="X",
    )
    clip: float = setting(
        1.0, "Largest gradient norm; larger gradients are scaled down to it.", above=0, metavar="X"
    )
    accumulate: int = setting(
        1,
        "Parts that a batch is cut into; computed one after the other, to save memory.",
        least=1,
        metavar="N",
    )
    average: float = setting(
        0.0,
        "Decay of a moving average of the parameters. The average is validated and becomes the"
        " model. 0 for none.",
        least=0,
        below=1,
        metavar="X",
    )
    z_loss: float = setting(
        0.0, "Weight of the squared log normaliser in the loss.", least=0, metavar="X"
    )
    seed: int = setting(0, "Seed of all random numbers.", least=0, most=2**31 - 1, metavar="N")
    validation: float = setting(
        0.0,
        "Share of the records kept for validation, which takes place at the start and at every"
        " save, on a few batches of them.",
        least=0,
        below=1,
        metavar="X",
    )
    schedule_steps: int | None = setting(
        None,
        "Steps that the schedules span (learning rate, start of quantisation). Default: --steps, or"
        " those that the run began with. After them the learning rate stays at its final value.",
        least=1,
        metavar="N",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size {self.batch_size}: got {self.accumulate}"
            )

    @property
    def planned_steps(self) -> int:
        """The steps that the schedules span."""
        return self.schedule_steps or self.num_steps


@dataclass(frozen=True)
class LoopOptions:
    """What a run writes, and when. It changes no parameter."""

    save_every: int = setting(200, "Steps between checkpoints.", least=1, metavar="N")
    keep: int = setting(
        2, "Newest checkpoints to keep, in addition to the best one.", least=1, metavar="N"
    )
    log_every: int = setting(20, "Steps between lines of metrics.", least=1, metavar="N")
    sample_every: int = setting(
        0, "Steps between pictures in DIR/samples; 0 for none.", least=0, metavar="N"
    )
    skip_non_finite: bool = setting(
        False,
        "Skip a step with a loss, gradient or parameter that is not finite, instead of stopping.",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ComputeOptions(Training):
    """How and where a step is computed."""

    dtype: str = setting(
        "float32",
        "Dtype of the computation; parameters stay float32.",
        choices=("float32", "bfloat16"),
    )
    data: int | None = setting(
        None,
        "Groups of devices that split the batch, each with a copy of the weights. Default: as many"
        " as --fsdp and --tensor leave.",
        least=1,
        metavar="N",
    )
    fsdp: int = setting(1, "Devices that split the batch and the weights.", least=1, metavar="N")
    tensor: int = setting(
        1, "Devices that split each sample's attention heads and MLP.", least=1, metavar="N"
    )

    def execution(self) -> Execution:
        """On all devices that there are. Raises ValueError for a mesh that does not fit them."""
        # Imported here: the command line reads these classes to print its help.
        import jax

        from cogview2_jax.sharding import Execution, Sharding, make_mesh

        sharding = None
        if jax.device_count() > 1:
            sharding = Sharding(make_mesh(self.data, self.fsdp, self.tensor))
        elif max(self.data or 1, self.fsdp, self.tensor) > 1:
            raise ValueError("data, fsdp and tensor need several devices: there is one")
        training = Training(self.dropout, self.remat)
        return Execution(Precision(compute=self.dtype), training, sharding)


@dataclass(frozen=True)
class ProcessOptions:
    """Where the other processes of a run are, if there are any."""

    distributed: bool = setting(
        False,
        "This is one of several processes, which the environment names (Slurm, Kubernetes, Open"
        " MPI).",
    )
    coordinator: str | None = setting(
        None, "Instead of --distributed: address of process 0.", metavar="HOST:PORT"
    )
    processes: int | None = setting(None, "Number of processes.", least=1, metavar="N")
    process: int | None = setting(
        None, "Number of this process, counted from 0.", least=0, metavar="I"
    )
    peer_timeout: int = setting(
        100,
        "Time after which the death of another process ends this one.",
        least=1,
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        by_hand = [value is None for value in (self.coordinator, self.processes, self.process)]
        if any(by_hand) and not all(by_hand):
            raise ValueError("coordinator, processes and process go together")
        if self.processes is not None and self.process is not None:
            if self.process >= self.processes:
                raise ValueError(
                    f"process must be below processes {self.processes}: got {self.process}"
                )


# --- Of one network -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerOptions:
    """Options of the image tokenizer.

    From nothing, it trains without quantisation for the share `settle` of the steps. Then the
    codebook is placed on encoded crops, and from there on it is updated by a moving average.
    """

    start: str | None = setting(None, _START, choices=("model", "nothing"))
    side: int | None = setting(
        None,
        "Side of the crops. Default: 8 tokens of the largest trained stride.",
        least=1,
        metavar="PIXELS",
    )
    mirror: bool = setting(
        False, "Mirror half of the crops. Wrong for pictures with text or flags."
    )
    strides: tuple[int, ...] = setting(
        (),
        "Train only this stride; may be repeated. Default: all of them.",
        least=1,
        flag="stride",
        metavar="PIXELS",
    )
    keep_others: bool = setting(
        False,
        "Freeze everything that the other strides use, so that their tokens stay the same.",
    )
    clusters: int | None = setting(
        None,
        "Clusters of the codebook, for cluster sampling. Default: as many as the model has, or one"
        " for 16 codes, at most 500.",
        least=1,
        metavar="N",
    )
    settle: float = setting(
        0.1,
        "Share of the steps without quantisation, at the start of a training from nothing.",
        least=0,
        below=1,
        metavar="X",
    )
    decay: float = setting(
        0.99, "Decay of the codebook's moving average.", least=0, below=1, metavar="X"
    )
    commitment: float = setting(1.0, "Weight of the commitment loss.", least=0, metavar="X")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class CogLMOptions:
    """Options of the base model: its tasks. Captioning at 0.3 is published; completion,
    `drop_text`, `to_border` and `predict_end` are ours.
    """

    start: str | None = setting(None, _START, choices=("model", "nothing"))
    caption_ratio: float = setting(
        0.3,
        "Share of pictures that train captioning and masked patches, instead of generation.",
        least=0,
        most=1,
        metavar="X",
    )
    completion_ratio: float = setting(
        0.0,
        "Of the other pictures, the share in which only a rectangle is drawn, from the text and the"
        " rest of the picture: it makes editing follow the text.",
        least=0,
        most=1,
        metavar="X",
    )
    drop_text: float = setting(
        0.0,
        "Share of pictures that are drawn without seeing their text, so that the model can be drawn"
        " from with --guidance.",
        least=0,
        most=1,
        metavar="X",
    )
    text_ratio: float = setting(
        0.05,
        "Share of samples of text alone, with masked spans.",
        least=0,
        most=1,
        metavar="X",
    )
    patch_size: int = setting(4, "Side of a masked patch, in cells.", least=1, metavar="N")
    num_patches: int | None = setting(
        None,
        "Number of masked patches. Default: as many as cover 0.8 of the grid.",
        least=1,
        metavar="N",
    )
    to_border: bool = setting(
        True, "Let patches reach the last row and column; the published code does not."
    )
    predict_end: bool = setting(True, "Teach where a caption ends; the published code does not.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class DirectSROptions:
    """Options of direct super-resolution."""

    start: str | None = setting(None, _START, choices=("model", "coglm", "nothing"))
    freeze_base: bool = setting(
        False, "Train only the parameters that the base model does not have."
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class IterativeSROptions:
    """Options of iterative super-resolution."""

    start: str | None = setting(None, _START, choices=("model", "coglm", "nothing"))

    def __post_init__(self) -> None:
        check_settings(self)
