"""info: what a model is made of."""

import numpy as np

from cogview2_jax import bundle as bundles


def test_info_shows_model_and_devices(run, tiny_folder):
    code, out, _ = run("info", "--bundle", tiny_folder)
    assert code == 0
    for expected in (str(tiny_folder), "12 tokens", "4 × 4", "12 × 12", "device", "CogLMConfig"):
        assert expected in out


def test_info_shows_what_is_missing(run, tiny, tmp_path):
    folder = tmp_path / "bundle"
    bundles.save(folder, tiny._replace(coglm={}, direct={}))
    code, out, _ = run("info", "--bundle", folder)
    assert code == 0
    missing = [line.split()[0] for line in out.splitlines() if "not there yet" in line]
    assert missing == ["coglm", "direct"]
    assert "`cogview2 train coglm`" in out and "`cogview2 train direct-sr`" in out
    none = {name: {} for name in bundles.NETWORKS}
    bundles.save(folder, tiny._replace(**none, cluster_labels=np.zeros(0, np.int32)))
    code, out, _ = run("info", "--bundle", folder)
    assert code == 0 and out.count("not there yet") == 4 and "in no clusters" in out
