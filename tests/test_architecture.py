"""Which room may import which, read off the sources."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import rooms of earlier floors and itself, not its neighbours on the same floor.
FLOORS = (
    ("checks", "errors", "files"),
    ("config", "keys"),
    ("sharding", "styles"),
    ("description", "tokenizer", "networks", "decoding"),
    ("shapes", "placement"),
    ("bundle",),
    ("published", "pipeline"),
    ("data",),
    ("training", "evaluation", "page"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Of `cogview2_jax.load`.
PACKAGE_IMPORTS = {"bundle", "pipeline", "sharding"}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no sources in {package}"
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere in a source, also in functions; `from a import b` is a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top(dotted: str) -> str:
    return dotted.split(".")[0]


def room(path: Path) -> str:
    """The room of a source of the library: the name of a folder or of a single file."""
    return path.relative_to(ROOT / "cogview2_jax").with_suffix("").parts[0]


LIBRARY = sources("cogview2_jax")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_downwards(path):
    here = room(path)
    assert here in FLOOR or here == "__init__", f"{path.name} is in no room of FLOORS"
    for name in imports(path):
        if top(name) != "cogview2_jax" or name == "cogview2_jax.__version__":
            continue
        # `import cogview2_jax` would reach every room.
        there = name.split(".")[1] if "." in name else ""
        if here == "__init__":
            assert there in PACKAGE_IMPORTS, f"{path.name} imports {name}"
        elif there != here:
            assert FLOOR.get(there, len(FLOORS)) < FLOOR[here], f"{path.name} imports {name}"


@pytest.mark.parametrize("package", ["cogview2_jax", "pallas_kernels", "experiments"])
def test_only_experiments_import_experiments_and_only_tests_import_tests(package):
    for path in sources(package):
        foreign = {"tests", "experiments"} - {package}
        assert not foreign & {top(name) for name in imports(path)}, path


def test_the_kernels_know_jax_and_nothing_else():
    known = sys.stdlib_module_names | {"jax", "numpy", "pallas_kernels"}
    for path in sources("pallas_kernels"):
        for name in imports(path):
            assert top(name) in known, f"{path} imports {name}"


def test_the_loops_know_no_model():
    for name in imports(ROOT / "cogview2_jax" / "decoding" / "loops.py"):
        assert top(name) in sys.stdlib_module_names | {"jax"}, f"loops.py imports {name}"


def test_nothing_in_the_library_imports_torch():
    for path in (*LIBRARY, *sources("pallas_kernels")):
        assert "torch" not in {top(name) for name in imports(path)}, path


def test_only_one_room_knows_the_published_names():
    for path in LIBRARY:
        if room(path) != "published":
            assert "attention_plus." not in path.read_text("utf-8"), path
            assert "transformer.layers" not in path.read_text("utf-8"), path
