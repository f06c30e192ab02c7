"""The content of a bundle's config.json: the configurations of its networks, read strictly.

A field that is unknown, missing or of another type is refused in one line that names it, and so are
configurations that do not fit each other.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cogview2_jax import __version__
from cogview2_jax.config import (
    TOKEN_STRIDE,
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Sampling,
)
from cogview2_jax.errors import one_line
from cogview2_jax.styles import Style

FORMAT = 1
ADVICE = "copy or download the bundle again"
CHECKED = "checked"  # in `made_with`
# Fields that older bundles lack, and what they mean without.
_ADDED = {"guidance": 1.0, "edit_candidates": 0}
CONFIGS = ("coglm_config", "direct_config", "iterative_config", "tokenizer_config", "sampling")


class Description(NamedTuple):
    """The content of config.json."""

    coglm_config: CogLMConfig
    direct_config: DirectSRConfig
    iterative_config: IterativeSRConfig
    tokenizer_config: HVQVAEConfig
    sampling: Sampling
    made_with: dict[str, str]  # package -> version, and CHECKED -> `fingerprint`
    styles: tuple[Style, ...] = ()  # the first is the default of text to image


def made_with() -> dict[str, str]:
    """The versions that a model is made with, for its config.json."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return versions | {"cogview2_jax": __version__}


def fingerprint(description: Description, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names this version, these networks and these shapes of tensors, but not how pictures are
    drawn. Whoever has compared the shapes with the networks, which takes a second, leaves it in
    `made_with`.
    """
    networks = set(CONFIGS) - {"sampling"}
    configs = {name: value for name, value in to_json(description).items() if name in networks}
    content = json.dumps([__version__, configs, sorted(shapes.items())], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def to_json(description: Description) -> dict[str, Any]:
    """The content of config.json, which `parse_description` reads."""
    configs = {name: dataclasses.asdict(getattr(description, name)) for name in CONFIGS}
    for name, default in _ADDED.items():  # so that versions before can read it
        if configs["sampling"][name] == default:
            del configs["sampling"][name]
    content = {"format": FORMAT, "made_with": description.made_with, **configs}
    if description.styles:
        content["styles"] = [dataclasses.asdict(style) for style in description.styles]
    as_read: dict[str, Any] = json.loads(json.dumps(content))  # lists, not tuples
    return as_read


def parse_description(content: Mapping[str, Any], file: Path, advice: str = ADVICE) -> Description:
    """The content of config.json, read from `file`, checked.

    Raises ValueError, in one line, for fields that are unknown, missing, of another type or that do
    not fit each other.
    """
    if content["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {content['format']!r}, this version reads {FORMAT}:"
            " use the version of cogview2_jax that it was made with"
        )
    try:
        optional = {"styles"} & content.keys()
        _require_keys(content, {"format", "made_with", *CONFIGS, *optional}, "the file")
        types = typing.get_type_hints(Description)
        configs = {name: _from_json(types[name], content[name], name) for name in CONFIGS}
        styles = _from_json(tuple[Style, ...], content.get("styles", []), "styles")
        versions = content["made_with"]
        if not isinstance(versions, dict):
            raise ValueError("made_with must be an object")
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} is not valid ({one_line(error)}): {advice}") from error
    description = Description(**configs, made_with=versions, styles=styles)
    check_description(description, file)
    return description


def check_description(description: Description, where: Path) -> None:
    """Raises ValueError if two configurations do not fit each other."""
    coglm, direct, iterative, tokenizer, sampling, *_ = description
    pairs = {
        "direct_config.coglm.grid": (direct.coglm.grid, coglm.grid),
        "direct_config.coglm.vocabulary": (direct.coglm.vocabulary, coglm.vocabulary),
        "iterative_config.grid": (iterative.grid, direct.grid),
        "iterative_config.vocabulary": (iterative.vocabulary, coglm.vocabulary),
        "the length of sampling.iterative_top_k": (
            len(sampling.iterative_top_k),
            iterative.rounds,
        ),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise ValueError(f"{where}: {name} must be {expected}: got {found}")
    names = [style.name for style in description.styles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: styles must have different names: got {twice[0]} twice")
    codes, num_image = tokenizer.codebook_size, coglm.vocabulary.num_image
    if codes > num_image:
        raise ValueError(
            f"{where}: tokenizer_config.codebook_size must be at most {num_image}, the number of"
            f" image tokens: got {codes}"
        )
    if TOKEN_STRIDE not in tokenizer.strides:
        raise ValueError(
            f"{where}: the strides of tokenizer_config must have {TOKEN_STRIDE}, which all"
            f" networks are drawn with: got {tokenizer.strides}"
        )


def require_one_codebook(description: Description, networks: Collection[str], where: Path) -> None:
    """Raises ValueError if the tokenizer is used with another of `networks` and lacks codes for
    some of its image tokens. A bundle may hold such a pair, to be used one by one.
    """
    codes = description.tokenizer_config.codebook_size
    num_image = description.coglm_config.vocabulary.num_image
    if codes != num_image and "tokenizer" in networks and len(set(networks)) > 1:
        raise ValueError(
            f"{where}: the tokenizer has {codes} codes, the other networks draw {num_image} image"
            " tokens: take them from one model"
        )


def _require_keys(content: Mapping[str, Any], names: set[str], where: str) -> None:
    if missing := sorted(names - content.keys()):
        raise ValueError(f"{where} lacks {missing[0]!r}")
    if unknown := sorted(content.keys() - names):
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}")


def _from_json(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the type `kind`: a dataclass, tuple, bool, int or float."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object: got {value!r}")
        types = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        _require_keys(value, names - (_ADDED.keys() - value.keys()), where)
        fields = {name: _from_json(types[name], value[name], f"{where}.{name}") for name in value}
        return typing.cast(type, kind)(**fields)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list: got {value!r}")
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries: got {len(value)}")
        return tuple(
            _from_json(part, item, f"{where}[{number}]")
            for number, (part, item) in enumerate(zip(kinds, value, strict=True))
        )
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
        raise ValueError(f"{where} must be {kind.__name__}: got {value!r}")
    return kind(value)
