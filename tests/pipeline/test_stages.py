"""The stages: token by token and with full passes, the same keys give the same tokens."""

import dataclasses
import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import CogLMConfig, TransformerConfig, Vocabulary
from cogview2_jax.decoding import sampling
from cogview2_jax.keys import fold_in_all
from cogview2_jax.networks import coglm, inputs
from cogview2_jax.pipeline import stages
from cogview2_jax.pipeline.prompts import caption_ids, prompt_tokens
from cogview2_jax.published import names

GOLDEN = Path(__file__).parents[1] / "golden" / "coglm.npz"
SCORE_TOLERANCE = 1e-4  # float32, recorded by other code
PROMPT, OTHER = "a red circle above a striped blue square", "左边的绿色星形"


@pytest.fixture(scope="module")
def settings(tiny):
    """The arguments of the stages with cluster sampling, as CogView passes them."""
    return {
        "config": tiny.coglm_config,
        "sampling": tiny.sampling,
        "num_clusters": tiny.num_clusters,
    }


def words(tiny, prompts):
    return prompt_tokens(prompts, tiny.text_model, tiny.coglm_config, 10, 6).base


@pytest.fixture(scope="module")
def full_pass(tiny):
    """Image logits [b, s, v] of all slots at once."""
    params = jax.device_put(tiny.coglm)

    @jax.jit
    def apply(layout):
        bias = inputs.text_key_bias(layout.is_text, tiny.sampling.text_upweight)
        ids = (0, tiny.coglm_config.vocabulary.num_image)
        return coglm.apply(params, layout, config=tiny.coglm_config, bias=bias, ids=ids)

    return apply


@pytest.fixture(scope="module")
def draws(tiny):
    @jax.jit
    def draw(keys, logits):
        def one(key, row):
            how = tiny.sampling.base
            return sampling.sample_clusters(
                key, row, jnp.asarray(tiny.cluster_labels), tiny.num_clusters, how
            )

        def slot(i, rows):
            return jax.vmap(one)(fold_in_all(keys, i), rows)

        return jax.vmap(slot, (0, 1), out_axes=1)(jnp.arange(logits.shape[1]), logits)

    return draw


@pytest.fixture(params=[1.0, 2.5])
def guided(request, settings, full_pass):
    """The settings with a guidance, and the logits of all slots at once that it draws from."""
    sampling = dataclasses.replace(settings["sampling"], guidance=request.param)

    def logits(layout):
        blind = layout._replace(mask=layout.mask & ~layout.is_text[:, None])
        seen, unseen = full_pass(layout), full_pass(blind)
        return seen if request.param == 1 else unseen + request.param * (seen - unseen)

    return settings | {"sampling": sampling}, logits


def test_decoding_agrees_with_a_full_pass(tiny, guided, draws):
    settings, of = guided
    text, is_text = words(tiny, [PROMPT, OTHER])
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = stages.decode_image(tiny.coglm, text, is_text, keys, tiny.cluster_labels, **settings)
    layout = inputs.text_to_image(text, is_text, drawn, tiny.coglm_config)
    np.testing.assert_array_equal(
        drawn, draws(keys, of(layout)[:, tiny.coglm_config.max_text : -1])
    )


def test_without_text_is_a_prompt_without_words(tiny):
    text, is_text = words(tiny, [PROMPT])
    image = np.arange(16)[None]
    both = inputs.with_and_without_text(
        inputs.text_to_image(text, is_text, image, tiny.coglm_config)
    )
    empty = inputs.text_to_image(text, np.zeros_like(is_text), image, tiny.coglm_config)
    first = tiny.coglm_config.max_text
    np.testing.assert_array_equal(both.mask[1, first:], empty.mask[0, first:])
    np.testing.assert_array_equal(both.tokens[0], both.tokens[1])


def test_older_keys_are_taken(tiny, settings):
    decode = functools.partial(stages.decode_image, **settings)
    old = jax.random.split(jax.random.PRNGKey(1), 2)  # uint32 [2, 2]
    text = words(tiny, [PROMPT, OTHER])
    made = jax.eval_shape(decode, tiny.coglm, *text, old, tiny.cluster_labels)
    assert made.shape == (2, 16) and made.dtype == jnp.int32


def test_infilling_agrees_with_a_full_pass(tiny, guided, draws):
    settings, of = guided
    config, keys = tiny.coglm_config, jax.random.split(jax.random.key(1), 2)
    text, is_text = words(tiny, [PROMPT])
    ids = text[0][is_text[0]].tolist()
    image = np.random.default_rng(2).integers(0, 64, 16)
    before = stages.decode_infilling._cache_size()
    for pair in (((5, 6, 9, 10), (0,)), ((15,), tuple(range(16)))):
        masks = [np.isin(np.arange(16), cells).reshape(4, 4) for cells in pair]
        made = [inputs.infill(mask, ids, image, config) for mask in masks]
        layout = inputs.NetworkInput(
            *(jnp.stack(rows) for rows in zip(*(m[:4] for m in made), strict=True))
        )
        slots = np.stack([each.slot_of_cell for each in made])
        drawn = stages.decode_infilling(
            tiny.coglm, layout, slots, keys, tiny.cluster_labels, **settings
        )
        drawn = np.asarray(drawn)
        for row, mask in enumerate(masks):
            kept = ~mask.reshape(-1)
            np.testing.assert_array_equal(drawn[row][kept], image[kept])
        filled = np.array(layout.tokens)
        np.put_along_axis(filled, slots, drawn, axis=1)
        first = filled.shape[1] - 16
        logits = of(layout._replace(tokens=jnp.asarray(filled)))[:, first - 1 : -1]
        unknown = np.asarray(layout.tokens)[:, first:] < 0
        expected = np.asarray(draws(keys, logits))
        np.testing.assert_array_equal(filled[:, first:][unknown], expected[unknown])
    # One program, whatever the mask.
    assert stages.decode_infilling._cache_size() <= before + 1


def test_captions_agree_with_a_full_pass(tiny):
    """The most probable allowed ids, slot by slot."""
    config, vocabulary = tiny.coglm_config, tiny.coglm_config.vocabulary
    for seed, language in enumerate(("en", "zh")):
        image = np.random.default_rng(seed).integers(0, 64, (1, 16))
        english = np.array([language == "en"])
        allowed = caption_ids(tiny.text_model, vocabulary, language)
        keys = jax.random.key(0)[None]
        drawn = stages.decode_caption(tiny.coglm, image, english, allowed, keys, config=config)
        everywhere = jnp.ones(drawn.shape, bool)
        layout, _ = inputs.captioning(image, drawn, everywhere, english, config)
        ids = (vocabulary.num_image, vocabulary.start_of_image)
        logits = np.asarray(coglm.apply(tiny.coglm, layout, config=config, ids=ids))[0, 16:-1]
        said = np.cumsum(allowed.words[np.asarray(drawn)[0] - vocabulary.num_image]) > 0
        for slot, row in enumerate(logits):
            may = allowed.later if slot and said[slot - 1] else allowed.words
            may = allowed.first if slot == 0 else may
            expected = np.where(may, row, -np.inf).argmax() + vocabulary.num_image
            assert drawn[0, slot] == expected


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
    scores = stages.caption_score(
        params,
        tokens[:, :cells],
        text,
        np.ones(text.shape, bool),
        tokens[:, cells] == vocabulary.start_of_english,
        config=config,
    )
    np.testing.assert_allclose(scores, golden["caption_scores"], rtol=0, atol=SCORE_TOLERANCE)


def test_only_cells_that_may_change_do(tiny):
    fine = np.random.default_rng(4).integers(0, 64, (2, 144)).astype(np.int32)
    may_change = np.zeros((2, 144), bool)
    may_change[:, 72:] = True
    tokens = prompt_tokens([PROMPT] * 2, tiny.text_model, tiny.coglm_config, 10, 6)
    refined = stages.super_resolve_iterative(
        tiny.iterative,
        *tokens.iterative,
        fine,
        may_change,
        jax.random.split(jax.random.key(0), 2),
        config=tiny.iterative_config,
        sampling=tiny.sampling,
    )
    np.testing.assert_array_equal(refined[:, :72], fine[:, :72])
    # The order resets 7 of 12 cells or more; a drawn token is the same as before 1 time in 20.
    assert (np.asarray(refined)[:, 72:] != fine[:, 72:]).mean() > 0.4


def refined_with(tiny, *top_k):
    tokens = prompt_tokens([PROMPT] * 2, tiny.text_model, tiny.coglm_config, 10, 6)
    return stages.super_resolve_iterative(
        tiny.iterative,
        *tokens.iterative,
        np.zeros((2, 144), np.int32),
        np.ones((2, 144), bool),
        jax.random.split(jax.random.key(0), 2),
        config=tiny.iterative_config,
        sampling=dataclasses.replace(tiny.sampling, iterative_top_k=top_k),
    )


def test_a_top_k_for_each_round(tiny):
    with pytest.raises(ValueError, match="iterative_top_k must be one for each of 6 rounds"):
        refined_with(tiny, 20, 20)


def test_a_top_k_above_the_image_tokens_is_all_of_them(tiny):
    """Also one that no int32 holds. The tiny model has 64."""
    np.testing.assert_array_equal(refined_with(tiny, *[2**40] * 6), refined_with(tiny, *[64] * 6))


def test_keys_are_one_for_each_image(tiny, settings):
    text, is_text = words(tiny, [PROMPT, OTHER])
    with pytest.raises(ValueError, match=r"keys must be one for each sample"):
        stages.decode_image(
            tiny.coglm, text, is_text, jax.random.key(0), tiny.cluster_labels, **settings
        )
