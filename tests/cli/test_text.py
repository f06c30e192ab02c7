"""Text that users give to commands: how new models read it, and what is refused."""

import json
import shutil

import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.tokenizer import text

HALF_PAIR = "a red circle \ud83d"
WRONG = "text is not valid Unicode: half of a surrogate pair at character 13"


@pytest.fixture
def shipped(tiny_folder, monkeypatch):
    """The tiny model instead of the one that ships."""
    monkeypatch.setattr(bundles, "SHIPPED", tiny_folder)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Three captions of a picture, as JSON lines; the second has half of a surrogate pair."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "plain.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12))
    rows = [
        {"image": "plain.ppm", "caption": caption}
        for caption in ("a red circle", HALF_PAIR, "a striped blue square")
    ]
    file = folder / "half_pair.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_prompt_with_half_of_a_pair_is_refused_in_one_line(run, tiny_folder, tmp_path):
    code, _, error = run("generate", HALF_PAIR, "--bundle", tiny_folder, "--out", tmp_path / "o")
    assert code == 2 and error.endswith(f"{WRONG}\n") and error.count("\n") == 1


def test_init_names_the_caption_with_half_of_a_pair(run, shipped, captions, tmp_path):
    for pieces in ((), ("--pieces", 30)):
        out = tmp_path / "model"
        code, _, error = run("init", "--captions", captions, *pieces, "--out", out)
        assert (code, error) == (2, f"cogview2: sentence 2 {HALF_PAIR!r}: {WRONG}\n")
        assert not out.exists()


def test_prepare_lists_a_caption_with_half_of_a_pair(run, tiny_folder, captions, tmp_path):
    for number, options in enumerate(((), ("--allow-unknown",))):
        out = tmp_path / str(number)
        code, said, _ = run(
            "data", "prepare", captions, "--bundle", tiny_folder, "--out", out, *options
        )
        assert code == 0 and "2 records of 3 inputs, 1 refused" in said
        (line,) = (out / "refused.jsonl").read_text("utf-8").splitlines()
        refused = json.loads(line)
        assert (refused["input"], refused["kind"]) == (1, "malformed line")
        assert refused["reason"] == f"'caption' {WRONG.removeprefix('text ')}"
        assert refused["caption"] == HALF_PAIR


def vocabularies(folder):
    description = bundles.read_description(folder)
    parts = description.coglm_config, description.direct_config.coglm, description.iterative_config
    return [part.vocabulary for part in parts]


def test_a_new_model_knows_how_its_text_is_read(run, shipped, tiny, tmp_path):
    file = tmp_path / "text.model"
    file.write_bytes(tiny.text_model.serialized_model_proto())
    (tmp_path / "captions.txt").write_text("a red fox\n一只狐\n")
    cases = [
        # options → as published
        (["--preset", "published", "--text-model", file], True),
        (["--preset", "published"], False),
        (["--preset", "published", "--captions", tmp_path / "captions.txt"], False),
        (["--text-model", file], False),
    ]
    for number, (options, as_published) in enumerate(cases):
        out = tmp_path / str(number)
        assert run("init", *options, "--out", out)[0] == 0
        model = bundles.load(out, ()).text_model
        for vocabulary in vocabularies(out):
            assert vocabulary.as_published == as_published
            first = vocabulary.first_chinese - vocabulary.num_image
            assert text.is_chinese(model.id_to_piece(first))
            assert not text.is_chinese("".join(model.id_to_piece(list(range(first)))))


def test_unknown_words_are_read_where_the_model_says_so(run, tiny_folder, captions, tmp_path):
    """Prompts and `data prepare` follow one field of config.json."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    content = json.loads((folder / bundles.CONFIG).read_text())
    file = tmp_path / "captions.jsonl"
    picture = str(captions.parent / "plain.ppm")
    file.write_text(json.dumps({"image": picture, "caption": "a red elephant"}) + "\n")
    for as_published in (False, True):
        for part in ("coglm_config", "iterative_config"):
            content[part]["vocabulary"]["as_published"] = as_published
        content["direct_config"]["coglm"]["vocabulary"]["as_published"] = as_published
        (folder / bundles.CONFIG).write_text(json.dumps(content))
        out = tmp_path / f"records-{as_published}"
        code, _, error = run("data", "prepare", file, "--bundle", folder, "--out", out)
        assert code == (0 if as_published else 2), error
        code, _, error = run(
            "generate", "an elephant " * 9, "--bundle", folder, "--out", tmp_path / "pictures"
        )
        reason = "at most 12 tokens" if as_published else "outside the text model: an, elephant"
        assert code == 2 and reason in error
