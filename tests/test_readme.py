"""The Python of every README runs as printed, and the modules and files that they name exist."""

import re
from pathlib import Path

import pytest

from cogview2_jax import bundle

ROOT = Path(__file__).parents[1]
FOLDERS = ("pallas_kernels", "cogview2_jax", "experiments", "tests")
READMES = [
    ROOT / "README.md",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
]
DOCUMENTS = [*READMES, *(path for path in sorted(ROOT.glob("*.md")) if path not in READMES)]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def snippets():
    for readme in READMES:
        content = readme.read_text("utf-8")
        for found in PYTHON.finditer(content):
            line = content.count("\n", 0, found.start(1))
            # Blank lines before it, so that a traceback has the line of the README.
            code = "\n" * line + found[1]
            marks = [pytest.mark.slow] * needs_model(code)
            yield pytest.param(readme, code, id=f"{name(readme)}:{line + 1}", marks=marks)


def needs_model(snippet: str) -> bool:
    """It loads the bundle that ships: `cogview2_jax.load(…)` or `bundles.load()`, with no path."""
    return "cogview2_jax.load(" in snippet or "load()" in snippet


@pytest.mark.parametrize(("readme", "snippet"), list(snippets()))
def test_snippets_run(readme, snippet, tmp_path, monkeypatch):
    if needs_model(snippet) and not bundle.SHIPPED.exists():
        pytest.skip("this checkout has no bundle")
    monkeypatch.chdir(tmp_path)  # for what they write
    exec(compile(snippet, str(readme), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_python_block_is_run(document):
    """A block with an indented fence, or in a document that is no README, would never run."""
    content = document.read_text("utf-8")
    run = len(PYTHON.findall(content)) if document in READMES else 0
    assert len(re.findall(r"^[ \t]*(?:```|~~~)[ \t]*py", content, re.MULTILINE)) == run


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_what_is_named_exists(document):
    """Modules after `python -m`, and targets of links and images."""
    content = document.read_text("utf-8")
    modules = re.findall(r"python -m (experiments[\w.]*\w)", content)
    paths = {f"{module.replace('.', '/')}.py": ROOT for module in modules}
    targets = re.findall(r"\]\(([^)\s]+)", re.sub(r"```.*?```", "", content, flags=re.DOTALL))
    paths |= {
        target.split("#")[0]: document.parent
        for target in targets
        if not re.match(r"[a-z]+:|#", target)  # an address, or a place in the same file
    }
    assert not [path for path, start in paths.items() if not (start / path).exists()]


def test_the_readme_shows_python_and_a_picture():
    content = READMES[0].read_text("utf-8")
    assert PYTHON.search(content) and re.search(r"!\[[^\]]+\]\([^)]+\.png\)", content)
