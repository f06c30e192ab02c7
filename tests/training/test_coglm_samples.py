"""CogLM's training samples against the recorded ones, and cases without a recording."""

import jax
import numpy as np
import pytest

from cogview2_jax.config import CogLMConfig, TransformerConfig, Vocabulary
from cogview2_jax.data.records import english_texts, make_record, text_spans
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import patch_completion
from cogview2_jax.training import coglm_samples
from tests.common import IMAGE, SMALL, TEXT, load

# --- Samples


def pretraining_cases():
    golden = load("coglm_masks")
    for key in golden:
        if key.startswith("sample/") and f"t2i/{key[7:]}/first/token" in golden:
            yield key[7:]


def assert_sample(made, golden, prefix):
    """Each row of `made` is the recorded sample."""
    names = {"tokens": "token", "positions": "pos", "labels": "label", "mask": "attn_mask"}
    for ours, theirs in {**names, "loss_mask": "loss_mask"}.items():
        for row in getattr(made, ours):
            np.testing.assert_array_equal(row, golden[f"{prefix}/{theirs}"], err_msg=ours)
    np.testing.assert_array_equal(made.kind > 0, made.loss_mask)
    assert made.tokens.dtype == made.positions.dtype == made.labels.dtype == np.int32
    assert made.mask.dtype == made.loss_mask.dtype == bool


@pytest.mark.parametrize("name", list(pretraining_cases()))
def test_generation_samples_match_the_recorded(name):
    golden = load("coglm_masks")
    records = np.stack([golden[f"sample/{name}"]] * 2)
    made = coglm_samples.generation_samples(records, [False, True], CogLMConfig())
    for row, which in enumerate(("first", "second")):
        assert_sample(
            coglm_samples.TrainingSample(*(part[row : row + 1] for part in made)),
            golden,
            f"t2i/{name}/{which}",
        )
    assert set(np.unique(made.kind)) == {coglm_samples.LossKind.NONE, coglm_samples.LossKind.IMAGE}


@pytest.mark.parametrize("name", list(pretraining_cases()))
def test_captioning_samples_match_the_recorded(name):
    golden = load("coglm_masks")
    config = CogLMConfig()
    records = np.stack([golden[f"sample/{name}"]] * 2)
    english = english_texts(records, config, first_chinese=83_823)
    corners = np.stack([golden[f"i2t/{name}/patch_corners"]] * 2)
    made = coglm_samples.captioning_samples(records, english, corners, config)
    assert_sample(made, golden, f"i2t/{name}")
    kind = made.kind[0]
    is_image = np.arange(len(kind)) > config.text_slots
    np.testing.assert_array_equal(
        kind == coglm_samples.LossKind.PATCH, made.loss_mask[0] & is_image
    )
    for (begin, end), is_english in zip(text_spans(records, config)[0], english[0], strict=True):
        language = coglm_samples.LossKind.ENGLISH if is_english else coglm_samples.LossKind.CHINESE
        assert (kind[begin:end] == language).all()


def test_text_span_samples_match_the_recorded():
    golden = load("coglm_masks")
    records = np.stack([golden["sample/text"]] * 2)
    lengths = np.stack([golden["text/span_lengths"]] * 2)
    gaps = np.stack([golden["text/span_gaps_sorted"]] * 2)
    none = np.zeros((2, 3), int)  # absent spans change nothing
    for how_long, where in (
        (lengths, gaps),
        (np.append(lengths, none, 1), np.append(gaps, none, 1)),
    ):
        made = coglm_samples.text_span_samples(records, how_long, where, CogLMConfig())
        assert_sample(made, golden, "text")


def small_records():
    english, chinese = [60, 61, 62], [80, 81]
    return np.stack(
        [
            make_record([english, chinese], IMAGE, SMALL),
            make_record([chinese, english], IMAGE, SMALL),
            make_record([[70 + n for n in range(SMALL.text_slots)]], IMAGE, SMALL),
            make_record([[60]], IMAGE, SMALL),
        ]
    )


def test_a_record_is_read_back():
    records = small_records()
    assert records.shape == (4, SMALL.text_slots + 1 + 24)
    np.testing.assert_array_equal(
        text_spans(records, SMALL)[:, 0], [[0, 3], [0, 2], [0, 9], [0, 1]]
    )
    spans = text_spans(records, SMALL)
    np.testing.assert_array_equal(spans[:2, 1], [[4, 6], [3, 6]])
    assert (spans[2:, 1, 0] == spans[2:, 1, 1]).all()
    english = english_texts(records, SMALL, first_chinese=75)
    np.testing.assert_array_equal(english[:2], [[True, False], [False, True]])
    assert not english[2, 0] and english[3, 0]


def test_a_generation_sample_is_the_layout_of_its_text():
    records = small_records()[:1]
    made = coglm_samples.generation_samples(records, [True], SMALL)
    text, is_text = inputs.right_padded([[80, 81]], SMALL.text_slots, SMALL.vocabulary)
    layout = inputs.text_to_image(text, is_text, IMAGE, SMALL)
    start = SMALL.text_slots
    np.testing.assert_array_equal(made.tokens[0, start:], layout.tokens[0, start:])
    np.testing.assert_array_equal(made.positions[0, start:], layout.positions[0, start:])
    np.testing.assert_array_equal(made.mask[0, start:, start:], layout.mask[0, start:, start:])
    np.testing.assert_array_equal(made.mask[0, -1, :start].nonzero()[0], [4, 5])


def test_choices_are_distinct_within_bounds_and_repeatable():
    config = CogLMConfig()
    choices = coglm_samples.draw_choices(np.random.default_rng(5), 400, config)
    again = coglm_samples.draw_choices(np.random.default_rng(5), 400, config)
    jax.tree.map(np.testing.assert_array_equal, choices, again)
    assert choices.corners.shape == (400, 20, 2)
    assert (choices.corners.min(), choices.corners.max()) == (0, 15)
    for corners in choices.corners:
        assert len(np.unique(corners, axis=0)) == 20
    assert 0.2 < choices.captioning.mean() < 0.4 and 0.4 < choices.second.mean() < 0.6
    rng = np.random.default_rng(0)
    border = coglm_samples.draw_patches(rng, 50, SMALL, num_patches=3, to_border=True)
    assert (border.max((0, 1)) == (0, 2)).all()


def test_drawn_spans_mask_about_their_share():
    lengths, gaps = coglm_samples.draw_spans(np.random.default_rng(1), 100, 512)
    assert lengths.shape == gaps.shape
    masked = lengths.sum(1)
    assert (masked <= 0.15 * 512).all() and masked.mean() > 0.15 * 512 - 6
    records = np.full((100, 512), 30_000)
    made = coglm_samples.text_span_samples(records, lengths, gaps, CogLMConfig())
    np.testing.assert_array_equal(made.loss_mask.sum(1), masked)
    assert made.mask.any(-1)[:, 1:].all()
    short, _ = coglm_samples.draw_spans(np.random.default_rng(2), 10, 6)
    assert (short.sum(1) <= 1).all()


def test_a_mixed_batch_is_its_parts():
    records = small_records()
    english = english_texts(records, SMALL, first_chinese=75)
    choices = coglm_samples.draw_choices(np.random.default_rng(0), 4, SMALL, patch_size=2)
    choices = choices._replace(captioning=np.array([True, False, True, False]))
    made = coglm_samples.mixed_samples(records, english, choices, SMALL, patch_size=2)
    generation = coglm_samples.generation_samples(records, choices.second, SMALL)
    captions = coglm_samples.captioning_samples(
        records, english, choices.corners, SMALL, patch_size=2
    )
    for row, is_caption in enumerate(choices.captioning):
        part = captions if is_caption else generation
        for ours, theirs in zip(made, part, strict=True):
            np.testing.assert_array_equal(ours[row], theirs[row])


def test_completion_samples_are_the_sequences_that_edits_are_decoded_from():
    records = small_records()
    width = SMALL.text_slots + 1
    rng = np.random.default_rng(3)
    masks = coglm_samples.draw_rectangles(rng, len(records), SMALL)
    second, ended = np.array([False, True, False, True]), np.array([False, False, True, True])
    made = coglm_samples.completion_samples(records, second, masks, ended, SMALL)
    spans = text_spans(records, SMALL)
    for row, record in enumerate(records):
        which = int(second[row] and spans[row, 1, 1] > spans[row, 1, 0])
        words = record[slice(*spans[row, which])]
        image, config = record[width:].reshape(SMALL.grid), SMALL
        fits = ended[row] and len(words) < width - 1
        sequence = patch_completion.sequence if fits else inputs.infill
        expected = sequence(masks[row], words, image, config, slots=width - 1)
        # The second text stays where it is in the record: the others move to the first slots.
        shown = np.append(np.flatnonzero(made.mask[row, 0]), np.arange(width - 1, len(record)))
        there = np.append(np.flatnonzero(expected.mask[0]), np.arange(width - 1, len(record)))
        np.testing.assert_array_equal(made.positions[row][shown], expected.positions[there])
        np.testing.assert_array_equal(
            made.mask[row][np.ix_(shown, shown)], expected.mask[np.ix_(there, there)]
        )
        assert made.mask[row].sum() == expected.mask.sum()
        given = expected.tokens >= 0
        np.testing.assert_array_equal(
            made.tokens[row][shown][given[there]], expected.tokens[there][given[there]]
        )
        # Put back into the raster, the tokens are the picture's; each drawn one is a label once.
        np.testing.assert_array_equal(made.tokens[row][expected.slot_of_cell], record[width:])
        np.testing.assert_array_equal(
            np.flatnonzero(made.loss_mask[row]) + 1, np.flatnonzero(~given)
        )
        np.testing.assert_array_equal(
            made.labels[row][made.loss_mask[row]], record[width:][expected.cells][~given[width:]]
        )
        assert masks[row].sum() == made.loss_mask[row].sum()


def test_rectangles_have_all_sizes_and_often_a_whole_side():
    config = CogLMConfig()
    masks = coglm_samples.draw_rectangles(np.random.default_rng(0), 2000, config)
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    np.testing.assert_array_equal(masks.sum((1, 2)), rows * columns)
    assert rows.min() == columns.min() == 5 and rows.max() == columns.max() == 20
    assert 0.5 < ((rows == 20) | (columns == 20)).mean() < 0.6
    assert masks.any(0).all() and not masks.all(0).any()


def test_pads_are_keys_for_nobody():
    records = small_records()
    english = english_texts(records, SMALL, first_chinese=75)
    corners = coglm_samples.draw_patches(np.random.default_rng(0), 4, SMALL, patch_size=2)
    for made in (
        coglm_samples.generation_samples(records, np.zeros(4), SMALL),
        coglm_samples.captioning_samples(records, english, corners, SMALL, patch_size=2),
    ):
        is_pad = made.tokens == SMALL.vocabulary.pad
        assert is_pad.any() and not (made.mask & is_pad[:, None, :]).any()
        assert made.mask.any(-1).all()  # no row is without a key


def test_predict_end_adds_a_pad_label_after_each_text_and_nothing_else():
    config = CogLMConfig(
        TransformerConfig(1, 8, 2),
        Vocabulary(num_image=12, size=24, pad=15, unknown=12),
        grid=(4, 4),
        max_text=8,
        num_positions=32,
        image_position=10,
    )
    image = np.zeros(16, np.int32)
    records = np.stack([make_record([[17, 18, 19], [20, 16]], image, config)])
    english, corners = np.array([[True, False]]), np.array([[[0, 0]]])
    plain, ended = (
        coglm_samples.captioning_samples(
            records, english, corners, config, patch_size=2, predict_end=predict_end
        )
        for predict_end in (False, True)
    )
    (added,) = np.nonzero(ended.loss_mask[0] & ~plain.loss_mask[0])
    assert added.tolist() == [3, 6]  # of 17, 18, 19 | 20, 16, each after its start token
    assert ended.labels[0, added].tolist() == [15, 15]
    assert [coglm_samples.LossKind(k).name for k in ended.kind[0, added]] == ["ENGLISH", "CHINESE"]
    np.testing.assert_array_equal(plain.mask, ended.mask)
    np.testing.assert_array_equal(plain.tokens, ended.tokens)


# --- Wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_record([], IMAGE, SMALL), "texts must be one or two"),
        (lambda: make_record([[60] * 5] * 2, IMAGE, SMALL), r"texts\[1\] must have 1 to 3"),
        (lambda: make_record([[53]], IMAGE, SMALL), r"texts\[0\] must not hold the pad id"),
        (lambda: make_record([TEXT], IMAGE[1:], SMALL), "image must have 24 tokens: got 23"),
        (lambda: make_record([TEXT], IMAGE + 40, SMALL), "image must hold ids from 0 to 49"),
        (lambda: read(np.full((1, 34), 53)), r"records\[0\] must begin with"),
        (lambda: read(np.zeros((1, 9))), r"records must be \[b, text places \+ 24\]: got"),
        (lambda: patches(4), "num_patches must be 1 to 0 for patches of 4 in grid .4, 6.: got 1"),
        (lambda: patches(2, 9), "num_patches must be 1 to 8 for patches of 2"),
        (lambda: corners([[[3, 0]]]), r"corners must be \[b, patches, 2\] within \(2, 4\)"),
        (lambda: spans([[4]], [[31]]), "lengths and gaps must stay within 34 tokens: got ends up"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def read(records):
    return text_spans(records, SMALL)


def patches(size, number=None):
    return coglm_samples.draw_patches(
        np.random.default_rng(0), 1, SMALL, patch_size=size, num_patches=number
    )


def corners(places):
    flags = np.ones((1, 2), bool)
    return coglm_samples.captioning_samples(
        small_records()[:1], flags, np.array(places), SMALL, patch_size=2
    )


def spans(lengths, gaps):
    return coglm_samples.text_span_samples(
        small_records()[:1], np.array(lengths), np.array(gaps), SMALL
    )


def test_a_hidden_text_is_a_prompt_without_words():
    records = small_records()
    made = coglm_samples.generation_samples(records, np.zeros(4), SMALL)
    before = made.mask.copy()
    coglm_samples.hide_text(made, np.array([True, False, False, True]), SMALL)
    np.testing.assert_array_equal(made.mask[1:3], before[1:3])
    text, is_text = inputs.right_padded([[80, 81]], SMALL.text_slots, SMALL.vocabulary)
    empty = inputs.text_to_image(text, np.zeros_like(is_text), IMAGE, SMALL)
    for row in (0, 3):
        start = SMALL.text_slots
        np.testing.assert_array_equal(made.mask[row, start:], empty.mask[0, start:])
