"""Sizes and settings of every network, as frozen dataclasses, with the published and the Scenes
presets.

Each class is one concern (architecture, precision, sampling) and is checked when it is made. Vary
one with `dataclasses.replace`; what can be derived is a property. The published numbers are those
of the released code and weights (paper arXiv 2204.14217, sections 3 to 5; where the two differ, the
code's).
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Grid = tuple[int, int]  # (rows, columns)

# Pixels per token that all networks are trained and drawn with: the middle one of the tokenizer's
# three strides, as published.
TOKEN_STRIDE = 8


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    flag: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with its range and its help; the command line makes an option of it.

    Numbers must be finite, at least `least`, above `above`, at most `most` and below `below`;
    strings one of `choices`. None is allowed if it is the default. `flag` is the option's name if
    it differs from the field's.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    about = {"help": help, "limits": given, "choices": tuple(choices)}
    return field(default=default, metadata=about | {"flag": flag, "metavar": metavar})


def check_settings(config: Any) -> None:
    """Check the `setting` fields of a dataclass. Raises ValueError for the first wrong one."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if "help" not in each.metadata or (value is None and each.default is None):
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if wanted := _wanted(one, each):
                raise ValueError(f"{each.name} must be {wanted}: got {one!r}")


_INSIDE = {
    "least": operator.ge,
    "above": operator.gt,
    "most": operator.le,
    "below": operator.lt,
}


def _wanted(value: Any, about: dataclasses.Field) -> str | None:
    """What the value of a field must be; None if it is."""
    choices, limits = about.metadata["choices"], about.metadata["limits"]
    if choices:
        return None if value in choices else f"one of {', '.join(choices)}"
    if isinstance(about.default, bool):
        return None if isinstance(value, bool) else "True or False"
    if not limits:
        return None
    whole = "int" in str(about.type)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return "a whole number" if whole else "a number"
    inside = (_INSIDE[name](value, limit) for name, limit in limits.items())
    if math.isfinite(value) and all(inside):
        return None
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    if len(limits) == 2:
        words |= {"least": "from", "most": "to", "below": "to below"}
    return " ".join(f"{words[name]} {limit}" for name, limit in limits.items())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number: got {value!r}")
    _require(int(value) >= least, f"{name} must be at least {least}: got {value}")
    return int(value)


def check_temperature(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError unless it is finite and not negative; 0 is greedy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number: got {value!r}")
    number = float(value)
    _require(0 <= number < math.inf, f"{name} must be finite and at least 0 (greedy): got {value}")
    return number


@dataclass(frozen=True)
class Precision:
    """Dtypes of the parameters and of the computation: names or jax dtypes. Softmax and LayerNorm
    sums are always float32.
    """

    params: Any = "float32"
    compute: Any = "float32"


REMATERIALISATION = ("none", "products", "all")


@dataclass(frozen=True)
class Training:
    """Settings of a transformer that only training uses. `remat` changes no result."""

    dropout: float = setting(
        0.0,
        "Dropout rate of the embeddings and of each attention's and MLP's output.",
        least=0,
        below=1,
        metavar="X",
    )
    remat: str = setting(
        "none",
        "What the backward pass recomputes instead of storing it: nothing, all but matrix products,"
        " or all but each layer's input. Saves memory.",
        choices=REMATERIALISATION,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Vocabulary:
    """One id space: image tokens, then text pieces, then the three start tokens.

    A text id is the SentencePiece id + `num_image`. `pad`, `unknown` and `first_chinese` are ids of
    this space. A text is English where all its ids are below `first_chinese`; the published number
    is that of the released code. `as_published` says how text becomes ids: as the released
    tokenizer does it, with `<unk>` for what the model cannot spell; else text is cleaned first and
    unknown words are refused.
    """

    num_image: int = 20_000
    size: int = 150_003
    pad: int = 20_003
    unknown: int = 20_000
    first_chinese: int = 83_823
    as_published: bool = True

    def __post_init__(self) -> None:
        _require(
            0 < self.num_image <= self.size - 3,
            f"num_image must leave room for three start tokens: got {self.num_image} of "
            f"{self.size}",
        )
        _require(
            self.first_chinese >= self.num_image,
            f"first_chinese must be a text id, from {self.num_image}: got {self.first_chinese}",
        )

    @property
    def id_space(self) -> tuple[int, int, int, int]:
        """The fields that networks and records depend on. The others are about reading text."""
        return self.num_image, self.size, self.pad, self.unknown

    @property
    def start_of_image(self) -> int:
        return self.size - 3

    @property
    def start_of_english(self) -> int:
        return self.size - 2

    @property
    def start_of_chinese(self) -> int:
        return self.size - 1

    @property
    def num_text(self) -> int:
        return self.size - 3 - self.num_image


@dataclass(frozen=True)
class TransformerConfig:
    """The stack of layers in each of the three networks.

    `unroll` is the number of layers in one iteration of the scan over layers. It changes no result:
    more layers take longer to compile, and save a CPU from copying the stored activations.
    """

    num_layers: int = 48
    hidden_size: int = 3072
    num_heads: int = 48
    mlp_ratio: int = 4
    layernorm_epsilon: float = 1e-5
    unroll: int = 1

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size must be a multiple of num_heads: got {self.hidden_size}"
            f" and {self.num_heads}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class CogLMConfig:
    """The base language model over text and a small grid of image tokens.

    `max_text` is the longest prompt in tokens. Text has positions 0…, `<start_of_image>` has
    `image_position - 1`, the image cells have `image_position`… in raster order.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    grid: Grid = (20, 20)
    max_text: int = 110
    num_positions: int = 1024
    image_position: int = 513

    def __post_init__(self) -> None:
        last = self.image_position + self.num_image_tokens
        _require(
            last <= self.num_positions,
            f"num_positions must hold the image cells: got {self.num_positions}, needed {last}",
        )
        _require(
            self.max_text < self.image_position,
            f"max_text must be below image_position: got {self.max_text} and {self.image_position}",
        )

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def text_slots(self) -> int:
        """Text places of a training record, without `<start_of_image>` (111 + 1 + 400 = 512)."""
        return self.max_text + 1


@dataclass(frozen=True)
class DirectSRConfig:
    """One-pass super-resolution: the base transformer and a second attention for fine queries."""

    coglm: CogLMConfig = field(default_factory=CogLMConfig)
    ratio: int = 3
    text_slots: int = 96
    window: Grid = (9, 5)
    cross_window: Grid = (5, 5)

    @property
    def grid(self) -> Grid:
        return self.coglm.grid[0] * self.ratio, self.coglm.grid[1] * self.ratio

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix(self) -> int:
        """Tokens before the queries: left-padded text and the coarse grid."""
        return self.text_slots + self.coglm.num_image_tokens


# The published 6×6 order of local parallel auto-regression. Rounds count from 1, so that cells of
# order 0 and below are never re-generated.
LOPAR_ORDER = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)


@dataclass(frozen=True)
class IterativeSRConfig:
    """Super-resolution by re-generating masked cells in rounds (local parallel auto-regression)."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    grid: Grid = (60, 60)
    text_slots: int = 16
    num_positions: int = 1024
    window: Grid = (9, 5)
    order: tuple[tuple[int, ...], ...] = LOPAR_ORDER
    rounds: int = 6

    def __post_init__(self) -> None:
        _require(
            self.text_slots <= self.num_positions,
            f"num_positions must hold text_slots: got {self.num_positions} and {self.text_slots}",
        )

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class HVQVAEConfig:
    """The hierarchical image tokenizer: one encoder, one codebook, a decoder for each stride.

    `decoder_multipliers` go from the largest stride to the smallest, as in the published file.
    """

    channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 2, 4)
    encoder_blocks: int = 2
    decoder_multipliers: tuple[tuple[int, ...], ...] = ((1, 1, 1, 2, 4), (1, 1, 2, 4), (1, 2, 4))
    decoder_blocks: int = 1
    groups: int = 32
    z_channels: int = 256
    codebook_size: int = 20_000
    codebook_dim: int = 256
    nominal_resolution: int = 256
    attention_resolution: int = 16
    mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    def __post_init__(self) -> None:
        for strides, multipliers in zip(self.strides[::-1], self.decoder_multipliers, strict=True):
            _require(
                2 ** (len(multipliers) - 1) == strides,
                f"a decoder of stride {strides} needs {strides.bit_length()} multipliers:"
                f" got {multipliers}",
            )
        _require(
            self.channels % self.groups == 0,
            f"channels must be a multiple of groups: got {self.channels} and {self.groups}",
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token, smallest first: (4, 8, 16)."""
        first = 2 ** (len(self.encoder_multipliers) - 1)
        return tuple(first * 2**level for level in range(len(self.decoder_multipliers)))


@dataclass(frozen=True)
class ClusterSampling:
    """Two-step sampling (section 3.3): one of the `top_clusters` most probable clusters, then a
    token inside it.

    Temperatures are finite and at least 0. `temperature` 0 takes the most probable token;
    `within_temperature` 0 draws a cluster and takes its most probable token. `top_clusters` above
    the number of clusters keeps all of them.
    """

    temperature: float = 1.15
    top_clusters: int = 16
    within_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        check_count("top_clusters", self.top_clusters)
        check_temperature("within_temperature", self.within_temperature)


@dataclass(frozen=True)
class Sampling:
    """How the pipeline draws at each stage.

    `text_upweight` is added to the attention scores of all text keys. The base stage draws each
    picture `candidates` times, and the best-scoring candidate is kept (post-selection).
    `iterative_temperature` 0 takes the most probable token; an `iterative_top_k` above the number
    of image tokens keeps all of them.
    """

    base: ClusterSampling = field(default_factory=ClusterSampling)
    direct: ClusterSampling = field(
        default_factory=lambda: ClusterSampling(1.0, top_clusters=100, within_temperature=0.89)
    )
    iterative_temperature: float = 1.0
    iterative_top_k: tuple[int, ...] = (40, 40, 40, 20, 20, 10)
    text_upweight: float = 1.4
    candidates: int = 1

    def __post_init__(self) -> None:
        check_temperature("iterative_temperature", self.iterative_temperature)
        _require(
            isinstance(self.iterative_top_k, tuple) and len(self.iterative_top_k) > 0,
            f"iterative_top_k must be a tuple, one for each round: got {self.iterative_top_k!r}",
        )
        for number, top_k in enumerate(self.iterative_top_k):
            check_count(f"iterative_top_k[{number}]", top_k)
        upweight: Any = self.text_upweight
        finite = isinstance(upweight, numbers.Real) and math.isfinite(upweight)
        _require(finite, f"text_upweight must be a finite number: got {upweight!r}")
        check_count("candidates", self.candidates)
