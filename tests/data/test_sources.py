"""Sources: what they read, and the messages of refusals."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from cogview2_jax.config import Vocabulary
from cogview2_jax.data import prepare, scenes, sources
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.data.sources import CaptionsFile, PictureFolder, Refused, caption_sets
from cogview2_jax.data.sources.inputs import some_of
from cogview2_jax.data.sources.token_file import TokenFile
from cogview2_jax.tokenizer.pictures import PictureError, open_picture

from .conftest import picture


def captions_file(folder, name, content: str | bytes):
    (folder / "a.jpg").write_bytes(picture(0))
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_json_lines(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": "a cat", "more": 1},
        {"image": str(tmp_path / "a.jpg"), "caption": ["a cat", "a dog"]},
    ]
    content = "\ufeff" + "\r\n\n".join(map(json.dumps, rows)) + "\n  \n"
    source = CaptionsFile(captions_file(tmp_path, "captions.jsonl", content))
    assert len(source) == 2
    assert source[0] == ("line 1: a.jpg", picture(0), ({"caption": "a cat"},))
    assert source[1].captions == ({"caption": "a cat"}, {"caption": "a dog"})
    assert source[1].name.startswith("line 3: ")


def test_tab_separated_with_and_without_names(tmp_path):
    named = captions_file(tmp_path, "named.tsv", "id\tzh\timage\n7\t猫\ta.jpg\n")
    source = CaptionsFile(named, fields=("zh",))
    assert len(source) == 1 and source[0].captions == ({"zh": "猫"},)
    assert source[0].name == "line 2: a.jpg"
    (tmp_path / "elsewhere").mkdir()
    plain = captions_file(tmp_path, "plain.tsv", "a.jpg\ta cat\t猫\na.jpg\ta cat\n")
    os.rename(plain, tmp_path / "elsewhere" / "plain.tsv")
    source = CaptionsFile(tmp_path / "elsewhere" / "plain.tsv", tmp_path, ("en", "zh"))
    assert source[0].captions == ({"en": "a cat", "zh": "猫"},)
    assert source[1].captions == ({"en": "a cat"},)


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        ("{", "malformed line", "not JSON"),
        ("[" * 100_000, "malformed line", "not JSON"),
        ("3", "malformed line", "not a JSON object"),
        (b"\xff\xfe", "malformed line", "not UTF-8"),
        ('{"caption": "a"}', "malformed line", "no path"),
        ('{"image": 3, "caption": "a"}', "malformed line", "no path"),
        ('{"image": "a.jpg", "caption": 3}', "malformed line", "a text or a list"),
        ('{"image": "a.jpg", "caption": null}', "empty caption", "no caption"),
        ('{"image": "a.jpg", "caption": []}', "empty caption", "no caption"),
        ('{"image": "b.jpg", "caption": "a"}', "missing image", "no such file"),
        ('{"image": "a.jpg/b", "caption": "a"}', "missing image", "no such file"),
        ('{"image": "a\\u0000b", "caption": "a"}', "missing image", "not a path"),
        ('{"image": "\\ud800", "caption": "a"}', "missing image", "not a path"),
        ('{"image": "/dev/zero", "caption": "a"}', "missing image", "not a file"),
        ('{"image": ".", "caption": "a"}', "missing image", "not a file"),
        ('{"image": "%s", "caption": "a"}' % ("a" * 300), "missing image", "name too long"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_in_one(tmp_path, line, kind, reason):
    file = captions_file(tmp_path, "captions.jsonl", line)
    with pytest.raises(Refused, match=reason) as caught:
        CaptionsFile(file)[0]
    assert CaptionsFile(file).fingerprint == CaptionsFile(file).fingerprint
    assert caught.value.kind == kind and "\n" not in caught.value.reason
    assert caught.value.name.startswith("line 1")


def test_pictures_of_the_same_names_are_told_apart(tmp_path):
    """As two folders are that `data unpack` wrote from the same prompts."""
    made = []
    for number in range(2):
        folder = tmp_path / str(number) / "pictures"
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(picture(number) + bytes(number))
        (folder / "captions.jsonl").write_text('{"image": "0.jpg", "caption": "a cat"}')
        made.append(folder)
    for kind in (PictureFolder, lambda folder: CaptionsFile(folder / "captions.jsonl")):
        one, other = (kind(folder).fingerprint for folder in made)
        assert one != other
    # Told by what is read, not by when or where it was written.
    again = shutil.copytree(made[0], tmp_path / "copy" / "pictures")
    os.utime(again / "0.jpg", (0, 0))
    assert PictureFolder(again).fingerprint == PictureFolder(made[0]).fingerprint
    before = CaptionsFile(again / "captions.jsonl").fingerprint
    (again / "another.jpg").touch()
    assert CaptionsFile(again / "captions.jsonl").fingerprint == before


def test_token_files_are_told_apart_by_some_rows(tmp_path):
    layout = RecordLayout(4, 8, (16,), Vocabulary(16, 40, 20, 17, 30, as_published=False))
    rows = np.tile(np.array([20, 21, 19, 19, 19, 1, 2, 3, 4], "<i4"), (3000, 1))
    files = [tmp_path / str(number) / "tokens.bin" for number in range(2)]
    for number, file in enumerate(files):
        file.parent.mkdir()
        rows[:, -1] += number
        rows.tofile(file)
    one, other = (TokenFile(file, layout).fingerprint for file in files)
    assert one != other and one == TokenFile(files[0], layout).fingerprint


def test_some_are_spread_over_all():
    assert list(some_of(3)) == [0, 1, 2] and not some_of(0)
    chosen = some_of(123_456)
    assert 500 < len(chosen) <= 1000 and chosen[-1] > 123_000


def test_a_first_row_is_names_only_if_it_has_all_of_them(tmp_path):
    def rows(content, **options):
        source = CaptionsFile(captions_file(tmp_path, "captions.tsv", content), **options)
        return [source[i].captions for i in range(len(source))]

    assert rows("a.jpg\timage\na.jpg\ta cat\n") == [
        ({"caption": "image"},),
        ({"caption": "a cat"},),
    ]
    assert rows("a.jpg\tcaption\na.jpg\timage\n") == [
        ({"caption": "caption"},),
        ({"caption": "image"},),
    ]
    assert rows("caption\timage\na cat\ta.jpg\n") == [({"caption": "a cat"},)]
    two = {"fields": ("en", "zh")}
    assert rows("a.jpg\timage\t图\n", **two) == [({"en": "image", "zh": "图"},)]
    assert rows("zh\ten\timage\n图\timage\ta.jpg\n", **two) == [({"en": "image", "zh": "图"},)]
    no_captions = {"pictures_only": True}
    assert rows("a.jpg\timage\n", **no_captions) == [()]
    assert rows("image\na.jpg\n", **no_captions) == [()]
    assert rows("id\timage\tcaption\n1\ta.jpg\ta cat\n", **no_captions) == [()]


def test_names_that_lack_a_field_are_refused_as_data_and_said(tmp_path):
    source = CaptionsFile(captions_file(tmp_path, "captions.tsv", "image\ttext\na.jpg\ta cat\n"))
    with pytest.raises(Refused, match="no such file .*names the columns, it has no 'caption'"):
        source[0]
    assert source[1].captions == ({"caption": "a cat"},)


def names_of(folder):
    """Names of the inputs, and the other files with the reasons."""
    source = PictureFolder(folder)
    named = []
    for i in range(len(source)):
        try:
            named.append(source[i].name)
        except Refused as refused:
            named.append(refused.name)
    return named, dict(source.left_out)


def test_a_folder_is_read_by_what_pillow_reads(tmp_path):
    for name in ("a.avif", "b.PPM", "c.jp2", "d", "e.tga", "f.txt", "g.mp4", ".hidden.png"):
        (tmp_path / name).write_bytes(picture(0))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "thumbnail.png").write_bytes(picture(0))
    (tmp_path / "nowhere.jpg").symlink_to("nothing")
    found, others = names_of(tmp_path)
    assert found == ["a.avif", "b.PPM", "c.jp2", "d", "e.tga", "nowhere.jpg"]
    assert others == {
        "f.txt": ".txt is not the ending of a picture",
        "g.mp4": ".mp4 is not the ending of a picture",
    }


def test_linked_folders_are_followed_once(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (photos / "z").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for file in (photos / "z" / "1.jpg", elsewhere / "2.jpg", elsewhere / "deep" / "3.jpg"):
        file.write_bytes(picture(0))
    (photos / "again").symlink_to("z")  # before "z" by name, and yet "z" keeps its own
    (photos / "link").symlink_to("../elsewhere")
    (photos / "other").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to("deep")
    (elsewhere / "round").symlink_to("../photos")
    (photos / "z" / "up").symlink_to("..")
    (photos / "itself").symlink_to("itself")
    found, others = names_of(photos)
    assert found == ["itself", "link/2.jpg", "link/deep/3.jpg", "z/1.jpg"]
    assert others == {"z/up": "a link to a folder that holds it"}


def test_prepared_records_in_the_folder_are_passed_over(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    source = PictureFolder(tmp_path)
    prepare.prepare_pictures(source, tmp_path / "records")
    assert PictureFolder(tmp_path).fingerprint == source.fingerprint
    assert not PictureFolder(tmp_path).left_out


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert names_of(tmp_path) == (["a.jpg"], {"closed": "Permission denied"})


@pytest.mark.parametrize("row", ["a.jpg", "a.jpg\t", "a.jpg\ta\tb"])
def test_wrong_columns_are_refused(tmp_path, row):
    with pytest.raises(Refused):
        CaptionsFile(captions_file(tmp_path, "captions.tsv", row))[0]


def test_unfit_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be .jsonl"):
        CaptionsFile(captions_file(tmp_path, "captions.csv", "a"))
    with pytest.raises(ValueError, match="has no lines"):
        CaptionsFile(captions_file(tmp_path, "captions.jsonl", "\n \n"))
    with pytest.raises(FileNotFoundError):
        CaptionsFile(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="has 0 pictures$"):
        (tmp_path / "empty").mkdir()
        PictureFolder(tmp_path / "empty")


def test_captions_go_side_by_side():
    assert caption_sets({"en": ["a", "b"], "zh": "猫"}) == (
        {"en": "a", "zh": "猫"},
        {"en": "b", "zh": "猫"},
    )
    assert caption_sets({"en": None, "zh": "猫"}) == ({"zh": "猫"},)
    assert caption_sets({}) == ()
    with pytest.raises(Refused, match="do not go together: 2 of 'en', 3 of 'zh'"):
        caption_sets({"en": ["a", "b"], "zh": ["猫"] * 3})


def test_a_machine_out_of_order_is_no_refusal(tmp_path, monkeypatch):
    source = CaptionsFile(
        captions_file(tmp_path, "captions.jsonl", '{"image": "a.jpg", "caption": "a"}')
    )

    def fail(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        source[0]


def test_scenes():
    source = sources.Scenes(3, "train", ("zh",))
    example = scenes.example("train", 2)
    assert len(source) == 3
    assert source[2].captions == ({"zh": example.captions["zh"]},)
    assert source[2].picture == example.image
    with pytest.raises(ValueError, match="split must be one of"):
        sources.Scenes(3, "trian")
    with pytest.raises(ValueError, match="captions of Scenes are en, zh"):
        sources.Scenes(3, fields=("fr",))
    assert len(sources.First(source, 2)) == 2


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set with the features of coco_captions, one picture damaged, as tfds writes it."""
    tfds = pytest.importorskip("tensorflow_datasets")
    import numpy as np

    class TinyCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            texts = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "captions": texts,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._examples()}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self):
            for i in range(4):
                captions = [{"id": j, "text": f"a cat {j}"} for j in range(2)]
                content = picture(i)[: 200 if i == 2 else None]
                yield i, {"image": content, "image/filename": f"{i}.jpg", "captions": captions}

    folder = tmp_path_factory.mktemp("tfds")
    TinyCaptions(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_tfds_set_is_read_by_name(tfds_folder):
    source = sources.Tfds("tiny_captions", "train", tfds_folder, ("captions/text",))
    assert len(source) == 4
    captions = ({"captions/text": "a cat 0"}, {"captions/text": "a cat 1"})
    assert source[1] == ("tiny_captions/1.0.0/train/1", picture(1), captions)
    assert source.fingerprint["source"] == "tiny_captions/1.0.0/train"
    with pytest.raises(PictureError):
        open_picture(source[2].picture)
    assert sources.Tfds("tiny_captions", "train[:2]", tfds_folder, pictures_only=True)[1][2] == ()
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nosuch"}, "is neither a captions file"),
        ({"split": "trian"}, "Unknown split"),
        ({"fields": ("caption",)}, "no text 'caption': choose --caption-field of captions/text"),
        ({"fields": ()}, "has 2 texts: choose"),
        ({"image_field": "picture"}, "no image in 'picture'"),
        ({"name": "nosuch", "download": True}, "tfds could not prepare nosuch"),
        ({"name": "coco_captions", "download": True}, "tfds needs .* to prepare coco_captions"),
    ],
)
def test_tfds_mistakes_are_one_line(tfds_folder, options, message):
    if "coco_captions" in options.values():
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("here TensorFlow would download it")
    arguments = {"name": "tiny_captions", "data_dir": tfds_folder, "fields": ("captions/text",)}
    with pytest.raises(ValueError, match=message) as caught:
        sources.Tfds(**arguments | options)
    assert "\n" not in str(caught.value)
