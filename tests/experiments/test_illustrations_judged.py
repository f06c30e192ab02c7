"""How illustrations are judged: the judge, prompts and their match, captions and rank, edits."""

import click
import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item
from experiments.illustrations import (
    captions,
    edits,
    examples,
    grid,
    judge,
    match,
    reconstruction,
    train_judge,
)
from experiments.illustrations.presets import FINE_PIXELS

COLOURS = {
    "lime": (60, 200, 60),
    "plum": (150, 40, 150),
    "sky": (60, 120, 250),
    "sun": (250, 200, 0),
}
CHINESE = {"lime": "青柠", "plum": "李子", "sky": "天空", "sun": "太阳"}
STYLES = ("flat", "outlined", "sticker")
BOX = (48, 48, 144, 144)


def drawn(thing: str, style: str) -> np.ndarray:
    image = Image.new("RGB", (FINE_PIXELS, FINE_PIXELS), "white")
    pen = ImageDraw.Draw(image)
    if style == "flat":
        pen.ellipse(BOX, fill=COLOURS[thing])
    elif style == "outlined":
        pen.ellipse(BOX, outline=COLOURS[thing], width=12)
    else:
        pen.rectangle(BOX, fill=COLOURS[thing], outline="black", width=10)
    return np.asarray(image)


@pytest.fixture(scope="module")
def collection():
    """Four things in three styles; "sky" is held out in "sticker"."""

    def item(thing, style):
        held_out = (thing, style) == ("sky", "sticker")
        split = "unseen_pair" if held_out else "train"
        return Item("", thing, style, thing, CHINESE[thing], "food", split)

    items = [item(thing, style) for thing in COLOURS for style in STYLES]
    return examples.Collection(np.stack([drawn(i.thing, i.style) for i in items]), items)


@pytest.fixture(scope="module")
def judged(collection):
    every, things = np.arange(len(collection.items)), tuple(sorted(COLOURS))
    how = {"steps": 60, "batch_size": 8, "learning_rate": 0.02, "seed": 0}
    return train_judge.train(collection, every, things, **how)


class Painter:
    """A model that draws what it is asked for; after the base stage always in style "flat"."""

    networks = ("tokenizer", "coglm", "direct")

    def __init__(self, collection):
        self.known = {
            language: captions.meanings(collection.items, language) for language in ("en", "zh")
        }

    def said(self, text):
        return next(known[text] for known in self.known.values() if text in known)

    def generate_stages(self, prompts, key, num_images, *, stages):
        made = np.stack([[drawn(*self.said(text))] * num_images for text in prompts])
        flat = np.stack([[drawn(self.said(t)[0], "flat")] * num_images for t in prompts])
        assert tuple(stages) == ("base", "direct")
        return {"base": flat, "direct": made}

    def scores(self, texts, pictures):
        right = [(drawn(*self.said(text)) == pictures[0]).all() for text in texts]
        return np.array(right, np.float32)[:, None]


def test_the_judge_learns_and_is_kept(collection, judged, tmp_path):
    every = np.arange(len(collection.items))
    shares = train_judge.measure(judged, collection, every)
    assert shares["as they are"]["thing"] > 0.85 and shares["as they are"]["style"] > 0.85
    judge.save(judged, {"steps": 60}, tmp_path / "judge.safetensors")
    again = judge.load(tmp_path / "judge.safetensors")
    assert again.things == judged.things
    seen = judge.read(again, collection.pictures, batch=4)
    assert (len(seen.things), len(seen.styles)) == (12, 12)
    with pytest.raises(ValueError, match="192"):
        judge.read(judged, collection.pictures[:, :64])


def test_prompts_are_of_both_groups_and_languages(collection):
    prompts = match.make_prompts(collection.items, 12, seed=3)
    assert prompts == match.make_prompts(collection.items, 12, seed=3)
    for group in match.GROUPS:
        assert sum(group in prompt.groups for prompt in prompts) == 6
    for prompt in prompts:
        assert (prompt.item.split == "train") == ("seen" in prompt.groups)
        language = "en" if "english" in prompt.groups else "zh"
        assert prompt.text in illustrations.single_captions(prompt.item, language)
    seen = [(p.item.thing, p.item.style) for p in prompts if "seen" in p.groups]
    assert len(set(seen)) == 6


def test_match_follows_what_is_drawn(collection, judged):
    cv = Painter(collection)
    prompts = match.make_prompts(collection.items, 8, seed=0)
    figures, sheet = match.experiment(cv, collection, prompts, 2, 0, judged)
    base, direct = figures["stages"]["base"], figures["stages"]["direct"]
    assert direct["seen"]["both"] > 0.7 and direct["seen"]["thing"] > 0.7
    # Of the held-out pair, "flat" is not the style that was asked for.
    assert base["unseen_pairs"]["style"] <= direct["unseen_pairs"]["style"]
    assert figures["copies"]["seen"] == 1  # it draws the pictures of the data set themselves
    assert figures["copies"]["unseen_pairs"] == 0
    assert sheet.size == (3 * 128 + 230, 8 * 128)
    assert "unseen_pairs" in match.table(figures)


def test_the_nearest_picture_is_found_at_any_size_and_place(collection):
    real = match.cut_out(collection.pictures)
    moved = [
        examples.varied(picture, np.random.default_rng(number))
        for number, picture in enumerate(collection.pictures)
    ]
    found, distances = match.nearest(match.cut_out(np.stack(moved)), real)
    assert found.tolist() == list(range(12))
    assert (distances < 0.12).all(), distances
    blank = match.cut_out(np.full((1, 8, 8, 3), 255, np.uint8))
    assert match.nearest(blank, real)[1] > match.COPY


def test_captions_count_by_what_they_name(collection):
    known = captions.meanings(collection.items, "en")
    sky = next(item for item in collection.items if item.split == "unseen_pair")
    said = [*illustrations.single_captions(sky, "en")[:2], "a lime, sticker", "a sky of sky"]
    scores = captions.caption_scores(said, [sky] * 4, known)
    assert scores == {"sentences": 0.75, "thing": 0.5, "style": 0.75}


def test_rank_is_by_the_score_of_ten(collection, monkeypatch):
    monkeypatch.setattr(captions, "NAMES", 3)  # fewer than there are
    numbers = np.arange(12)
    assert captions.rank_share(Painter(collection), collection, numbers, "zh", seed=0) == 1

    class Blind(Painter):
        def scores(self, texts, pictures):
            return np.arange(len(texts))[:, None]

    assert captions.rank_share(Blind(collection), collection, numbers, "en", seed=0) == 0


def test_edits_are_of_one_half_and_judged_there(collection, judged):
    rng = np.random.default_rng(1)
    tasks = [edits.make_task(collection, rng, ("en", "zh")[n % 2]) for n in range(12)]
    for task in tasks:
        changed = (task.before != task.after).any(-1)
        inside = edits.pixels_in(task.box)
        assert changed[inside].any()
        changed[inside] = False
        assert not changed.any()
        assert task.wanted.english in task.text or task.wanted.chinese in task.text
    after = np.stack([task.after for task in tasks])
    right = edits.verdicts(tasks, after, judged)
    left = edits.verdicts(tasks, np.stack([task.before for task in tasks]), judged)
    assert right["unchanged"] == 1 and right["thing"] > left["thing"] + 0.3
    beyond = after.copy()
    beyond[:, :, :, 0] //= 2
    assert edits.verdicts(tasks, beyond, judged)["unchanged"] == 0
    assert edits.sheet(tasks, after, limit=4).width == 3 * (2 * 128 + 150)


def test_an_edit_runs_a_task_each(collection):
    class Editor:
        def edit(self, text, picture, *, box, num_images, key):
            assert num_images == 1 and jax.random.key_data(key).shape
            return picture[None]

    tasks = [edits.make_task(collection, np.random.default_rng(2), "en")] * 2
    assert (edits.run_edits(Editor(), tasks, 0) == tasks[0].before).all()


def test_the_grid_has_a_row_for_each_thing(collection, monkeypatch):
    class Model(Painter):
        def generate_stages(self, prompts, key, num_images, *, stages):
            return super().generate_stages(prompts, key, num_images, stages=("base", "direct"))

    monkeypatch.setattr(grid, "STYLES", dict.fromkeys(STYLES))
    rows = grid.rows_of(collection.items, ("sky", "lime"))
    made = grid.draw(Model(collection), rows, 0)
    assert made.shape == (2, 3, FINE_PIXELS, FINE_PIXELS, 3)
    assert (made[0, 2] == drawn("sky", "sticker")).all()
    whole = np.asarray(grid.grid(rows, made, side=100))
    assert whole.shape == (24 + 200, 110 + 300, 3)
    framed = (whole == (255, 165, 0)).all(-1)
    assert framed[:124, 310:].any() and not framed[124:].any()  # the held-out pair
    with pytest.raises(click.UsageError, match="moon is not there"):
        grid.rows_of(collection.items, ("moon",))


def test_reconstructions_are_measured_against_their_originals(
    collection, judged, tiny, monkeypatch
):
    small = collection.pictures[:, ::6, ::6]
    figures = reconstruction.measure(tiny, small, judged, at_once=8)
    assert 0 < figures["psnr"] < 20 and 0 <= figures["thing"] < 0.9  # of random weights
    assert 1 / tiny.tokenizer_config.codebook_size <= figures["codes"] <= 1
    monkeypatch.setattr(reconstruction, "through", lambda bundle, pictures, at_once: (
        pictures, np.arange(12)[:, None] % 4))  # fmt: skip
    figures = reconstruction.measure(tiny, small, judged)
    assert figures["psnr"] > 70 and figures["thing"] == 1 and figures["perplexity"] == 4
