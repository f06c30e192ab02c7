"""A model as one folder: configuration, text model and the weights of its four networks.

    config.json          every configuration dataclass, the format's version, what made it
    text.model           the SentencePiece model
    weights.safetensors  parameters in any float dtype, names joined with "/", and cluster labels

A bundle that is still being trained may lack networks; each is there entirely or not at all. The
cluster labels come with the tokenizer, and the file of weights with the first network.

Nothing in it is code, and none is run. Reading is strict: an unknown, missing or ill-shaped field
or tensor is refused in one line that names the file, what is wrong with it and what to do.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import sentencepiece as spm
from safetensors.numpy import save_file

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Sampling,
)
from cogview2_jax.description import (
    ADVICE,
    CHECKED,
    CONFIGS,
    check_description,
    fingerprint,
    require_one_codebook,
)
from cogview2_jax.description import Description as Description
from cogview2_jax.description import made_with as made_with
from cogview2_jax.description import parse_description as parse_description
from cogview2_jax.description import to_json as to_json
from cogview2_jax.errors import one_line
from cogview2_jax.shapes import CLUSTER_LABELS as CLUSTER_LABELS
from cogview2_jax.shapes import expected_shapes as expected_shapes
from cogview2_jax.shapes import flat
from cogview2_jax.sharding import Execution
from cogview2_jax.styles import Style
from cogview2_jax.tokenizer import text

CONFIG, TEXT_MODEL, WEIGHTS = "config.json", "text.model", "weights.safetensors"
BUNDLES = Path(__file__).parent / "bundles"  # those that ship
SHIPPED = BUNDLES / "scenes"

Params = dict


class Bundle(NamedTuple):
    """A model in memory. The four trees of parameters share nothing.

    The tree of a missing network is empty, and so are the labels without a tokenizer.
    """

    coglm_config: CogLMConfig
    direct_config: DirectSRConfig
    iterative_config: IterativeSRConfig
    tokenizer_config: HVQVAEConfig
    sampling: Sampling
    coglm: Params
    direct: Params
    iterative: Params
    tokenizer: Params
    text_model: spm.SentencePieceProcessor
    cluster_labels: np.ndarray  # int32 [num_image], the cluster of each image token
    styles: tuple[Style, ...] = ()  # the first is the default of text to image

    def params(self, network: str) -> Params:
        """The parameters of one of `NETWORKS`. Raises ValueError where they are still to be
        trained.
        """
        found: Params = getattr(self, network)
        if not found:
            raise ValueError(f"the model lacks {network}: `{TRAINED_BY[network]}` trains it")
        return found

    def config_of(self, network: str) -> CogLMConfig | DirectSRConfig | IterativeSRConfig | None:
        """The configuration of a transformer; None for the image tokenizer."""
        known: dict[str, CogLMConfig | DirectSRConfig | IterativeSRConfig] = {
            "coglm": self.coglm_config,
            "direct": self.direct_config,
            "iterative": self.iterative_config,
        }
        return known.get(network)

    @property
    def num_clusters(self) -> int:
        return int(self.cluster_labels.max(initial=-1)) + 1


# Each network, in the order of training, and the command that trains it.
TRAINED_BY = {
    "tokenizer": "cogview2 train tokenizer",
    "coglm": "cogview2 train coglm",
    "direct": "cogview2 train direct-sr",
    "iterative": "cogview2 train iterative-sr",
}
NETWORKS = tuple(TRAINED_BY)


def save(path: str | os.PathLike[str], bundle: Bundle) -> None:
    """Write `bundle` as the folder `path`, whole or not at all, in place of a bundle that is there.

    A network with an empty tree is left out. Raises ValueError for parts that do not fit each other
    and for weights outside float16, OSError (one line) for a full disk, a place that is not
    writable, and one that holds something else.
    """
    path = Path(path).absolute()
    if path.exists() and not _may_be_replaced(path):
        raise FileExistsError(f"{path} is there and is no bundle: give another folder")
    configs: dict[str, Any] = {name: getattr(bundle, name) for name in CONFIGS}
    description = Description(**configs, made_with=made_with(), styles=bundle.styles)
    check_description(description, path)
    _check_text_model(bundle.text_model, bundle.coglm_config, path)
    tensors = _tensors(bundle)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _check_shapes(shapes, bundle, path)
    description.made_with[CHECKED] = fingerprint(description, shapes)

    # In the target's folder, so that the last step is a rename within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(json.dumps(to_json(description), indent=2) + "\n", "utf-8")
        (partial / TEXT_MODEL).write_bytes(bundle.text_model.serialized_model_proto())
        if tensors:
            save_file(tensors, partial / WEIGHTS)
            # safetensors lets only the owner read.
            shutil.copymode(partial / CONFIG, partial / WEIGHTS)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OSError(f"bundle {path} could not be written: {reason}") from error
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def load(
    path: str | os.PathLike[str] | None = None,
    networks: Collection[str] | None = None,
    execution: Execution = Execution(),
    *,
    on_host: bool = False,
) -> Bundle:
    """The bundle in the folder `path`, or one that ships with the package (see `locate`).

    Reads the named `networks`, which must all be there; by default those that are there, at least
    one. The trees of the others are empty. Parameters are put on the devices by `place`, or stay
    `on_host`.

    Raises FileNotFoundError for a missing folder or file and ValueError for a damaged or
    ill-fitting one and for missing networks, each in one line.
    """
    if unknown := sorted(set(networks or ()) - set(NETWORKS)):
        raise ValueError(f"networks must be of {', '.join(NETWORKS)}: got {unknown[0]!r}")
    folder = locate(path)
    description = read_description(folder)
    bundle = untrained(description, read_text_model(folder, description))
    # Shapes first: they are in the header, so an unfit file is refused before it is read.
    shapes = _stored_shapes(folder)
    if description.made_with.get(CHECKED) != fingerprint(description, shapes):
        _check_shapes(shapes, bundle, folder)
    there = _networks_of(shapes)
    networks = (there or NETWORKS) if networks is None else networks
    if missing := [name for name in NETWORKS if name in networks and name not in there]:
        what = f"lacks {', '.join(missing)}" + ("" if shapes else f" (no file {WEIGHTS})")
        raise ValueError(f"bundle {folder} {what}: `{TRAINED_BY[missing[0]]}` trains {missing[0]}")
    require_one_codebook(description, networks, folder)
    tensors = _read_tensors(folder, [name for name in shapes if _head(name) in networks])
    trees: dict[str, Any] = _nest(tensors)
    bundle = bundle._replace(**trees)
    if CLUSTER_LABELS in shapes:
        (labels,) = _read_tensors(folder, [CLUSTER_LABELS]).values()
        size = description.coglm_config.vocabulary.num_image
        if wrong := [label for label in (labels.min(), labels.max()) if not 0 <= label < size]:
            what = f"a cluster label of {wrong[0]}, not from 0 to {size - 1}"
            raise ValueError(f"{folder / WEIGHTS} is damaged ({what}): {ADVICE}")
        bundle = bundle._replace(cluster_labels=labels.astype(np.int32))
    return place(bundle, execution, on_host=on_host)


def place(bundle: Bundle, execution: Execution, *, on_host: bool = False) -> Bundle:
    """The bundle with its parameters on the devices, in the dtype and sharding of `execution`.

    The transformers' parameters get the dtype `execution.precision.params`, their matrices perhaps
    int8, and on a mesh the sharding of their logical axes. The tokenizer's stay float32 and
    replicated. With `on_host`, none is put on a device yet. Raises ValueError for a parameter that
    the mesh cannot shard evenly, and for int8 on a mesh.
    """
    from cogview2_jax import placement

    placement.require_placeable(execution)

    def placed(name: str) -> Params:
        tree: Params = getattr(bundle, name)
        config = bundle.config_of(name)
        if not tree:
            return tree
        tree = placement.prepared(tree, config, execution.precision)
        return tree if on_host else placement.put(tree, config, execution.sharding)

    trees: dict[str, Any] = {name: placed(name) for name in NETWORKS}
    return bundle._replace(**trees)


def networks_in(path: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Which networks the bundle in the folder `path` holds, in the order of training.

    Cheap: it reads the header of the weights only. Raises FileNotFoundError for a missing folder
    and ValueError for a damaged file of weights.
    """
    there = _networks_of(_stored_shapes(locate(path)))
    return tuple(name for name in NETWORKS if name in there)


def untrained(description: Description, text_model: spm.SentencePieceProcessor) -> Bundle:
    """A bundle with these parts and no network, to be trained from zero."""
    return Bundle(
        *description[:5],  # the configurations, in the same order
        coglm={},
        direct={},
        iterative={},
        tokenizer={},
        text_model=text_model,
        cluster_labels=np.zeros(0, np.int32),
        styles=description.styles,
    )


def locate(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a bundle: `path`, or the one that ships under this name, "scenes", if there is
    no such folder, or the default one.

    Raises FileNotFoundError when there is none, NotADirectoryError when it is a file.
    """
    folder = SHIPPED if path is None else Path(path)
    if folder.name == str(folder) and not folder.exists() and (BUNDLES / folder).is_dir():
        return BUNDLES / folder
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"bundle {folder} is a file: give the folder that holds {CONFIG}")
    if path is None:
        raise FileNotFoundError(
            f"the bundle that ships with cogview2_jax is missing at {folder}:"
            " install the package again, or give the folder of another bundle"
        )
    names = " or ".join(sorted(each.name for each in BUNDLES.glob("*/")))
    raise FileNotFoundError(
        f"bundle {folder} does not exist: give the folder of a saved bundle, or {names}"
    )


def read_description(folder: Path) -> Description:
    """config.json of the bundle at `folder`, checked. Raises as `load` does."""
    file = _file(folder, CONFIG)
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged (not JSON: {one_line(error)}): {ADVICE}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{file} is not the configuration of a bundle: {ADVICE}")
    _add_text_facts(content, folder)
    return parse_description(content, file)


def _add_text_facts(content: dict[str, Any], folder: Path) -> None:
    """Vocabularies of version 0.1 lack `first_chinese` and `as_published`: add them.

    The text model is read for it, which takes a moment. A field that is not an object is left for
    `parse_description` to refuse.
    """
    for path in ("coglm_config",), ("direct_config", "coglm"), ("iterative_config",):
        found: Any = content
        for name in (*path, "vocabulary"):
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get("num_image"), int):
            continue
        if found.keys().isdisjoint(("first_chinese", "as_published")):
            made = text.vocabulary_for(_read_text_model(folder), found["num_image"])
            found |= {"first_chinese": made.first_chinese, "as_published": made.as_published}


def read_text_model(folder: Path, description: Description) -> spm.SentencePieceProcessor:
    """text.model of the bundle at `folder`, checked with the vocabulary. Raises as `load` does."""
    model = _read_text_model(folder)
    _check_text_model(model, description.coglm_config, folder / TEXT_MODEL)
    return model


def _read_text_model(folder: Path) -> spm.SentencePieceProcessor:
    try:
        return text.load_text_model(_file(folder, TEXT_MODEL))
    except ValueError as error:
        raise ValueError(f"{error}: {ADVICE}") from error


# --- Checks ---------------------------------------------------------------------------------------


def _check_text_model(model: spm.SentencePieceProcessor, config: CogLMConfig, where: Path) -> None:
    expected = config.vocabulary
    found = text.vocabulary_for(model, expected.num_image)
    if found.id_space != expected.id_space:
        raise ValueError(
            f"{where} has {model.vocab_size()} pieces and makes {found}, but the configuration has"
            f" {expected}: take both from one bundle"
        )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], bundle: Bundle, where: Path) -> None:
    try:
        expected = expected_shapes(*bundle[:4])
    except ValueError as error:
        raise ValueError(f"{where / CONFIG} is unfit ({error}): {ADVICE}") from error
    file = where / WEIGHTS
    parts = _networks_of(shapes)
    if "tokenizer" in parts:
        parts.add(CLUSTER_LABELS)
    needed = {name for name in expected if _head(name) in parts}
    if missing := sorted(needed - shapes.keys()):
        raise ValueError(f"{file} lacks tensor {_first(missing)}: {ADVICE}")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise ValueError(f"{file} has unknown tensor {_first(unknown)}: {ADVICE}")
    for name, found in shapes.items():
        if found != expected[name]:
            raise ValueError(
                f"{file}: tensor {name!r} must have shape {expected[name]}: got {found}; {ADVICE}"
            )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the weights of the bundle at `folder`, off the header."""
    file = folder / WEIGHTS
    if not file.is_file():
        return {}
    with _damage_in(file), safetensors.safe_open(file, framework="numpy") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}


def _read_tensors(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Tensors by name. Raises ValueError for a damaged file and for values that are not finite."""
    file, tensors = folder / WEIGHTS, {}
    if not names:
        return {}
    with _damage_in(file), safetensors.safe_open(file, framework="numpy") as stored:
        for name in names:
            tensors[name] = stored.get_tensor(name)
            kind = np.integer if name == CLUSTER_LABELS else np.floating
            # jax's test: to NumPy, bfloat16 is no float.
            if not jax.numpy.issubdtype(dtype := tensors[name].dtype, kind):
                what = f"tensor {name!r} must be {kind.__name__}: got {dtype}"
                raise ValueError(f"{file} is damaged ({what}): {ADVICE}")
            if not np.isfinite(tensors[name]).all():
                raise ValueError(f"{file} is damaged (tensor {name!r} is not finite): {ADVICE}")
    return tensors


@contextlib.contextmanager
def _damage_in(file: Path) -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}): {ADVICE}") from error


def _may_be_replaced(path: Path) -> bool:
    """Whether a folder is a bundle, or empty."""
    if not (path / CONFIG).is_file():
        return path.is_dir() and not any(path.iterdir())
    return (path / TEXT_MODEL).is_file() or (path / WEIGHTS).is_file()


def _networks_of(names: Iterable[str]) -> set[str]:
    return {_head(name) for name in names} & set(NETWORKS)


def _head(name: str) -> str:
    return name.split("/")[0]


def _first(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _file(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"bundle {folder} has no file {name}: {ADVICE}")
    return file


# --- Trees of parameters --------------------------------------------------------------------------


def _tensors(bundle: Bundle) -> dict[str, np.ndarray]:
    """Parameters as float16, and the labels if any. Raises ValueError for what float16 cannot
    hold.
    """
    trees = jax.device_get({name: getattr(bundle, name) for name in NETWORKS})
    tensors = {}
    for name, leaf in flat(trees):
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(leaf, np.float16)
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"tensor {name!r} has values that float16 cannot hold")
    if bundle.cluster_labels.size:
        tensors[CLUSTER_LABELS] = np.ascontiguousarray(bundle.cluster_labels, np.int32)
    return tensors


def _nest(named: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays named as in the file of weights, "coglm/layers/…", as trees: network → parameters."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
