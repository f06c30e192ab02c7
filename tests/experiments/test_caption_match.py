import json
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import Claims, Scene, SceneObject
from experiments.caption_match import judge, pictures, run, scoring, train_judge
from experiments.caption_match.scoring import COLUMNS, GROUPS, Prompt


@pytest.fixture(scope="module")
def params() -> judge.Params:
    return judge.load()


def scene_of(claims: Claims, rng: np.random.Generator) -> Scene:
    """A scene that fits the claims; the rest is drawn at random."""
    while True:
        drawn = scenes.sample_scene(rng, len(claims.objects))
        objects = []
        for item, claim in zip(drawn.objects, claims.objects, strict=True):
            named = {name: word for name, word in vars(claim).items() if word and name != "place"}
            objects.append(SceneObject(**{**vars(item), **named}))
        scene = Scene(tuple(objects), drawn.background)
        if scenes.check(claims, scene.objects).all_named and apart(scene):
            return scene


def apart(scene: Scene) -> bool:
    if len(scene.objects) == 1:
        return True
    one, other = scene.objects
    distance = np.hypot(one.x - other.x, one.y - other.y)
    return bool(distance > scenes.RADII[one.size] + scenes.RADII[other.size])


def renderer(texts, key, num_images):
    """A perfect generator: "base" is seen through 64 pixels, "direct" leaves out an object."""
    rng = np.random.default_rng(0)
    stages = {stage: [] for stage in run.STAGES}
    for text in texts:
        for _ in range(num_images):
            scene = scene_of(scenes.parse_caption(text), rng)
            image = scenes.draw(scene)
            stages["base"].append(pictures.through_64(image))
            stages["direct"].append(scenes.draw(Scene(scene.objects[1:], scene.background)))
            stages["full"].append(image)
    shape = (len(texts), num_images, 192, 192, 3)
    return {s: np.stack([np.asarray(i) for i in v]).reshape(shape) for s, v in stages.items()}


# The judge


@pytest.mark.parametrize("split", ["test", "composition"])
@pytest.mark.parametrize("view", ["as drawn", "through 64 pixels"])
def test_the_judge_reads_rendered_pictures(params, split, view):
    examples = [scenes.example(split, 10**6 + i) for i in range(200)]
    images = [e.image if view == "as drawn" else pictures.through_64(e.image) for e in examples]
    found = judge.read(params, np.stack([np.asarray(image) for image in images]))
    right = [train_judge.same(f, e.scene.objects) for f, e in zip(found, examples, strict=True)]
    assert np.mean(right) >= 0.99


def test_the_judge_counts_none_and_three(params):
    three = Scene(
        (
            SceneObject("star", "green", "small", "plain", 48, 48),
            SceneObject("heart", "pink", "small", "dotted", 144, 48),
            SceneObject("circle", "blue", "small", "striped", 96, 144),
        ),
        "white",
    )
    images = [scenes.draw(Scene((), "grey")), scenes.draw(three)]
    nothing, seen = judge.read(params, np.stack([np.asarray(image) for image in images]))
    assert nothing == []
    assert train_judge.same(seen, three.objects)


def test_the_judge_does_not_believe_a_garbled_object(params):
    """Left half one shape, right half another: it must not be sure of either."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(100):
        shapes = rng.choice(scenes.SHAPES, 2, replace=False)
        halves = [
            scenes.draw(Scene((SceneObject(str(s), "red", "large", "plain", 96, 96),), "white"))
            for s in shapes
        ]
        halves[0].paste(halves[1].crop((96, 0, 192, 192)), (96, 0))
        images.append(np.asarray(halves[0]))
    found = judge.read(params, np.stack(images))
    believed = [len(objects) == 1 and objects[0].shape != judge.UNCLEAR for objects in found]
    # A circle's upper half is a semicircle's: some halves do fit.
    assert np.mean(believed) <= 0.25


def test_reading_does_not_depend_on_the_batch(params):
    images = np.stack([np.asarray(scenes.example("test", i).image) for i in range(7)])
    together = judge.read(params, images)
    alone = [judge.read(params, image[None])[0] for image in images]
    assert together == alone
    assert judge.read(params, images[:0]) == []


@pytest.mark.parametrize(
    "images", [np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 192, 192, 3), np.float32)]
)
def test_the_judge_refuses_other_pictures(params, images):
    with pytest.raises(ValueError, match="the judge reads uint8"):
        judge.read(params, images)


def test_the_weights_are_small_and_survive_saving(params, tmp_path):
    judge.save(params, tmp_path / "judge.safetensors")
    assert (tmp_path / "judge.safetensors").stat().st_size < 2e6
    again = judge.load(tmp_path / "judge.safetensors")
    jax.tree.map(np.testing.assert_array_equal, dict(params), dict(again))


def test_the_loss_knows_right_from_wrong(params):
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda *leaves: np.stack(leaves), *[pictures.sample(rng) for _ in range(8)]
    )
    loss = jax.jit(train_judge.loss)
    right = float(loss(params, batch))
    wrong = float(loss(params, batch._replace(image=np.roll(batch.image, 1, axis=0))))
    assert right < 2 < 10 < wrong


def test_a_training_step_keeps_all_shapes(params):
    optimizer = train_judge.make_optimizer(steps=10, learning_rate=0.02)
    state = jax.eval_shape(optimizer.init, params)
    batch = next(stream := train_judge.batches(seed=0, size=2))
    stream.close()
    new, new_state, loss = jax.eval_shape(train_judge.make_step(optimizer), params, state, batch)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), (params, state), (new, new_state)
    )
    assert all(jax.tree.leaves(same)) and loss.shape == ()


def test_training_pictures_say_what_they_show():
    rng = np.random.default_rng(1)
    samples = [pictures.sample(rng) for _ in range(100)]
    for image, present, weight, offset, words in samples:
        assert image.shape == (192, 192, 3) and image.dtype == np.uint8
        assert (weight[present == 1] == 1).all()
        assert np.abs(offset).max() <= 0.5
        for probabilities in words.values():
            np.testing.assert_allclose(probabilities.sum(-1), present)
    numbers = {int(s.present.sum()) for s in samples}
    assert numbers == {0, 1, 2, 3}


# The experiment


def test_prompts_are_mixed_as_promised():
    prompts = scoring.make_prompts(200, seed=3)
    assert len({p.text for p in prompts}) == 200
    groups = [group for prompt in prompts for group in prompt.groups]
    counts = {group: groups.count(group) for group in GROUPS}
    assert counts == {
        "one_object": 80,
        "two_objects": 80,
        "english": 80,
        "chinese": 80,
        "unseen_pairs": 40,
    }
    assert sum(not p.text.isascii() for p in prompts) == 100
    assert prompts == scoring.make_prompts(200, seed=3)
    assert prompts != scoring.make_prompts(200, seed=4)


def test_scores_of_rendered_pictures_are_near_one(params):
    prompts = scoring.make_prompts(60, seed=0)
    scores, images, found = run.experiment(renderer, prompts, 2, 0, params, prompts_per_call=16)
    assert images["full"].shape == (60, 2, 192, 192, 3)
    for stage in ("base", "full"):
        for group in GROUPS:
            for column in COLUMNS:
                assert scores[stage][group][column] >= 0.97, (stage, group, column)
    # One object is left out: nothing or half of what is named is there.
    for group in GROUPS:
        assert scores["direct"][group]["all_named"] == 0
    assert scores["direct"]["one_object"]["shape"] == 0
    assert 0.4 < scores["direct"]["two_objects"]["shape"] < 0.6
    assert scores["full"]["one_object"]["counts"]["all_named"][1] == 24 * 2
    assert scores["full"]["two_objects"]["counts"]["shape"][1] == 24 * 2 * 2
    assert len(run.table(scores).splitlines()) == 1 + len(run.STAGES) * len(GROUPS)
    assert run.sheet(prompts, images, found, limit=3).height == 3 * 192


def test_scores_of_other_pictures_are_low(params):
    prompts = scoring.make_prompts(60, seed=0)

    def turned(texts, key, num_images):
        return {s: np.roll(v, 1, axis=0) for s, v in renderer(texts, key, num_images).items()}

    scores, _, _ = run.experiment(turned, prompts, 2, 0, params, prompts_per_call=60)
    for group in GROUPS:
        assert scores["full"][group]["all_named"] < 0.1
        for attribute in ("shape", "colour", "size", "fill", "place"):
            assert scores["full"][group][attribute] < 0.75


def test_counts_are_of_claims():
    prompt = Prompt(text := "a red circle above a blue square", scenes.parse_caption(text))
    circle = SceneObject("circle", "red", "small", "plain", 96, 48)
    square = SceneObject("square", "cyan", "large", "plain", 96, 144)
    scores = scoring.score([prompt], [[[circle, square], [circle]]])
    for group in ("two_objects", "english"):
        row = scores[group]
        assert row["counts"] == {
            "all_named": [0, 2],
            "shape": [3, 4],
            "colour": [2, 4],
            "size": [0, 0],
            "fill": [0, 0],
            "place": [1, 2],
        }
        assert row["colour"] == 0.5 and row["size"] is None
    assert scores["chinese"]["all_named"] is None


def test_the_command_writes_json_and_a_sheet(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(run, "load_generator", lambda bundle, candidates: renderer)
    (tmp_path / "prompts").write_text("红色圆在左边\n\na red circle above a blue square\n", "utf-8")
    result = CliRunner().invoke(
        run.main,
        [
            *("--prompts", str(tmp_path / "prompts"), "--num-images", "2"),
            *("--json", str(tmp_path / "out.json"), "--sheet", str(tmp_path / "out.png")),
        ],
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert report["prompts"] == 2
    assert set(report["stages"]) == {"base", "direct", "full"}
    assert set(report["stages"]["full"]) == set(GROUPS)
    assert report["stages"]["full"]["one_object"]["all_named"] == 1.0
    with Image.open(tmp_path / "out.png") as image:
        assert image.height == 2 * 192


@pytest.mark.parametrize(
    ("text", "says"),
    [("a red circle\na red dog\n", "line 2: words not understood: dog"), ("\n", "no prompts")],
)
def test_bad_prompts_end_with_2(tmp_path, text, says):
    (tmp_path / "prompts").write_text(text, "utf-8")
    result = CliRunner().invoke(run.main, ["--prompts", str(tmp_path / "prompts")])
    assert result.exit_code == 2
    assert says in result.output
