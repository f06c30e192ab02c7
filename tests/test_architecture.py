"""Which way the doors open: who may import whom, read off the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import rooms of the floors above its own, and itself.
FLOORS = (
    ("config", "sharding", "errors", "keys"),
    ("description", "tokenizer", "networks", "decoding"),
    ("bundle",),
    ("published", "pipeline"),
    ("data",),
    ("training", "evaluation", "page"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Within a floor: sharding is described by the configuration, networks know no tokenizer.
BESIDE = (("config", "sharding"), ("config", "errors"))


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no sources in {package}"
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere in a source, also in functions; `from a import b` is a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "cogview2_jax" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sources("cogview2_jax"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_imports_downwards(path):
    here = path.relative_to(ROOT / "cogview2_jax").with_suffix("").parts[0]
    for name in imports(path):
        there = room(name)
        if there is None or there.startswith("__") or there == here or here == "__init__":
            continue
        assert FLOOR[there] < FLOOR[here] or (there, here) in BESIDE, f"{path.name} imports {name}"


@pytest.mark.parametrize("package", ["cogview2_jax", "pallas_kernels"])
def test_nothing_in_the_library_imports_experiments_or_tests(package):
    for path in sources(package):
        for name in imports(path):
            assert name.split(".")[0] not in ("experiments", "tests"), f"{path} imports {name}"


def test_the_kernels_know_jax_and_nothing_else():
    for path in sources("pallas_kernels"):
        for name in imports(path):
            foreign = name.split(".")[0] in ("flax", "cogview2_jax", "optax", "einops")
            assert not foreign, f"{path} imports {name}"


def test_the_loops_know_no_model():
    for name in imports(ROOT / "cogview2_jax" / "decoding" / "loops.py"):
        assert room(name) is None, f"loops.py imports {name}"


def test_nothing_imports_torch():
    for path in (p for package in ("cogview2_jax", "pallas_kernels") for p in sources(package)):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}, path


def test_only_one_room_knows_the_published_names():
    for path in sources("cogview2_jax"):
        if path.parent.name != "published":
            assert "attention_plus." not in path.read_text(), path
            assert "transformer.layers" not in path.read_text(), path
