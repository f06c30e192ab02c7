"""Running a command as a user does."""

import pytest

from cogview2_jax import cli
from cogview2_jax.cli import common


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Compiled programs of a test are nobody's business."""
    monkeypatch.setattr(common, "use_compilation_cache", lambda: None)


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call
