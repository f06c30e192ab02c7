"""init and info: a model without weights, and the description of a model."""

import json
import math

import numpy as np
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.tokenizer import text

CHANGES = {
    "coglm_config": {"transformer": {"num_layers": 2}},
    "tokenizer_config": {"codebook_size": 512},
    "sampling": {"candidates": 1},
}


@pytest.fixture
def shipped(tiny_folder, monkeypatch):
    """The tiny model instead of the one that ships."""
    monkeypatch.setattr(bundles, "SHIPPED", tiny_folder)


def test_init_makes_a_model_of_the_preset_without_weights(run, shipped, tiny, tmp_path):
    out = tmp_path / "new" / "model"
    code, said, _ = run("init", "--out", out)
    assert code == 0
    assert {file.name for file in out.iterdir()} == {bundles.CONFIG, bundles.TEXT_MODEL}
    made = bundles.load(out, ())
    assert bundles.networks_in(out) == () and not made.cluster_labels.size
    assert made[:5] == tiny[:5]
    number = sum(math.prod(leaf.shape) for leaf in _leaves(tiny.coglm))
    assert f"coglm       {number:,} parameters: cogview2 train coglm\n" in said
    # A bundle of the same sizes takes the networks that others have trained.
    bundles.save(out, made._replace(coglm=tiny.coglm))
    assert bundles.networks_in(out) == ("coglm",)


def _leaves(tree):
    return [
        leaf
        for node in tree.values()
        for leaf in (_leaves(node) if isinstance(node, dict) else [node])
    ]


def test_init_replaces_given_fields_and_no_others(run, shipped, tiny, tmp_path):
    file = tmp_path / "changes.json"
    file.write_text(json.dumps(CHANGES))
    assert run("init", "--config", file, "--out", tmp_path / "model")[0] == 0
    made = bundles.read_description(tmp_path / "model")
    assert made.coglm_config.transformer.num_layers == 2
    assert made.direct_config.coglm.transformer == tiny.direct_config.coglm.transformer
    assert made.sampling.candidates == 1 and made.sampling.direct == tiny.sampling.direct
    vocabulary = text.vocabulary_for(tiny.text_model, 512)
    for config in (made.coglm_config, made.direct_config.coglm, made.iterative_config):
        assert config.vocabulary == vocabulary
    # A whole config.json is a configuration too.
    again = ("init", "--config", tmp_path / "model" / bundles.CONFIG, "--out", tmp_path / "again")
    assert run(*again)[0] == 0
    assert bundles.read_description(tmp_path / "again") == made


def test_init_with_the_published_sizes(run, shipped, tmp_path):
    code, said, _ = run("init", "--preset", "published", "--out", tmp_path / "model")
    assert code == 0
    made = bundles.read_description(tmp_path / "model")
    assert made.coglm_config.num_image_tokens == 400 and made.coglm_config.vocabulary.pad == 20_003
    assert "tokenizer   97,439,497 parameters" in said
    # The model that ships has no words for the published styles.
    assert not made.styles


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "a red fox\n\na grey fox\n"),
        ("c.jsonl", '{"caption": ["a red fox", "a grey fox"]}\n{"image": "b.jpg"}\n'),
        ("c.tsv", "image\tcaption\na.jpg\ta red fox\nb.jpg\ta grey fox\n"),
    ],
)
def test_init_makes_a_text_model_of_captions(name, content, run, shipped, tmp_path):
    (tmp_path / name).write_text(content)
    code, said, _ = run("init", "--captions", tmp_path / name, "--out", tmp_path / "model")
    assert code == 0
    assert "of 2 captions" in said and ("1 lines left out" in said) == (name == "c.jsonl")
    model = bundles.load(tmp_path / "model", ()).text_model
    assert [model.id_to_piece(i) for i in range(4, 9)] == ["▁", "▁a", "▁fox", "▁grey", "▁red"]
    assert text.unknown_words(model, "a red frog") == ["frog"]


def test_init_makes_a_text_model_that_spells(run, shipped, tmp_path):
    (tmp_path / "c.txt").write_text("a red fox\na grey fox and a frog\n" * 9)
    options = ("--captions", tmp_path / "c.txt", "--pieces", 30, "--out", tmp_path / "model")
    assert run("init", *options)[0] == 0
    model = bundles.load(tmp_path / "model", ()).text_model
    assert model.vocab_size() <= 30 and not text.unknown_words(model, "dragon read")
    given = ("--text-model", tmp_path / "model" / bundles.TEXT_MODEL, "--out", tmp_path / "other")
    assert run("init", *given)[0] == 0
    other = bundles.load(tmp_path / "other", ()).text_model
    assert other.serialized_model_proto() == model.serialized_model_proto()


BAD = {
    "a folder that exists": (["--out", "HERE"], "exists: give a new folder"),
    "nowhere to write": (["--out", "FILE/model"], "cannot write to"),
    "no out": ([], "--out"),
    "another preset": (["--preset", "large", "--out", "m"], "preset"),
    "two text models": (["--captions", "a", "--text-model", "b", "--out", "m"], "not both"),
    "pieces of nothing": (["--pieces", "99", "--out", "m"], "go with --captions"),
    "few pieces": (
        ["--captions", "FILE", "--pieces", "9", "--out", "m"],
        "of 9 pieces can be made: Voc",
    ),
    "no captions": (["--captions", "EMPTY", "--out", "m"], "at least one word"),
    "no captions file": (["--captions", "gone.txt", "--out", "m"], "gone.txt: No such file"),
    "no text model": (["--text-model", "gone", "--out", "m"], "gone: No such file"),
    "not a text model": (["--text-model", "FILE", "--out", "m"], "not a SentencePiece model"),
    "no config": (["--config", "gone.json", "--out", "m"], "gone.json: No such file"),
    "not JSON": (["--config", "FILE", "--out", "m"], "is not JSON"),
}
BAD_CONFIGS = {
    "a list": ([1], "must be an object: got [1]"),
    "no object": ({"sampling": 1}, "sampling must be an object: got 1"),
    "unknown field": ({"coglm_config": {"layers": 2}}, "unknown field 'layers'"),
    "unknown part": ({"optimizer": {}}, "unknown field 'optimizer'"),
    "wrong type": ({"tokenizer_config": {"codebook_size": "64"}}, "codebook_size must be int"),
    "no codes": ({"tokenizer_config": {"codebook_size": 0}}, "num_image must"),
    "two grids": ({"iterative_config": {"grid": [9, 9]}}, "iterative_config.grid must be (12, 12)"),
    "no heads": (
        {"coglm_config": {"transformer": {"num_heads": 0}}},
        "num_heads must be at least 1: got 0",
    ),
    "no decoders": (
        {"tokenizer_config": {"decoder_multipliers": []}},
        "decoder_multipliers must not be empty",
    ),
    "another format": ({"format": 9}, "has format 9"),
    "vocabulary": ({"coglm_config": {"vocabulary": {"pad": 1}}}, "vocabulary lacks"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_CONFIGS])
def test_init_refuses_in_one_line_and_leaves_nothing(name, run, shipped, tmp_path, monkeypatch):
    work, inputs = tmp_path / "work", tmp_path / "inputs"
    work.mkdir()
    inputs.mkdir()
    (inputs / "FILE").write_text("no JSON, no model\n")
    (inputs / "EMPTY").write_text("\n")
    monkeypatch.chdir(work)
    if name in BAD_CONFIGS:
        changes, message = BAD_CONFIGS[name]
        (inputs / "changes.json").write_text(json.dumps(changes))
        arguments = ["--config", str(inputs / "changes.json"), "--out", "m"]
    else:
        arguments, message = BAD[name]
    places = {"HERE": work, "FILE": inputs / "FILE", "EMPTY": inputs / "EMPTY"}
    places["FILE/model"] = inputs / "FILE" / "model"
    code, out, err = run("init", *(places.get(each, each) for each in arguments))
    assert code == 2 and out == ""
    assert message in err
    assert err.startswith("cogview2: ") and err.count("\n") == 1
    assert not list(work.iterdir())


def test_info_shows_model_and_devices(run, tiny_folder):
    code, out, _ = run("info", "--bundle", tiny_folder)
    assert code == 0
    for expected in (str(tiny_folder), "12 tokens", "4 × 4", "12 × 12", "device", "CogLMConfig"):
        assert expected in out


def test_info_shows_what_is_missing(run, tiny, tmp_path):
    folder = tmp_path / "bundle"
    bundles.save(folder, tiny._replace(coglm={}, direct={}))
    code, out, _ = run("info", "--bundle", folder)
    assert code == 0
    missing = [line.split()[0] for line in out.splitlines() if "not there yet" in line]
    assert missing == ["coglm", "direct"]
    assert "`cogview2 train coglm`" in out and "`cogview2 train direct-sr`" in out
    none = {name: {} for name in bundles.NETWORKS}
    bundles.save(folder, tiny._replace(**none, cluster_labels=np.zeros(0, np.int32)))
    code, out, _ = run("info", "--bundle", folder)
    assert code == 0 and out.count("not there yet") == 4 and "in no clusters" in out
