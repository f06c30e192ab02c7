"""The parts of the Scenes training, on a handful of scenes and networks of one narrow layer."""

import dataclasses

import jax
import numpy as np
import pytest

from cogview2_jax.config import TransformerConfig
from cogview2_jax.data import scenes
from cogview2_jax.tokenizer import image, text
from experiments.scenes import presets, records, transformers

pytestmark = pytest.mark.slow
SIZES = TransformerConfig(num_layers=1, hidden_size=16, num_heads=2)
SLOTS = 22


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def text_model(work):
    return records.text_model(work, num_captions=2000)


@pytest.fixture(scope="module")
def tokenizer_params():
    return jax.jit(lambda key: image.init_params(key, presets.TOKENIZER))(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens(work, text_model, tokenizer_params):
    return records.tokenize(
        work, tokenizer_params, text_model, range(8), slots=SLOTS, fine=True, batch_size=16
    )


@pytest.fixture(scope="module")
def vocabulary(text_model):
    return text.vocabulary_for(text_model, presets.TOKENIZER.codebook_size)


def narrow(config):
    return dataclasses.replace(config, transformer=SIZES)


def test_records_hold_texts_of_both_languages_and_both_grids(tokens, text_model):
    assert tokens.texts.shape == (8, 2, 2, 2, SLOTS)
    assert tokens.coarse.shape == tokens.repainted.shape == (8, 64)
    assert tokens.fine.shape == (8, 576)
    assert tokens.objects.any(1).all() and not tokens.objects.all(1).any()
    size = presets.TOKENIZER.codebook_size
    for by_language in tokens.texts:
        for language, order, row in np.ndindex(by_language.shape[:-1]):
            ids = [t for t in by_language[language, order, row] if t >= 0]
            caption = text.decode(text_model, ids, size)
            assert caption.isascii() == (language == 0)
            claims = scenes.parse_caption(caption)
            if claims.relation and language == 0:
                assert (claims.relation in ("above", "left of")) == (order == 0)


def test_records_on_disk_are_not_made_again(work, tokens, text_model):
    again = records.tokenize(work, None, text_model, range(8), slots=SLOTS, fine=True)
    jax.tree.map(np.testing.assert_array_equal, tokens, again)


def test_every_epoch_reads_each_record_once():
    rows = np.concatenate([transformers._rows(3, step, 4, 6) for step in range(3)])
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert list(rows[:6]) != list(rows[6:])


def test_the_transformers_train_and_a_finished_training_is_not_repeated(
    work, tokens, vocabulary, text_model
):
    coglm = narrow(presets.coglm_config(vocabulary))
    direct = dataclasses.replace(presets.direct_sr_config(vocabulary), coglm=coglm)
    iterative = narrow(presets.iterative_sr_config(vocabulary))
    chinese = text.first_chinese(text_model, presets.TOKENIZER.codebook_size)

    def run_coglm():
        return transformers.run_coglm(
            tokens, coglm, chinese, work / "coglm", cycles=(2, 1), batch_size=16
        )

    trained = run_coglm()
    jax.tree.map(np.testing.assert_array_equal, trained, run_coglm())
    upscaler = transformers.run_direct_sr(
        tokens, trained, direct, work / "direct", cycles=(2,), batch_size=2
    )
    labels = np.arange(presets.TOKENIZER.codebook_size) % presets.NUM_CLUSTERS
    drafts = transformers.drafts(tokens, upscaler, direct, labels, work / "drafts.npy", 4)
    assert drafts.shape == tokens.fine.shape
    again = transformers.drafts(tokens, None, direct, labels, work / "drafts.npy")
    np.testing.assert_array_equal(drafts, again)
    refiner = transformers.run_iterative_sr(
        tokens, drafts, trained, coglm, iterative, work / "iterative", cycles=(2,), batch_size=2
    )
    for params in (trained, upscaler, refiner):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
