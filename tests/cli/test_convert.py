"""`cogview2 convert`: the published files on the command line."""

import pytest

from cogview2_jax import bundle as bundles
from tests.published import published_files as pf


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return pf.write_all(tmp_path_factory.mktemp("published") / "files")


def test_one_command_makes_a_model(run, published, tmp_path):
    code, out, err = run("convert", published, tmp_path / "model", "--dtype", "bfloat16")
    assert code == 0
    assert f"{tmp_path / 'model'}: parameters in bfloat16" in out
    assert "coglm       189,184 parameters" in out
    assert "256 image tokens, 101 text pieces" in out
    assert err == (
        "cogview2: the tokenizer has 96 codes and there are 256 image tokens: it cannot be used"
        " together with the other networks\n"
    )
    assert bundles.networks_in(tmp_path / "model") == bundles.NETWORKS


def test_networks_and_files_can_be_named(run, published, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "coglm").symlink_to(published / "coglm")
    arguments = ["convert", tmp_path / "files", tmp_path / "model", "--only", "coglm"]
    code, _, err = run(*arguments)
    assert (code, "lacks ice_text.model; lacks cluster_label.npy" in err) == (2, True)
    text_model = ["--text-model", published / "ice_text.model"]
    code, out, err = run(
        *arguments, *text_model, "--cluster-labels", published / "cluster_label.npy"
    )
    assert (code, err) == (0, "")
    assert bundles.networks_in(tmp_path / "model") == ("coglm",)
    code, _, err = run("info", "--bundle", tmp_path / "model")
    assert code == 0


def test_mistakes_are_told_in_one_line(run, published, tmp_path):
    for arguments, message in (
        ((tmp_path / "nowhere", tmp_path / "model"), "nowhere is no folder"),
        ((published, tmp_path), "exists: give a new folder"),
        ((published, published / "ice_text.model" / "model"), "cannot write to"),
        ((published, tmp_path / "model", "--dtype", "int8"), "'int8' is not one of"),
        ((published,), "Missing argument 'DST'"),
    ):
        code, out, err = run("convert", *arguments)
        assert (code, out) == (2, "")
        assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_help_names_the_files(run):
    code, out, _ = run("convert", "--help")
    assert code == 0
    for name in ("model_config.json", "ice_image.pt", "ice_text.model", "cluster_label.npy"):
        assert name in out
