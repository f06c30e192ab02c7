"""The README's Python runs as printed."""

import re
from pathlib import Path

import pytest

from cogview2_jax import bundle

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
)


def needs_model(snippet: str) -> bool:
    return "cogview2_jax.load()" in snippet


@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(snippet, id=str(number), marks=[pytest.mark.slow] * needs_model(snippet))
        for number, snippet in enumerate(SNIPPETS)
    ],
)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    if needs_model(snippet) and not bundle.SHIPPED.exists():
        pytest.skip("this checkout has no bundle")
    monkeypatch.chdir(tmp_path)  # for what they write
    exec(compile(snippet, str(README), "exec"), {"__name__": "readme"})


def test_there_are_snippets():
    assert len(SNIPPETS) == 8


def test_what_the_readme_runs_exists():
    """Modules after `python -m` are in the checkout."""
    modules = re.findall(r"python -m (experiments[\w.]+)", README.read_text("utf-8"))
    assert modules
    for module in modules:
        assert (README.parent / module.replace(".", "/")).with_suffix(".py").exists(), module
