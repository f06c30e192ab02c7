"""Progress where stderr is no terminal: lines, nothing redrawn."""

import io
import sys

from cogview2_jax.cli import bars


def test_a_log_file_gets_lines(capsys, monkeypatch):
    monkeypatch.setattr(bars, "SECONDS", 0.0)
    with bars.bar("records", 3, "inputs") as bar:
        for _ in range(3):
            bar.update()
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0].startswith("records: 0 of 3 inputs")
    assert lines[-1].startswith("records: 3 of 3 inputs")


def test_a_log_file_is_not_filled(capsys):
    with bars.bar("records", 10_000, "inputs") as bar:
        for _ in range(10_000):
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with bars.bar("records", 3, "inputs") as bar:
        bar.update(3)
    assert "\r" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()
