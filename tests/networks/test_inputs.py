"""Tokens, positions and masks of every task: the recorded ones, and what those do not show."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.networks import inputs
from tests.common import IMAGE, SMALL, TEXT, load


def config_of(golden) -> CogLMConfig:
    """The base model of a golden file: its vocabulary from `config`, the published geometry."""
    _, hidden, heads, size, num_image, _ = (int(number) for number in golden["config"])
    return CogLMConfig(
        TransformerConfig(2, hidden, heads), Vocabulary(num_image, size, num_image, num_image)
    )


def all_true(text):
    return np.ones(np.shape(text), bool)


# --- Text → image


def test_text_to_image_matches_the_recorded():
    golden = load("coglm")
    config = config_of(golden)
    tokens = golden["t2i_tokens"]
    end = int(np.argmax(tokens[0] == config.vocabulary.start_of_image))
    made = inputs.text_to_image(
        tokens[:, :end], all_true(tokens[:, :end]), tokens[:, end + 1 :], config
    )
    np.testing.assert_array_equal(made.tokens, tokens)
    np.testing.assert_array_equal(
        made.positions, np.broadcast_to(golden["t2i_position_ids"], tokens.shape)
    )
    np.testing.assert_array_equal(
        made.mask, np.broadcast_to(golden["t2i_mask"], (len(tokens), *golden["t2i_mask"].shape))
    )
    bias = inputs.text_key_bias(made.is_text, float(golden["t2i_attn_plus"]))
    np.testing.assert_array_equal(bias[0, :end], golden["t2i_attn_plus"])
    assert not bias[0, end:].any()


@pytest.mark.parametrize("pad", [inputs.right_padded, inputs.left_padded])
def test_padding_changes_nothing_but_the_slots(pad):
    exact = inputs.text_to_image(jnp.array(TEXT), all_true(TEXT), IMAGE, SMALL)
    text, is_text = pad([TEXT], SMALL.max_text, SMALL.vocabulary)
    padded = inputs.text_to_image(text, is_text, IMAGE, SMALL)
    real = np.append(is_text[0], np.ones(1 + IMAGE.size, bool))
    assert padded.tokens.shape == (1, SMALL.max_text + 1 + IMAGE.size)
    np.testing.assert_array_equal(padded.tokens[0, real], exact.tokens)
    np.testing.assert_array_equal(padded.positions[0, real], exact.positions)
    np.testing.assert_array_equal(padded.mask[0][real][:, real], exact.mask)
    assert not padded.mask[0][:, ~real].any()
    assert not padded.positions[0, ~real].any()
    assert padded.mask.any(-1).all()  # no row is without a key


def test_the_prefix_of_an_input_is_the_input_of_the_prefix():
    text, is_text = inputs.right_padded([TEXT], SMALL.max_text, SMALL.vocabulary)
    whole = inputs.text_to_image(text, is_text, IMAGE, SMALL)
    prefix = inputs.text_to_image(text, is_text, IMAGE[:0], SMALL)
    length = SMALL.max_text + 1
    np.testing.assert_array_equal(prefix.tokens, whole.tokens[:, :length])
    np.testing.assert_array_equal(prefix.positions, whole.positions[:, :length])
    np.testing.assert_array_equal(prefix.mask, whole.mask[:, :length, :length])


def test_inputs_are_traced_once_for_every_prompt():
    traces = []

    @jax.jit
    def traced(text, is_text, image):
        traces.append(1)
        return inputs.text_to_image(text, is_text, image, SMALL)

    for length in range(1, SMALL.max_text + 1):
        ids = [60 + n for n in range(length)]
        padded = inputs.right_padded([ids], SMALL.max_text, SMALL.vocabulary)
        expected = inputs.text_to_image(*padded, IMAGE[None], SMALL)
        jax.tree.map(np.testing.assert_array_equal, traced(*padded, IMAGE[None]), expected)
    assert len(traces) == 1


# --- Image → text


def test_captioning_matches_the_recorded():
    golden = load("coglm")
    config = config_of(golden)
    tokens, cells = golden["caption_tokens"], config.num_image_tokens
    text = tokens[:, cells + 1 :]
    english = tokens[:, cells] == config.vocabulary.start_of_english
    made, loss_mask = inputs.captioning(tokens[:, :cells], text, all_true(text), english, config)
    np.testing.assert_array_equal(made.tokens, tokens)
    for row in range(len(tokens)):
        np.testing.assert_array_equal(made.mask[row], golden["caption_mask"])
        np.testing.assert_array_equal(made.positions[row], golden["caption_position_ids"])
        np.testing.assert_array_equal(loss_mask[row], golden["caption_loss_mask"].astype(bool))


def test_padding_a_caption_changes_nothing_but_the_slots():
    exact, exact_loss = inputs.captioning(IMAGE, np.array(TEXT), all_true(TEXT), True, SMALL)
    text, is_text = inputs.right_padded([TEXT], SMALL.max_text, SMALL.vocabulary)
    padded, loss = inputs.captioning(IMAGE, text, is_text, np.array([True]), SMALL)
    length = exact.tokens.size
    assert exact.tokens[IMAGE.size] == SMALL.vocabulary.start_of_english
    np.testing.assert_array_equal(padded.tokens[0, :length], exact.tokens)
    np.testing.assert_array_equal(padded.positions[0, :length], exact.positions)
    np.testing.assert_array_equal(padded.mask[0, :length, :length], exact.mask)
    np.testing.assert_array_equal(loss[0, :length], exact_loss)
    assert not padded.mask[0, :, length:].any() and not loss[0, length:].any()


# --- Infilling


def test_infill_matches_the_recorded():
    golden = load("coglm")
    config = config_of(golden)
    made = inputs.infill(
        golden["comp_mask20"],
        golden["comp_text"],
        golden["comp_image"][0],
        config,
        slots=len(golden["comp_text"]),
    )
    np.testing.assert_array_equal(made.tokens, golden["comp_seq"])
    np.testing.assert_array_equal(made.positions, golden["comp_position_ids"])
    np.testing.assert_array_equal(made.mask, golden["comp_attention_mask"])
    assert (made.tokens == -1).sum() == golden["comp_step_logits"].shape[1]
    np.testing.assert_array_equal(
        golden["comp_filled_seq"][..., made.slot_of_cell], golden["comp_result"]
    )


def masks():
    rng = np.random.default_rng(0)
    yield np.ones(SMALL.grid, bool)
    yield np.eye(*SMALL.grid, dtype=bool)
    yield np.arange(24).reshape(SMALL.grid) >= 20  # nothing kept in a row
    yield (np.arange(24) == 0).reshape(SMALL.grid)  # nothing to its left
    yield from rng.random((5, *SMALL.grid)) < 0.4


@pytest.mark.parametrize("mask", list(masks()))
def test_infill_of_any_mask(mask):
    made = inputs.infill(mask, TEXT, IMAGE, SMALL)
    slots, first = SMALL.max_text, SMALL.max_text + 1
    assert made.tokens.shape == (first + 24,) and made.mask.shape == (first + 24, first + 24)
    np.testing.assert_array_equal(np.sort(made.cells), np.arange(24))
    np.testing.assert_array_equal(made.positions[first:], SMALL.image_position + made.cells)
    assert ((made.tokens == -1).sum(), (made.tokens[: made.start] == -1).sum()) == (mask.sum(), 0)
    grid = made.tokens[made.slot_of_cell]
    np.testing.assert_array_equal(grid, np.where(mask, -1, IMAGE.reshape(SMALL.grid)).reshape(-1))

    context = made.cells[: made.start - first]
    for row, column in np.ndindex(*SMALL.grid):
        beside = column + 1 < SMALL.grid[1] and mask[row, column + 1]
        assert (row * SMALL.grid[1] + column in context) == (not mask[row, column] and not beside)
    for part in (context, made.cells[made.start - first :]):
        assert (np.diff(part) > 0).all()

    assert made.is_text.sum() == len(TEXT) and made.is_text[: len(TEXT)].all()
    for query in range(made.start, first + 24):
        earlier = np.arange(first + 24) <= query
        earlier[:slots] = made.is_text[:slots]
        np.testing.assert_array_equal(made.mask[query], earlier)
    assert made.mask[first : made.start, first : made.start].all()
    assert not made.mask[: made.start, made.start :].any()
    assert not made.mask[:, len(TEXT) : slots].any()


# --- Super-resolution


def direct_config(golden) -> DirectSRConfig:
    slots, prefix, length = (int(number) for number in golden["layout"])
    side = round((prefix - slots) ** 0.5)
    base = dataclasses.replace(config_of(golden), grid=(side, side))
    ratio = round(((length - prefix) / (prefix - slots)) ** 0.5)
    return DirectSRConfig(base, ratio=ratio, text_slots=slots)


def test_direct_super_resolution_matches_the_recorded():
    golden = load("direct_sr")
    config = direct_config(golden)
    text, is_text = inputs.left_padded(
        [golden["text"]] * len(golden["tokens"]), config.text_slots, config.coglm.vocabulary
    )
    made = jax.jit(partial(inputs.direct_super_resolution, config=config))(
        text, is_text, golden["low_res_tokens"]
    )
    np.testing.assert_array_equal(made.tokens, golden["tokens"])
    for row in range(len(golden["tokens"])):
        np.testing.assert_array_equal(made.positions[row], golden["position_ids"])
        np.testing.assert_array_equal(made.mask[row], golden["attention_mask"])


def iterative_config(golden) -> IterativeSRConfig:
    slots, length = (int(number) for number in golden["layout"])
    side = round((length - slots) ** 0.5)
    base = config_of(golden)
    return IterativeSRConfig(
        base.transformer,
        base.vocabulary,
        grid=(side, side),
        text_slots=slots,
        order=tuple(map(tuple, golden["lopar_order_6x6"].tolist())),
        rounds=len(golden["topk_per_step"]),
    )


def test_iterative_super_resolution_matches_the_recorded():
    golden = load("iterative_sr")
    config = iterative_config(golden)
    texts = [text[: config.text_slots] for text in golden["text"]]
    text, is_text = inputs.left_padded(texts, config.text_slots, config.vocabulary)
    reset = inputs.lopar_schedule(config)
    fine = np.where(reset[0], config.vocabulary.start_of_image, golden["start_tokens"])
    made = inputs.iterative_super_resolution(text, is_text, fine, config)
    np.testing.assert_array_equal(made.tokens, golden["first_input_tokens"])
    for row in range(len(texts)):
        np.testing.assert_array_equal(made.positions[row], golden["position_ids"])
        np.testing.assert_array_equal(made.mask[row], golden["attention_mask"][0])


def test_the_schedule_is_the_recorded_one():
    golden = load("iterative_sr")
    config = iterative_config(golden)
    reset, order = inputs.lopar_schedule(config), inputs.lopar_order(config).reshape(-1)
    before = golden["start_tokens"]
    for number, (masked, after) in enumerate(
        zip(reset, golden["step_tokens"], strict=True), start=1
    ):
        changed = (before != after).any(0)
        assert not changed[~masked].any()
        assert changed[order == number].any()  # the next round's cells alone would not explain it
        before = after


def test_the_order_tiles_any_grid():
    config = IterativeSRConfig(grid=(7, 10), order=((1, 2, 3), (4, 5, 6)), rounds=3)
    order = inputs.lopar_order(config)
    assert order.shape == (7, 10)
    for (row, column), number in np.ndenumerate(order):
        assert number == config.order[row % 2][column % 3]
    reset = inputs.lopar_schedule(config)
    assert reset.shape == (3, 70) and reset.dtype == bool
    for number, masked in enumerate(reset, start=1):
        np.testing.assert_array_equal(masked, order.reshape(-1) >= number)


def test_an_order_that_is_no_rectangle_is_refused():
    for order in ((), (1, 2)):
        with pytest.raises(ValueError, match="order must be a rectangle of rows: got"):
            inputs.lopar_order(IterativeSRConfig(order=order))


# --- Wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pad([TEXT, []]), r"texts\[1\] must have 1 to 8 tokens: got 0"),
        (lambda: pad([[60] * 9]), r"texts\[0\] must have 1 to 8 tokens: got 9"),
        (lambda: pad([[60, 49]]), r"texts\[0\] must hold ids from 50 to 89: got 49"),
        (lambda: pad([[90]]), r"texts\[0\] must hold ids from 50 to 89: got 90"),
        (lambda: t2i(IMAGE.repeat(2)), "image must have at most 24 tokens: got 48"),
        (lambda: t2i(IMAGE, [True]), "text and is_text must have one shape"),
        (lambda: caption(IMAGE[1:]), r"image must have the 24 tokens of grid \(4, 6\): got 23"),
        (lambda: fill(np.zeros((4, 6))), "mask must have a true cell to fill: got 0"),
        (lambda: fill(np.ones((6, 4))), r"mask must have the grid's shape \(4, 6\): got \(6, 4\)"),
        (lambda: fill(np.eye(4, 6), IMAGE[1:]), r"image must have the grid's shape \(4, 6\): got"),
        (lambda: fill(np.eye(4, 6), IMAGE + 40), "image must hold ids from 0 to 49: got 50"),
        (lambda: direct(IMAGE[1:], 3), r"coarse must have the 24 tokens of grid \(4, 6\): got 23"),
        (lambda: direct(IMAGE, 2), "text must have 3 slots: got 2"),
        (lambda: iterative(IMAGE), r"fine must have the 36 tokens of grid \(6, 6\): got 24"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def pad(texts):
    return inputs.right_padded(texts, SMALL.max_text, SMALL.vocabulary)


def t2i(image, is_text=None):
    text = np.array(TEXT)
    flags = all_true(TEXT) if is_text is None else np.array(is_text)
    return inputs.text_to_image(text, flags, image, SMALL)


def caption(image):
    return inputs.captioning(image, np.array(TEXT), all_true(TEXT), True, SMALL)


def fill(mask, image=IMAGE):
    return inputs.infill(mask, TEXT, image, SMALL)


def direct(coarse, slots):
    config = DirectSRConfig(SMALL, text_slots=3)
    text = np.array(TEXT[:slots])
    return inputs.direct_super_resolution(text, all_true(text), coarse, config)


def iterative(fine):
    config = IterativeSRConfig(SMALL.transformer, SMALL.vocabulary, (6, 6), 3, 48)
    text = np.array(TEXT[:3])
    return inputs.iterative_super_resolution(text, all_true(text), fine, config)
