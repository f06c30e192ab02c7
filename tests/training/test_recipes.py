"""Every network's training from prepared records: it learns, and its batches are what they say."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import CogLMConfig
from cogview2_jax.data import prepare, reading, sources
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.networks import direct_sr, inputs
from cogview2_jax.tokenizer import image
from cogview2_jax.training import batches, recipes
from cogview2_jax.training.batches import Mix, Rows
from cogview2_jax.training.recipes import Options
from cogview2_jax.training.step import init_state

NUMBER = 24
FEW = Options(num_steps=4, batch_size=4, held_out=0.25)


@pytest.fixture(scope="module")
def records(tiny, tmp_path_factory):
    """Two sizes: 32 and 96 pixels, as the tiny model's grids."""
    folder = tmp_path_factory.mktemp("data") / "records"
    layout = RecordLayout.of(tiny.coglm_config, 8, 96)
    prepare.prepare_tokens(
        sources.Scenes(NUMBER),
        folder,
        dataclasses.replace(layout, text_slots=80),
        tiny.text_model,
        tiny.tokenizer,
        tiny.tokenizer_config,
        allow_unknown=True,
        apart=True,
    )
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    prepare.prepare_pictures(sources.Scenes(NUMBER), folder)
    return folder


NO_TEXT = Mix(text_ratio=0.0, patch_size=2)  # the records are longer than the tiny model's text
TASKS = {
    "coglm": lambda b, r, p, o, **k: recipes.coglm_task(b, r, o, mix=NO_TEXT, **k),
    "direct": lambda b, r, p, o, **k: recipes.direct_sr_task(b, r, o, **k),
    "iterative": lambda b, r, p, o, **k: recipes.iterative_sr_task(b, r, o, **k),
    "tokenizer": lambda b, r, p, o, **k: recipes.tokenizer_task(
        b, p, o, side=32, strides=(8,), **k
    ),
}


@pytest.mark.parametrize(
    "network",
    ["coglm", *(pytest.param(name, marks=pytest.mark.slow) for name in TASKS if name != "coglm")],
)
def test_it_trains_from_nothing_and_goes_on(network, tiny, records, pictures, tmp_path):
    options = dataclasses.replace(FEW, learning_rate=3e-3, average=0.5)
    made = TASKS[network](tiny, records, pictures, options, start="nothing")
    params = recipes.run(made, options, tmp_path, save_every=2, log_every=2)
    like = getattr(tiny, network)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
    longer = dataclasses.replace(options, num_steps=6)
    again = TASKS[network](tiny, records, pictures, longer, start="nothing")
    recipes.run(again, longer, tmp_path, save_every=2, log_every=2)
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert "6" in steps
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "validation_loss" in text and "NaN" not in text
    with pytest.raises(ValueError, match="was begun with options.learning_rate 0.003"):
        recipes.run(again, dataclasses.replace(longer, learning_rate=1.0), tmp_path)


@pytest.mark.parametrize("network", ["direct", "iterative"])
def test_super_resolution_starts_from_coglm(network, tiny, records):
    task = TASKS[network](tiny, records, None, FEW, start="coglm")
    np.testing.assert_array_equal(task.params["word_embeddings"], tiny.coglm["word_embeddings"])
    with pytest.raises(ValueError, match="start 'coglm' needs parameters that the model does not"):
        TASKS[network](tiny._replace(coglm={}), records, None, FEW, start="coglm")


def test_a_frozen_base_stays(tiny, records, tmp_path):
    options = dataclasses.replace(FEW, num_steps=2, held_out=0.0)
    task = recipes.direct_sr_task(tiny, records, options, start="coglm", freeze_base=True)
    params = recipes.run(task, options, tmp_path)
    before = direct_sr.from_coglm(tiny.coglm, tiny.direct_config)
    new = direct_sr.added_parameters(before)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, before)
    frozen = jax.tree.map(lambda is_new, moved: not is_new and moved, new, changed)
    assert not any(jax.tree.leaves(frozen))
    assert changed["extra_position_embeddings"]
    assert changed["layers"]["attention"]["qkv_plus"]["query_key_value"]["kernel"]


@pytest.mark.slow
def test_other_strides_can_be_trained_with_nothing_changed_for_the_rest(tiny, pictures, tmp_path):
    config, options = tiny.tokenizer_config, dataclasses.replace(FEW, num_steps=2, held_out=0.0)
    chosen = {"side": 32, "strides": (4, 16), "keep_others": True}
    params = recipes.run(
        recipes.tokenizer_task(tiny, pictures, options, **chosen), options, tmp_path / "others"
    )
    pixels = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    for stride, same in ((4, False), (8, True), (16, False)):
        made = []
        for each in (params, tiny.tokenizer):
            ids = image.encode(each, pixels, stride, config=config)
            made.append((ids, image.decode(each, ids, stride, config=config)))
        assert all(map(np.array_equal, *made)) == same
    np.testing.assert_array_equal(params["codebook"], tiny.tokenizer["codebook"])

    # Alone, a stride changes what it uses, the encoder too, and not the other decoders.
    alone = recipes.tokenizer_task(tiny, pictures, options, side=32, strides=(8,))
    params = recipes.run(alone, options, tmp_path / "alone")
    moved = {
        name: not all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, tiny.tokenizer[name])))
        for name, tree in params.items()
    }
    unused = {"decoder_4", "decoder_16", "downsamplers_1"}
    assert {name for name, changed in moved.items() if not changed} == unused


def rows_of(records, parts, tiny):
    """The rows of a batch of 8, of each of `parts` processes, with the generator they share."""
    made = []
    for part in range(parts):
        dataset = reading.tokens(records, 8, process_index=part, process_count=parts)
        made.append(Rows(dataset[2], part * 8 // parts, 8))
    return made


@pytest.mark.parametrize("network", ["coglm", "direct", "iterative"])
def test_batches_do_not_depend_on_the_number_of_processes(network, tiny, records):
    source = reading.Records(records)
    layout = source.manifest.layout
    config: CogLMConfig = tiny.coglm_config
    roomy = dataclasses.replace(config, num_positions=128)

    def sample(rows):
        rng = np.random.default_rng(7)
        if network == "coglm":
            mix = Mix(text_ratio=0.4, patch_size=2)
            first = source.manifest.settings["first_chinese"]
            return batches.coglm(rng, rows, source, range(NUMBER), roomy, first, mix)
        if network == "direct":
            return batches.direct_sr(rng, rows, layout, tiny.direct_config)
        return batches.iterative_sr(rng, rows, layout, config, tiny.iterative_config)

    (whole,) = (sample(rows) for rows in rows_of(records, 1, tiny))
    parts = [sample(rows) for rows in rows_of(records, 4, tiny)]
    for name, one in whole._asdict().items():
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(one, joined, err_msg=name)


def test_masks_of_iterative_sr_are_those_of_the_rounds(tiny, records):
    layout = reading.Records(records).manifest.layout
    (rows,) = rows_of(records, 1, tiny)
    config = tiny.iterative_config
    made = batches.iterative_sr(np.random.default_rng(0), rows, layout, tiny.coglm_config, config)
    rounds = inputs.lopar_schedule(config).reset
    for masked, weights in zip(made.masked, made.weights, strict=True):
        number = int(np.flatnonzero((rounds == masked).all(axis=1))[0])
        stays = inputs.lopar_order(config).reshape(-1) == number + 1
        np.testing.assert_array_equal(weights, np.where(stays, 2, 1))


def test_unfit_records_are_refused_with_what_to_prepare(tiny, records, pictures):
    larger = dataclasses.replace(tiny.coglm_config, grid=(3, 3))
    with pytest.raises(ValueError, match="first size has 16 tokens .* --size 24"):
        batches.require_layout(reading.Records(records).manifest.layout, larger)
    coarse = dataclasses.replace(reading.Records(records).manifest.layout, sizes=(32,))
    with pytest.raises(ValueError, match="no picture of 144 tokens: .* --size 32 --size 96"):
        batches.require_layout(coarse, tiny.coglm_config, 144)
    strided = RecordLayout.of(tiny.coglm_config, 16, 96)  # a grid of 4 × 4, of other tokens
    with pytest.raises(ValueError, match="a token for 16 pixels .* draws one as 8: .* --stride 8"):
        batches.require_layout(strided, tiny.coglm_config)
    with pytest.raises(ValueError, match="holds pictures, not tokens"):
        recipes.coglm_task(tiny, pictures, FEW)
    with pytest.raises(ValueError, match="text_ratio must be 0 for records of 97 tokens"):
        recipes.coglm_task(tiny, records, FEW)
    with pytest.raises(ValueError, match=r"strides must be of \(4, 8, 16\): got \(3, 8\)"):
        recipes.tokenizer_task(tiny, pictures, FEW, strides=(8, 3))
    with pytest.raises(ValueError, match="keep_others needs a tokenizer that the model does not"):
        recipes.tokenizer_task(tiny, pictures, FEW, start="nothing", keep_others=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1: got 0"),
        ({"accumulate": 3}, "accumulate must divide batch_size 16: got 3"),
        ({"held_out": 1.0}, "held_out must be from 0 to below 1: got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0: got 0.0"),
        ({"final_rate": 1.0}, "final_rate must be from 0 to below 1: got 1.0"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon: got 'sgd'"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**changes)


def test_validation_records_are_never_trained_on(records):
    source = reading.Records(records)
    kept = set(reading.validation_numbers(source, 0.25).tolist())
    rows = {source[i]: i for i in range(len(source))}
    train = reading.tokens(records, 4, validation_share=0.25, epochs=1)
    unseen = reading.tokens(records, 4, validation_share=0.25, validation=True, epochs=1)
    numbers = [[rows[row.astype("<i4").tobytes()] for row in batch] for batch in train]
    assert not kept & {number for batch in numbers for number in batch}
    named = reading.record_numbers(records, 4, 2, validation_share=0.25)
    assert numbers[2] == named.tolist()
    assert kept >= {rows[row.astype("<i4").tobytes()] for row in unseen[0]}


def test_a_short_folder_trains_and_validates(tiny, tmp_path):
    """Pictures enough for a batch, and 2 of 24 records to validate on."""
    prepare.prepare_pictures(sources.Scenes(24), tmp_path)
    options = Options(num_steps=1, batch_size=16, held_out=0.1)
    task = recipes.tokenizer_task(tiny, tmp_path, options, side=32, strides=(8,))
    assert task.held_out_batches == 1
    pixels, _ = task.read_held_out(0)
    assert pixels.shape == (16, 32, 32, 3)
    assert task.settings["validation_split"] == reading.SPLIT


def test_the_bundle_that_ships_is_what_the_commands_start_from():
    assert bundles.networks_in() == bundles.NETWORKS


def test_placing_the_codebook_compiles_no_step_anew(tiny, pictures):
    options = dataclasses.replace(FEW, held_out=0.0)
    task = recipes.tokenizer_task(tiny, pictures, options, side=32, start="nothing", place_at=0.5)
    params = tiny.tokenizer
    state = init_state(params, optax.identity(), extra=task.extra(params))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 0, state), donate_argnums=0)
    for number in range(options.num_steps):
        before = np.asarray(state.params["codebook"])
        state = task.before_step(number, state)
        assert np.array_equal(before, state.params["codebook"]) == (number != 2)
        state = step(state)
    assert step._cache_size() == 1
