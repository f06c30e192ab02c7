"""serve: what is refused before the page opens. tests/page has the page itself."""

import importlib.util
import socket

import pytest


@pytest.fixture
def without_gradio(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name)
    )


def test_the_extra_is_named(run, without_gradio):
    code, out, err = run("serve")
    assert (code, out) == (2, "")
    assert err.startswith("cogview2: gradio is not installed: `pip install 'cogview2-jax[page]'`")


def test_it_listens_to_this_machine_alone(run):
    code, out, _ = run("serve", "--help")
    assert code == 0 and "[default: 127.0.0.1]" in " ".join(out.split())


def test_mistakes_end_in_one_line(run, tiny_folder, tmp_path):
    pytest.importorskip("gradio", exc_type=ImportError)
    (tmp_path / "mine.txt").write_text("mine")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for options, said in (
            (("--folder", tmp_path), "is not empty: give another --folder"),
            (("--bundle", tmp_path), "config.json"),
            (("--port", 0), "--port"),
            (("--host", "::1"), "no IPv6 address"),
            (("--host", "127..0.1"), "give another --port or --host"),
            (("--port", taken.getsockname()[1]), "give another --port"),
        ):
            code, out, err = run("serve", "--bundle", tiny_folder, *options)
            assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
