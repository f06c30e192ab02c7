"""Training of every network from prepared records: it learns, and its batches are right."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax.config import CogLMConfig, Training
from cogview2_jax.data import prepare, reading, sources
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.networks import direct_sr, inputs
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer import image
from cogview2_jax.training import batches
from cogview2_jax.training.batches import Rows
from cogview2_jax.training.coglm import coglm_task
from cogview2_jax.training.options import (
    CogLMOptions,
    DirectSROptions,
    IterativeSROptions,
    LoopOptions,
    Options,
    TokenizerOptions,
)
from cogview2_jax.training.run import going_on, run, settings_of
from cogview2_jax.training.step import init_state
from cogview2_jax.training.super_resolution import direct_sr_task, iterative_sr_task
from cogview2_jax.training.tokenizer import tokenizer_task

NUMBER = 24
FEW = Options(num_steps=4, batch_size=4, validation=0.25)


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


# The records are longer than the tiny model's text.
TASKS = {
    "coglm": (coglm_task, CogLMOptions(text_ratio=0.0, patch_size=2)),
    "direct": (direct_sr_task, DirectSROptions()),
    "iterative": (iterative_sr_task, IterativeSROptions()),
    "tokenizer": (tokenizer_task, TokenizerOptions(side=32, strides=(8,))),
}


def task_of(network, bundle, folder, options, start=None):
    build, own = TASKS[network]
    return build(bundle, folder, options, dataclasses.replace(own, start=start))


@pytest.mark.parametrize(
    "network",
    [
        "coglm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("direct", "iterative")),
        pytest.param("tokenizer", marks=pytest.mark.long),
    ],
)
def test_it_trains_from_nothing_and_goes_on(network, tiny, records, pictures, tmp_path):
    options = dataclasses.replace(FEW, learning_rate=3e-3, average=0.5)
    folder, loop = pictures if network == "tokenizer" else records, LoopOptions(2, log_every=2)
    made = task_of(network, tiny, folder, options, "nothing")
    params = run(made, options, tmp_path, loop)
    like = getattr(tiny, network)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
    longer = going_on(dataclasses.replace(options, num_steps=6), tmp_path)
    assert longer.planned_steps == 4  # the learning rate, and a codebook's placing, stay
    again = task_of(network, tiny, folder, longer, "nothing")
    run(again, longer, tmp_path, loop)
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert "6" in steps
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "validation_loss" in text and "NaN" not in text
    with pytest.raises(ValueError, match="was begun with options.learning_rate 0.003"):
        run(again, dataclasses.replace(longer, learning_rate=1.0), tmp_path)
    with pytest.raises(ValueError, match="was begun with options.schedule_steps 4, now it is 8"):
        run(again, dataclasses.replace(longer, schedule_steps=8), tmp_path)


@pytest.mark.parametrize("network", ["coglm", "direct", "iterative"])
def test_a_bundle_takes_what_was_trained_in_its_place(network, tiny, records):
    trained = {"of": network}
    made = task_of(network, tiny, records, FEW).put(tiny, trained)
    changed = [name for name in tiny._fields if getattr(made, name) is not getattr(tiny, name)]
    assert changed == [network] and getattr(made, network) is trained


@pytest.mark.parametrize("network", ["direct", "iterative"])
def test_super_resolution_starts_from_coglm(network, tiny, records):
    task = task_of(network, tiny, records, FEW, "coglm")
    np.testing.assert_array_equal(task.params["word_embeddings"], tiny.coglm["word_embeddings"])
    with pytest.raises(ValueError, match="start 'coglm' needs parameters that the model lacks"):
        task_of(network, tiny._replace(coglm={}), records, FEW, "coglm")


def test_a_frozen_base_stays(tiny, records, tmp_path):
    options = dataclasses.replace(FEW, num_steps=2, validation=0.0)
    task = direct_sr_task(tiny, records, options, DirectSROptions("coglm", freeze_base=True))
    params = run(task, options, tmp_path)
    before = direct_sr.from_coglm(tiny.coglm, tiny.direct_config)
    new = direct_sr.added_parameters(before)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, before)
    frozen = jax.tree.map(lambda is_new, moved: not is_new and moved, new, changed)
    assert not any(jax.tree.leaves(frozen))
    assert changed["extra_position_embeddings"]
    assert changed["layers"]["attention"]["qkv_plus"]["query_key_value"]["kernel"]


@pytest.mark.long
def test_other_strides_can_be_trained_with_nothing_changed_for_the_rest(tiny, pictures, tmp_path):
    config, options = tiny.tokenizer_config, dataclasses.replace(FEW, num_steps=2, validation=0.0)
    others = TokenizerOptions(side=32, strides=(4, 16), keep_others=True)
    params = run(tokenizer_task(tiny, pictures, options, others), options, tmp_path / "others")
    pixels = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    for stride, same in ((4, False), (8, True), (16, False)):
        made = []
        for each in (params, tiny.tokenizer):
            ids = image.encode(each, pixels, stride, config=config)
            made.append((ids, image.decode(each, ids, stride, config=config)))
        assert all(map(np.array_equal, *made)) == same
    np.testing.assert_array_equal(params["codebook"], tiny.tokenizer["codebook"])

    # Alone, a stride changes what it uses, the encoder too, and not the other decoders.
    alone = task_of("tokenizer", tiny, pictures, options)
    params = run(alone, options, tmp_path / "alone")
    moved = {
        name: not all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, tiny.tokenizer[name])))
        for name, tree in params.items()
    }
    unused = {"decoder_4", "decoder_16", "downsamplers_1"}
    assert {name for name, changed in moved.items() if not changed} == unused


def rows_of(records, parts, tiny):
    """The rows of a batch of 8 in each of `parts` processes, with the generator that they share."""
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
            mix = CogLMOptions(text_ratio=0.4, patch_size=2, drop_text=0.5)
            return batches.coglm(rng, rows, source, range(NUMBER), roomy, mix)
        if network == "direct":
            return batches.direct_sr(rng, rows, layout, tiny.direct_config)
        return batches.iterative_sr(rng, rows, layout, config, tiny.iterative_config)

    (whole,) = (sample(rows) for rows in rows_of(records, 1, tiny))
    parts = [sample(rows) for rows in rows_of(records, 4, tiny)]
    for name, one in whole._asdict().items():
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(one, joined, err_msg=name)


def test_validation_takes_its_texts_from_its_own_records(tiny, records, monkeypatch):
    task = task_of("coglm", tiny, records, FEW)
    taken = []

    def recorded(rng, rows, source, numbers, *more):
        taken.append(set(numbers))

    monkeypatch.setattr(batches, "coglm", recorded)
    task.read(0)
    task.read_validation(0)
    training, validation = taken
    assert validation == set(reading.validation_numbers(reading.Records(records), 0.25))
    assert validation and not training & validation


def test_masks_of_iterative_sr_are_those_of_the_rounds(tiny, records):
    layout = reading.Records(records).manifest.layout
    (rows,) = rows_of(records, 1, tiny)
    config = tiny.iterative_config
    made = batches.iterative_sr(np.random.default_rng(0), rows, layout, tiny.coglm_config, config)
    rounds = inputs.lopar_schedule(config)
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
    with pytest.raises(ValueError, match="16 pixels per token .* has 8: .* --stride 8"):
        batches.require_layout(strided, tiny.coglm_config)
    with pytest.raises(ValueError, match="holds pictures, not tokens"):
        coglm_task(tiny, pictures, FEW)
    with pytest.raises(ValueError, match="text_ratio must be 0 for records of 97 tokens"):
        coglm_task(tiny, records, FEW)
    with pytest.raises(ValueError, match=r"strides must be of \(4, 8, 16\): got \(3, 8\)"):
        tokenizer_task(tiny, pictures, FEW, TokenizerOptions(strides=(8, 3)))
    with pytest.raises(ValueError, match="keep_others needs a stride that is not trained"):
        tokenizer_task(tiny, pictures, FEW, TokenizerOptions(keep_others=True))
    with pytest.raises(
        ValueError, match="keep_others needs a trained tokenizer to start from: give"
    ):
        tokenizer_task(tiny, pictures, FEW, TokenizerOptions("nothing", keep_others=True))
    remat = Execution(training=Training(remat="all"))
    with pytest.raises(ValueError, match="dropout, remat and z_loss are for transformers"):
        tokenizer_task(tiny, pictures, FEW, execution=remat)


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
    """Enough pictures for a batch, and 2 of 24 records for validation."""
    prepare.prepare_pictures(sources.Scenes(24), tmp_path)
    options = Options(num_steps=1, batch_size=16, validation=0.1)
    task = tokenizer_task(tiny, tmp_path, options, TokenizerOptions(side=32, strides=(8,)))
    assert task.validation_batches == 1
    pixels, _ = task.read_validation(0)
    assert pixels.shape == (16, 32, 32, 3)
    assert task.settings["validation_split"] == reading.SPLIT


def test_the_bundle_that_ships_is_what_the_commands_start_from():
    assert bundles.networks_in() == bundles.NETWORKS


def test_a_run_resumes_with_other_rematerialisation(tiny, records):
    """It saves memory and changes no result, so it is what to try when a step does not fit."""
    build, own = TASKS["coglm"]
    plain, repeated = (
        settings_of(build(tiny, records, FEW, own, Execution(training=training)), FEW)
        for training in (Training(), Training(remat="all"))
    )
    assert plain == repeated
    less = build(tiny, records, FEW, own, Execution(training=Training(dropout=0.1)))
    assert settings_of(less, FEW) != plain


@pytest.mark.parametrize(("strides", "side"), [((8,), 64), ((4,), 32), ((4, 8), 64), ((), 128)])
def test_crops_are_eight_tokens_of_the_largest_trained_stride(strides, side, tiny, pictures):
    """So that training stride 8 alone takes crops of 64 pixels, and not of 128."""
    options = dataclasses.replace(FEW, validation=0.0)
    task = tokenizer_task(tiny, pictures, options, TokenizerOptions(strides=strides))
    pixels, _ = task.read(0)
    assert pixels.shape == (options.batch_size, side, side, 3)
    assert task.settings["side"] == side


def test_placing_the_codebook_compiles_no_step_anew(tiny, pictures):
    options = dataclasses.replace(FEW, validation=0.0)
    own = TokenizerOptions("nothing", side=32, settle=0.5)
    task = tokenizer_task(tiny, pictures, options, own)
    params = tiny.tokenizer
    state = init_state(params, optax.identity(), extra=task.extra(params))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 0, state), donate_argnums=0)
    for number in range(options.num_steps):
        before = np.asarray(state.params["codebook"])
        state = task.before_step(number, state)
        assert np.array_equal(before, state.params["codebook"]) == (number != 2)
        state = step(state)
    assert step._cache_size() == 1
