"""`cogview2 init` and `info`: make a model without weights, and describe a model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax import files
from cogview2_jax.cli import common
from cogview2_jax.data import defaults

if TYPE_CHECKING:
    import sentencepiece as spm

    from cogview2_jax.bundle import Bundle, Description

# --- init -----------------------------------------------------------------------------------------


@click.command(
    epilog="""\b
A configuration is JSON with any of the fields of a bundle's config.json; they replace the preset's:
  {"coglm_config": {"transformer": {"num_layers": 12}}, "sampling": {"candidates": 1}}
Vocabularies follow from the text model and the codebook's size, so leave them out.

\b
Examples:
  cogview2 init --out model
  cogview2 init --captions photos/captions.jsonl --pieces 8000 --config sizes.json --out model
  cogview2 init --preset published --text-model ice_text.model --out published
"""
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the new model, which must not exist.",
)
@click.option(
    "--preset",
    type=click.Choice(("scenes", "published")),
    default="scenes",
    show_default=True,
    help="Sizes of the networks: those of the model that ships, or the published ones.",
)
@click.option(
    "--config",
    "changes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Fields that replace the preset's, as JSON.",
)
@click.option(
    "--text-model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A SentencePiece model; default: that of the model that ships. With the published preset"
    " it reads text as the released tokenizer does: unknown words become <unk>.",
)
@click.option(
    "--captions",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Make a text model from these captions: a .txt with one per line, or a captions file"
    " (.jsonl, .tsv). Each of their words becomes a piece; all other words are unknown.",
)
@click.option(
    "--caption-field",
    "caption_fields",
    multiple=True,
    metavar="NAME",
    help="Field with a caption in the captions file; may be repeated. Default:"
    f' "{defaults.CAPTION_FIELD}".',
)
@click.option(
    "--pieces",
    type=click.IntRange(8, 10**6),
    metavar="N",
    help="Make at most N pieces: frequent words, and parts to spell all other words with.",
)
def init(
    out: Path,
    preset: str,
    changes: Path | None,
    text_model: Path | None,
    captions: Path | None,
    caption_fields: tuple[str, ...],
    pieces: int | None,
) -> None:
    """Make a model without weights, to train from zero.

    `cogview2 train` then trains its networks, one after the other.
    """
    if captions and text_model:
        raise click.UsageError("give --text-model or --captions, not both")
    if (pieces or caption_fields) and not captions:
        raise click.UsageError("--pieces and --caption-field go with --captions")
    if os.path.lexists(out):
        raise click.ClickException(f"{out} exists: give a new folder")
    common.check_writable(out)
    from cogview2_jax import bundle as bundles

    where = changes or Path(preset)
    with common.refusing():
        content = _preset(preset)
        if changes:
            content = _changed(content, _read_changes(changes), str(changes))
        fields = caption_fields or (defaults.CAPTION_FIELD,)
        model, origin = _text_model(text_model, captions, fields, pieces)
        # The released tokenizer's rules are for text models from elsewhere.
        published = preset == "published" and text_model is not None
        if not published:  # another text model cannot read the templates of the published styles
            content.pop("styles", None)
        _set_vocabulary(content, model, as_published=True if published else None)
        advice = "its fields are those of the config.json of a bundle"
        description = bundles.parse_description(content, where, advice)
        try:
            counts = parameter_counts(description)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        bundles.save(out, bundles.untrained(description, model))
    click.echo(f"{out}: a model without weights")
    for name, number in counts.items():
        click.echo(f"{name:12s}{number:,} parameters: {bundles.TRAINED_BY[name]}")
    click.echo(f"{'text model':12s}{model.vocab_size():,} pieces, {origin}")


def _text_model(
    file: Path | None, captions: Path | None, fields: tuple[str, ...], pieces: int | None
) -> tuple[spm.SentencePieceProcessor, str]:
    """The text model from a file, from captions, or of the model that ships; and its origin."""
    from cogview2_jax import bundle as bundles
    from cogview2_jax.tokenizer import text

    if captions:
        sentences, left_out = _sentences(captions, fields)
        if pieces:
            made = text.train_subword_model(sentences, pieces)
        else:
            made = text.train_text_model(sentences)
        origin = f"of {len(sentences)} captions"
        origin += f", {left_out} lines left out" if left_out else ""
        return text.load_text_model(made), origin
    if file:
        return text.load_text_model(file), f"as in {file}"
    shipped = bundles.locate()
    model = bundles.read_text_model(shipped, bundles.read_description(shipped))
    return model, "as in the model that ships"


def _preset(name: str) -> dict[str, Any]:
    """The content of config.json, without vocabularies."""
    from cogview2_jax import bundle as bundles
    from cogview2_jax import config as configs
    from cogview2_jax.styles import PUBLISHED_STYLES

    if name == "published":
        description = bundles.Description(
            configs.CogLMConfig(),
            configs.DirectSRConfig(),
            configs.IterativeSRConfig(),
            configs.HVQVAEConfig(),
            configs.Sampling(),
            made_with={},
            styles=PUBLISHED_STYLES,
        )
    else:
        description = bundles.read_description(bundles.locate())
    content = bundles.to_json(description)
    for part in _with_vocabulary(content):
        del part["vocabulary"]
    return content


def _with_vocabulary(content: dict[str, Any]) -> list[dict[str, Any]]:
    coglm, direct = content["coglm_config"], content["direct_config"]
    return [coglm, direct["coglm"], content["iterative_config"]]


def _set_vocabulary(
    content: dict[str, Any], model: spm.SentencePieceProcessor, as_published: bool | None
) -> None:
    """Fill in the vocabularies. One that is there stays, to be checked with the rest."""
    from cogview2_jax.tokenizer import text

    size = content["tokenizer_config"]["codebook_size"]
    if not isinstance(size, int):
        raise ValueError(f"tokenizer_config.codebook_size must be int: got {size!r}")
    vocabulary = dataclasses.asdict(text.vocabulary_for(model, size, as_published=as_published))
    for part in _with_vocabulary(content):
        given = part.setdefault("vocabulary", vocabulary)
        if isinstance(given, dict):  # of version 0.1 it lacks these two
            for name in ("first_chinese", "as_published"):
                given.setdefault(name, vocabulary[name])


def _read_changes(file: Path) -> Any:
    content = files.read_file(file)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _changed(old: Any, new: Any, where: str) -> Any:
    """`old` with the fields of `new` in their places, also within objects."""
    if not isinstance(old, dict):
        return new
    if not isinstance(new, dict):
        raise ValueError(f"{where} must be an object: got {new!r}")
    changed = {
        name: _changed(old.get(name), value, f"{where}: {name}") for name, value in new.items()
    }
    return old | changed


def _sentences(file: Path, fields: tuple[str, ...]) -> tuple[list[str], int]:
    """The captions of a file, and how many of its lines could not be read."""
    from cogview2_jax.data import sources

    if file.suffix not in (".jsonl", ".tsv"):
        try:
            lines = files.read_file(file).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text") from error
        return [line for line in lines if line.strip()], 0
    source = sources.CaptionsFile(file, fields=fields)
    sentences: list[str] = []
    left_out = 0
    for index in range(len(source)):
        try:
            sets = source.captions(index)
        except sources.Refused:
            left_out += 1
        else:
            # A text that is paired with each text of a list counts once.
            sentences += dict.fromkeys(words for one in sets for words in one.values())
    return sentences, left_out


# --- info -----------------------------------------------------------------------------------------


@click.command(
    epilog="""\b
Examples:
  cogview2 info
  cogview2 info --bundle path/to/another/model
"""
)
@common.bundle_option
def info(bundle: Path | None) -> None:
    """Show the model, its configuration and the devices."""
    folder = common.check_model(bundle)
    from cogview2_jax import bundle as bundles

    with common.refusing():
        networks = bundles.networks_in(folder)
    # In turn: its networks stay on the host, as the device may be too small for all of them.
    cv, cache = common.load(folder, networks, in_turn=True)
    description = bundles.read_description(folder)
    for name, value in _facts(folder, description, cv.bundle, cache):
        click.echo(f"{name:22s}{value}")


def _facts(
    folder: Path, description: Description, bundle: Bundle, cache: Path | None
) -> Iterator[tuple[str, str]]:
    from cogview2_jax.bundle import TRAINED_BY
    from cogview2_jax.description import CHECKED

    base = description.coglm_config
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    versions = {name: each for name, each in description.made_with.items() if name != CHECKED}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "bundle", str(folder)
    yield "size", f"{size / 1e6:.1f} MB"
    yield "made with", made_with
    for name, number in parameter_counts(description).items():
        there = bool(getattr(bundle, name))
        note = "" if there else f", not there yet: `{TRAINED_BY[name]}` trains them"
        yield f"{name} parameters", f"{number:,}{note}"
    yield "longest prompt", f"{base.max_text} tokens"
    vocabulary = base.vocabulary
    yield (
        "vocabulary",
        f"{vocabulary.num_image} image tokens in {bundle.num_clusters or 'no'} clusters,"
        f" {vocabulary.num_text} text pieces",
    )
    yield "coarse grid", "{} × {}".format(*base.grid)
    yield "fine grid", "{} × {}".format(*description.direct_config.grid)
    for config in description[:5]:
        text = textwrap.wrap(repr(config), 76)
        yield type(config).__name__, ("\n" + " " * 22).join(text)
    if description.styles:
        yield "styles", ", ".join(f"{each.name} ({each.template})" for each in description.styles)
    for device in common.devices():
        yield "device", device
    yield "versions", ", ".join(f"{name} {version}" for name, version in common.versions().items())
    yield "compilation cache", str(cache) if cache else "none (not writable)"


def parameter_counts(description: Description) -> dict[str, int]:
    """Parameters of each network of this configuration, in the order of training."""
    from cogview2_jax import bundle as bundles

    counts = dict.fromkeys(bundles.NETWORKS, 0)
    for name, shape in bundles.expected_shapes(*description[:4]).items():
        network = name.split("/")[0]
        if network in counts:
            counts[network] += math.prod(shape)
    return counts
