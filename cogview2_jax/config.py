"""Sizes and settings of every network, as frozen dataclasses, with the published and the Scenes
presets.

Each class is one concern (architecture, precision, sampling) and is checked when it is made. Vary
one with `dataclasses.replace`; what can be derived is a property. The published numbers are those
of the released code and weights (paper arXiv 2204.14217, sections 3 to 5; where the two differ, the
code's).
"""

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

from cogview2_jax.checks import (
    as_float,
    check_count,
    check_settings,
    check_temperature,
    require,
    require_counts,
    require_grid,
    setting,
)

Grid = tuple[int, int]  # (rows, columns)

# Pixels per token that all networks are trained and drawn with: the middle one of the tokenizer's
# three strides, as published.
TOKEN_STRIDE = 8


@dataclass(frozen=True)
class Precision:
    """Dtypes of the parameters and of the computation: names or jax dtypes. Softmax and LayerNorm
    sums are always float32.

    `matrices` "int8" keeps the transformers' matrices in int8 (`networks.quantisation`), for
    generation on one device; None: as `params` says.
    """

    params: Any = "float32"
    compute: Any = "float32"
    matrices: str | None = None

    def __post_init__(self) -> None:
        if self.matrices not in (None, "int8"):
            raise ValueError(f"matrices must be int8 or None: got {self.matrices!r}")


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
        require_counts(self, num_image=1, size=4, pad=0, unknown=0, first_chinese=0)
        require(
            0 < self.num_image <= self.size - 3,
            f"num_image must leave room for three start tokens: got {self.num_image} of "
            f"{self.size}",
        )
        require(
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
        require_counts(self, num_layers=1, hidden_size=1, num_heads=1, mlp_ratio=1, unroll=1)
        require(
            0 <= as_float(self.layernorm_epsilon) < math.inf,
            f"layernorm_epsilon must be finite and at least 0: got {self.layernorm_epsilon}",
        )
        require(
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
        require_grid("grid", self.grid)
        require_counts(self, max_text=1, num_positions=1, image_position=1)
        last = self.image_position + self.num_image_tokens
        require(
            last <= self.num_positions,
            f"num_positions must hold the image cells: got {self.num_positions}, needed {last}",
        )
        require(
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

    def __post_init__(self) -> None:
        require_counts(self, ratio=1, text_slots=1)
        require_grid("window", self.window, odd=True)
        require_grid("cross_window", self.cross_window, odd=True)
        require(
            self.text_slots <= self.coglm.image_position,  # else a word has the position of a cell
            f"text_slots must be at most image_position: got {self.text_slots} and"
            f" {self.coglm.image_position}",
        )

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
        require_grid("grid", self.grid)
        require_grid("window", self.window, odd=True)
        require_counts(self, text_slots=1, num_positions=1, rounds=1, order=-(2**31))
        require(
            all(isinstance(row, tuple) and row for row in self.order)
            and len({len(row) for row in self.order}) == 1,
            f"order must be a rectangle of rows: got {self.order!r}",
        )
        require(
            self.text_slots <= self.num_positions,
            f"num_positions must hold text_slots: got {self.num_positions} and {self.text_slots}",
        )

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


MOST_BLOCKS = 256  # of a level of the tokenizer; each is traced by itself


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
        require_counts(
            self,
            channels=1,
            encoder_multipliers=1,
            encoder_blocks=1,
            decoder_multipliers=1,
            decoder_blocks=1,
            groups=1,
            z_channels=1,
            codebook_size=1,
            codebook_dim=1,
            nominal_resolution=1,
            attention_resolution=0,
        )
        require(
            bool(self.encoder_multipliers and self.decoder_multipliers),
            "encoder_multipliers and decoder_multipliers must not be empty",
        )
        for name in ("encoder_blocks", "decoder_blocks"):
            blocks = getattr(self, name)
            require(blocks <= MOST_BLOCKS, f"{name} must be at most {MOST_BLOCKS}: got {blocks}")
        for name in ("mean", "std"):
            finite = all(math.isfinite(as_float(value)) for value in getattr(self, name))
            require(finite, f"{name} must be finite: got {getattr(self, name)}")
        require(all(self.std), f"std must not be 0: got {self.std}")
        for strides, multipliers in zip(self.strides[::-1], self.decoder_multipliers, strict=True):
            require(
                2 ** (len(multipliers) - 1) == strides,
                f"a decoder of stride {strides} needs {strides.bit_length()} multipliers:"
                f" got {multipliers}",
            )
        require(
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
    picture `candidates` times, and the best-scoring candidate is kept (post-selection); a part of a
    picture is redrawn `edit_candidates` times, with 0 `candidates` times.
    `iterative_temperature` 0 takes the most probable token; an `iterative_top_k` above the number
    of image tokens keeps all of them. With `guidance` g, the base stage draws from logits without
    the text plus g times what the text adds (classifier-free guidance, arXiv 2207.12598), for a
    model trained with texts left out; 1 is none.
    """

    base: ClusterSampling = field(default_factory=ClusterSampling)
    direct: ClusterSampling = field(
        default_factory=lambda: ClusterSampling(1.0, top_clusters=100, within_temperature=0.89)
    )
    iterative_temperature: float = 1.0
    iterative_top_k: tuple[int, ...] = (40, 40, 40, 20, 20, 10)
    text_upweight: float = 1.4
    candidates: int = 1
    guidance: float = 1.0
    edit_candidates: int = 0

    def __post_init__(self) -> None:
        check_temperature("iterative_temperature", self.iterative_temperature)
        require(
            isinstance(self.iterative_top_k, tuple) and len(self.iterative_top_k) > 0,
            f"iterative_top_k must be a tuple, one for each round: got {self.iterative_top_k!r}",
        )
        for number, top_k in enumerate(self.iterative_top_k):
            check_count(f"iterative_top_k[{number}]", top_k)
        for name in ("text_upweight", "guidance"):
            value: Any = getattr(self, name)
            finite = isinstance(value, numbers.Real) and math.isfinite(as_float(value))
            require(finite, f"{name} must be a finite number: got {value!r}")
        check_count("candidates", self.candidates)
        check_count("edit_candidates", self.edit_candidates, 0)

    def candidates_of(self, *, edits: bool) -> int:
        """How often a picture, or a part of one, is drawn at the base stage."""
        return self.edit_candidates if edits and self.edit_candidates else self.candidates
