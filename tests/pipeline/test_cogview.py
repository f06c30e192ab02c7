"""The composition: what is drawn agrees with full passes, and depends on what it should alone."""

import dataclasses
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cogview2_jax.config import (
    ClusterSampling,
    CogLMConfig,
    Sampling,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.decoding import sampling
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.pipeline import cogview
from cogview2_jax.pipeline.cogview import STAGES, CogView
from cogview2_jax.published import names
from cogview2_jax.tokenizer.image import to_pixels
from cogview2_jax.tokenizer.pictures import fit_picture

GOLDEN = Path(__file__).parents[1] / "golden" / "coglm.npz"
SCORE_TOLERANCE = 1e-4  # float32, recorded by other code
PROMPT, OTHER = "a red circle above a striped blue square", "左边的绿色星形"
# So cold that each draw is the most probable token of the most probable cluster.
GREEDY = Sampling(ClusterSampling(1.0, top_clusters=1, within_temperature=1e-5), text_upweight=1.4)


@pytest.fixture(scope="module")
def cv(tiny):
    return CogView(tiny)


@pytest.fixture(scope="module")
def stages(cv):
    return cv.generate_stages([PROMPT], jax.random.key(0), 2)


def base_arguments(tiny, prompts):
    made = cogview.prompt_tokens(prompts, tiny.text_model, tiny.coglm_config, 10, 6)
    return made, jax.random.split(jax.random.key(1), len(prompts))


def greedy_clusters(tiny, logits):
    return sampling.greedy_clusters(logits, jnp.asarray(tiny.cluster_labels), tiny.num_clusters)


def full_pass(tiny, layout, bias):
    return coglm.apply(
        tiny.coglm,
        layout.tokens,
        layout.positions,
        layout.mask,
        config=tiny.coglm_config,
        bias=bias,
        ids=(0, tiny.coglm_config.vocabulary.num_image),
    )


def test_decoding_agrees_with_a_full_pass(tiny):
    prompts, keys = base_arguments(tiny, [PROMPT, OTHER])
    drawn = cogview.decode_image(
        tiny.coglm,
        *prompts.base,
        keys,
        tiny.cluster_labels,
        config=tiny.coglm_config,
        sampling=GREEDY,
        num_clusters=tiny.num_clusters,
    )
    layout = inputs.text_to_image(*prompts.base, drawn, tiny.coglm_config)
    bias = inputs.text_key_bias(layout.is_text, GREEDY.text_upweight)
    logits = full_pass(tiny, layout, bias)[:, tiny.coglm_config.max_text : -1]
    np.testing.assert_array_equal(drawn, greedy_clusters(tiny, logits))


@pytest.mark.parametrize("cells", [(5, 6, 9, 10), (0,), (15,), tuple(range(16))])
def test_infilling_agrees_with_a_full_pass(tiny, cells):
    config = tiny.coglm_config
    mask = np.isin(np.arange(16), cells).reshape(4, 4)
    image = np.random.default_rng(2).integers(0, 64, 16)
    prompts, keys = base_arguments(tiny, [PROMPT])
    ids = prompts.base[0][0][prompts.base[1][0]].tolist()
    made = inputs.infill(mask, ids, image, config)
    layout = inputs.NetworkInput(*(jnp.asarray(array)[None] for array in made[:4]))
    arguments = dict(config=config, sampling=GREEDY, num_clusters=tiny.num_clusters)
    before = cogview.infill._cache_size()
    drawn = cogview.infill(
        tiny.coglm, layout, made.slot_of_cell[None], keys, tiny.cluster_labels, **arguments
    )
    assert cogview.infill._cache_size() <= before + (cells == (5, 6, 9, 10))
    drawn = np.asarray(drawn)[0]
    np.testing.assert_array_equal(drawn[~mask.reshape(-1)], image[~mask.reshape(-1)])

    filled = layout.tokens.at[0, made.slot_of_cell].set(drawn)
    bias = inputs.text_key_bias(layout.is_text, GREEDY.text_upweight)
    expected = greedy_clusters(tiny, full_pass(tiny, layout._replace(tokens=filled), bias))[0]
    unknown = np.flatnonzero(made.tokens < 0)
    np.testing.assert_array_equal(filled[0, unknown], expected[unknown - 1])


def test_captions_agree_with_a_full_pass(tiny):
    config, vocabulary = tiny.coglm_config, tiny.coglm_config.vocabulary
    image = np.random.default_rng(3).integers(0, 64, (2, 16))
    english = np.array([True, False])
    drawn = cogview.caption(
        tiny.coglm, image, english, jax.random.split(jax.random.key(0), 2), config=config
    )
    assert drawn.shape == (2, config.max_text)
    everywhere = jnp.ones(drawn.shape, bool)
    layout, _ = inputs.captioning(image, drawn, everywhere, english, config)
    ids = (vocabulary.num_image, vocabulary.start_of_image)
    logits = coglm.apply(
        tiny.coglm, layout.tokens, layout.positions, layout.mask, config=config, ids=ids
    )
    np.testing.assert_array_equal(drawn, logits[:, 16:-1].argmax(-1) + vocabulary.num_image)


def test_caption_scores_are_the_published_ones():
    golden = dict(np.load(GOLDEN))
    spec = json.loads(str(golden["weights_spec"]))

    def tensor(name, shape, offset, scale):
        seed = zlib.crc32(f"{spec['seed']}/{spec['tag']}{name}".encode())
        normal = np.random.RandomState(seed).standard_normal(shape)
        return (offset + scale * normal).astype(np.float32)

    layers, hidden, heads, size, num_image, _ = (int(n) for n in golden["config"])
    vocabulary = Vocabulary(num_image, size, num_image + 3, num_image)
    tokens, cells = golden["caption_tokens"], 400
    config = CogLMConfig(
        TransformerConfig(layers, hidden, heads), vocabulary, max_text=tokens.shape[1] - cells - 1
    )
    params = names.coglm({name: tensor(name, *rest) for name, *rest in spec["tensors"]}, config)
    text = tokens[:, cells + 1 :]
    scores = cogview.caption_score(
        params,
        tokens[:, :cells],
        text,
        np.ones(text.shape, bool),
        tokens[:, cells] == vocabulary.start_of_english,
        config=config,
    )
    np.testing.assert_allclose(scores, golden["caption_scores"], rtol=0, atol=SCORE_TOLERANCE)


def test_pictures_of_every_stage(stages):
    assert tuple(stages) == STAGES
    for pictures in stages.values():
        assert pictures.shape == (1, 2, 96, 96, 3)
        assert pictures.dtype == np.uint8
        assert pictures.std() > 0


def test_the_key_alone_decides(cv, stages):
    again = cv.generate(PROMPT, 2, key=jax.random.key(0))
    np.testing.assert_array_equal(again, stages["full"][0])
    other = cv.generate(PROMPT, 2, key=jax.random.key(1))
    assert (other != again).any()
    assert (again[0] != again[1]).any()


def test_one_compilation_serves_every_prompt_and_seed(cv, stages):
    programs = (
        cogview.image_keys,
        cogview.decode_image,
        cogview.super_resolve_direct,
        cogview.super_resolve_iterative,
        to_pixels,
    )
    before = [program._cache_size() for program in programs]
    for seed, prompt in enumerate(
        (OTHER, "a star", "a small dotted green star on the left", "红色圆")
    ):
        cv.generate_stages([prompt], jax.random.key(seed), 2)
    assert [program._cache_size() for program in programs] == before


def test_what_else_is_in_the_batch_does_not_matter(cv, stages):
    both = cv.generate_stages([OTHER, PROMPT], jax.random.key(0), 1)
    for stage in STAGES:
        np.testing.assert_array_equal(both[stage][1, 0], stages[stage][0, 0])


def test_progress_names_the_parts(cv):
    for stages, parts in (
        (("base",), ["base", "pixels"]),
        (("direct",), ["base", "direct", "pixels"]),
        (("full",), ["base", "direct", "iterative", "pixels"]),
    ):
        seen: list[str] = []
        made = cv.generate_stages(
            [OTHER], jax.random.key(0), 2, stages=stages, progress=seen.append
        )
        assert seen == parts
        assert tuple(made) == stages


def test_the_best_candidate_is_kept(cv, tiny):
    tokens = cv._tokens([PROMPT]).repeat(2)
    keys = cv._keys([PROMPT], jax.random.key(5), 2)

    def draw(candidate):
        return cogview.decode_image(
            tiny.coglm,
            *tokens.base,
            keys(candidate),
            tiny.cluster_labels,
            config=tiny.coglm_config,
            sampling=tiny.sampling,
            num_clusters=tiny.num_clusters,
        )

    drawn = np.stack([draw(i) for i in range(3)])
    scores = np.array([cv._scores(tokens, coarse) for coarse in drawn])
    chosen = cv._best_of(tokens, draw, 3)
    for image, best in enumerate(scores.argmax(0)):
        np.testing.assert_array_equal(chosen[image], drawn[best][image])
    # The bundle says how many, and an argument says otherwise.
    choosy = CogView(tiny._replace(sampling=dataclasses.replace(tiny.sampling, candidates=3)))
    key = jax.random.key(5)
    made = choosy.generate(PROMPT, 2, key=key, stage="base")
    np.testing.assert_array_equal(made, cv.generate(PROMPT, 2, key=key, stage="base", candidates=3))
    plain = cv.generate(PROMPT, 2, key=key, stage="base")
    np.testing.assert_array_equal(
        plain, choosy.generate(PROMPT, 2, key=key, stage="base", candidates=1)
    )
    assert (made != plain).any() == (scores.argmax(0) > 0).any()


def test_ranking_sorts_by_score(cv, stages):
    pictures = [*stages["full"][0], np.zeros((50, 70, 3), np.uint8)]
    order, scores = cv.rank(PROMPT, pictures)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert (np.diff(scores[order]) <= 0).all()
    assert np.isfinite(scores).all() and (scores < 0).all()


def test_captions_are_words_of_the_text_model(cv, stages):
    picture = stages["full"][0, 0]
    for language in ("en", "zh"):
        assert isinstance(cv.caption(picture, language=language), str)
    drawn = cv.caption(Image.fromarray(picture), key=jax.random.key(0), top_k=5)
    assert drawn == cv.caption(picture, key=jax.random.key(0), top_k=5)


def test_a_caption_ends_at_its_first_pad(tiny):
    vocabulary = tiny.coglm_config.vocabulary
    words = cogview.text.encode(tiny.text_model, "a star", vocabulary)
    for end in (vocabulary.pad, vocabulary.num_image + tiny.text_model.eos_id()):
        ids = np.array([*words, end, *words])
        assert cogview.caption_text(ids, tiny.text_model, vocabulary) == "a star"
    assert cogview.caption_text(np.array(words), tiny.text_model, vocabulary) == "a star"


def test_infilling_keeps_what_is_outside(cv, tiny, stages):
    picture = stages["full"][0, 0]
    made = cv.infill(OTHER, picture, (0.5, 0, 1, 1), 2, key=jax.random.key(0))
    assert made.shape == (2, 96, 96, 3)
    again = cv.infill(OTHER, picture, (0.5, 0, 1, 1), 2, key=jax.random.key(0))
    np.testing.assert_array_equal(made, again)
    assert (made[0] != made[1]).any()


def test_only_cells_that_may_change_do(cv, tiny):
    fine = np.random.default_rng(4).integers(0, 64, (2, 144)).astype(np.int32)
    may_change = np.zeros((2, 144), bool)
    may_change[:, 72:] = True
    tokens = cv._tokens([PROMPT]).repeat(2)
    refined = cv._iterative(tokens, fine, may_change, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(refined[:, :72], fine[:, :72])
    assert (refined[:, 72:] != fine[:, 72:]).any()


WRONG = {
    "no prompt": (lambda cv, key: cv.generate_stages([], key), "prompts must have at least one"),
    "empty prompt": (lambda cv, key: cv.generate(" ", key=key), "at least one word"),
    "long prompt": (lambda cv, key: cv.generate("a star " * 9, key=key), "at most 12 tokens"),
    "unknown word": (lambda cv, key: cv.generate("a zebra", key=key), "text model: zebra"),
    "stage": (lambda cv, key: cv.generate("a star", key=key, stage="last"), "got last"),
    "count": (lambda cv, key: cv.generate("a star", 0, key=key), "num_images must be at least 1"),
    "candidates": (lambda cv, key: cv.generate("a star", key=key, candidates=0), "got 0"),
    "language": (lambda cv, key: cv.caption(np.zeros((8, 8, 3), np.uint8), language="fr"), "fr"),
    "picture": (lambda cv, key: cv.caption(np.zeros((8, 8, 3))), "picture must be uint8"),
    "box order": (
        lambda cv, key: cv.infill("a star", np.zeros((8, 8, 3), np.uint8), (1, 0, 0, 1), key=key),
        "box must be (top, left, bottom, right)",
    ),
    "small box": (
        lambda cv, key: cv.infill(
            "a star", np.zeros((8, 8, 3), np.uint8), (0, 0, 0.01, 0.01), key=key
        ),
        "must hold the centre of a cell",
    ),
    "no pictures": (lambda cv, key: cv.rank("a star", []), "pictures must have at least one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_one_line(name, cv):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as caught:
        call(cv, jax.random.key(0))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(96, 96), (192, 192), (20, 31), (300, 97), (97, 300)])
def test_pictures_are_fitted_by_covering(size):
    picture = np.full((*size, 3), 7, np.uint8)
    fitted = fit_picture(picture, 96, 96)
    np.testing.assert_array_equal(fitted, np.full((96, 96, 3), 7))


def test_shrinking_averages_areas_as_scenes_does():
    picture = np.random.default_rng(0).integers(0, 256, (192, 192, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(picture).reduce(3))
    np.testing.assert_allclose(
        fit_picture(picture, 64, 64).astype(int), expected.astype(int), rtol=0, atol=1
    )


def test_a_box_covers_the_cells_whose_centres_it_holds():
    mask = cogview.coarse_mask((0.5, 0, 1, 0.4), (4, 4))
    np.testing.assert_array_equal(mask, np.array([[0, 0, 0, 0]] * 2 + [[1, 1, 0, 0]] * 2, bool))


def test_a_network_that_is_still_to_be_trained_is_named(tiny):
    cv = CogView(tiny._replace(direct={}))
    with pytest.raises(ValueError, match="lacks direct: `cogview2 train direct-sr` trains it"):
        cv.generate("a red circle", 1, key=jax.random.key(0), candidates=1)
