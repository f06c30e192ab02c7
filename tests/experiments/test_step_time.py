"""The bare transformer that the train step is compared with, and the verdicts."""

import jax
import numpy as np
import pytest

from cogview2_jax.data.records import make_record
from cogview2_jax.networks import coglm
from cogview2_jax.training import coglm_samples
from cogview2_jax.training.step import adamw
from experiments.step_time import bare, run
from tests.common import IMAGE, SMALL, TEXT, parameter_count


def sample():
    records = np.stack([make_record([TEXT], IMAGE, SMALL)] * 2)
    return coglm_samples.generation_samples(records, np.zeros(2, bool), SMALL)


def test_the_bare_transformer_lacks_only_the_sandwich():
    sizes = SMALL.transformer
    params = bare.init_params(jax.random.key(0), SMALL)
    norms = sizes.num_layers * 2 * 2 * sizes.hidden_size  # of scale and bias
    assert run.count(params) == parameter_count(coglm.init_params, SMALL) - norms


@pytest.mark.slow
def test_the_bare_step_learns():
    params = bare.init_params(jax.random.key(0), SMALL)
    optimizer = adamw(lambda step: 1e-2)
    step, opt_state, losses = bare.make_step(SMALL, optimizer), optimizer.init(params), []
    for _ in range(20):
        params, opt_state, loss = step(params, opt_state, sample())
        losses.append(float(loss))
    assert abs(losses[0] - np.log(SMALL.vocabulary.size)) < 0.1
    assert losses[-1] < 0.5 * losses[0]


def test_the_bare_transformer_sees_what_the_mask_shows():
    params = bare.init_params(jax.random.key(0), SMALL)
    whole = sample()
    changed = whole._replace(tokens=whole.tokens.copy())
    changed.tokens[:, -1] += 1  # the last cell is seen by nobody who has a loss
    losses = [bare.loss(params, one, SMALL.transformer.num_heads) for one in (whole, changed)]
    assert losses[0] == losses[1]
    changed.tokens[:, -3] += 1
    assert bare.loss(params, changed, SMALL.transformer.num_heads) != losses[0]


def test_verdicts():
    one = {"fastest_s": 1.0, "cpu_s": 2.0}
    found = {
        "ours": {"fastest_s": 1.2, "cpu_s": 2.8},
        "bare": one,
        "programs_of_the_step": 1,
        "compiled_after_the_first_step": 1,
        "compiled_in_the_loop": 0,
    }
    assert [v.holds for v in run.step_verdicts(16, found)] == [True, False, True, False, True]
