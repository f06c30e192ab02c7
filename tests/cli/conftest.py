"""Running a command as a user does."""

import pytest

from cogview2_jax import bundle as bundles
from cogview2_jax import cli
from cogview2_jax.cli import common
from cogview2_jax.config import ClusterSampling
from cogview2_jax.styles import Style


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Tests keep compiled programs in a cache of their own."""
    monkeypatch.setattr(common, "use_compilation_cache", lambda: None)


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.fixture(scope="session")
def records(tiny_folder, tmp_path_factory):
    """Pictures and captions as records for the tiny model: 11 of one size."""
    folder = tmp_path_factory.mktemp("data") / "records"
    arguments = ["data", "prepare", "scenes", "--count", "16", "--out", str(folder)]
    options = ["--bundle", str(tiny_folder), "--allow-unknown", "--caption-field", "en"]
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, *options, "--text-slots", "22"])
    assert done.value.code == 0
    return folder


@pytest.fixture(scope="session")
def styled_folder(tiny, tmp_path_factory):
    """A model with a style of its own, which is the default."""
    folder = tmp_path_factory.mktemp("styled") / "bundle"
    left = Style("left", "{} on the left", ClusterSampling(1.0, 4), ClusterSampling(1.0, 4))
    bundles.save(folder, tiny._replace(styles=(left,)))
    return folder
