"""The page of all experiments, from what is committed."""

import html.parser
import re

import pytest
from click.testing import CliRunner

from experiments import report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(html.parser.HTMLParser):
    """Every element is closed; remembers ids, links and pictures."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.pictures = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img":
            self.pictures.append(values["src"][:30])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag


def test_the_page_has_every_experiment_and_needs_no_other_file(tmp_path):
    done = CliRunner().invoke(report.main, ["--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    page = Checker()
    page.feed((tmp_path / "page.html").read_text("utf-8"))
    assert not page.open
    folders = {file.parent.name for file in report.ROOT.glob("*/README.md")}
    assert set(page.ids) == folders and page.ids[0] == "parity"
    assert {f"#{name}" for name in folders} <= set(page.links)
    assert all(link.startswith(("#", "https://")) for link in page.links)
    shown = sum(
        len(re.findall(r"!\[", file.read_text("utf-8"))) for file in report.ROOT.glob("*/README.md")
    )
    assert len(page.pictures) == shown > 5
    assert all(source.startswith("data:image/") for source in page.pictures)


def test_figures_become_tables():
    rows = [{"name": "a", "right": {"en": 0.51234, "zh": 1}}, {"name": "<b>", "seconds": 2}]
    made = "".join(report.tables({"seed": 3, "parts": {"one": rows}, "list": [1, 2]}))
    for words in (
        "right.en",
        "0.5123",
        "&lt;b&gt;",
        "<td>seed</td><td>3</td>",
        "parts: one",
        "1, 2",
    ):
        assert words in made
    assert made.count("<tr>") == 2 + 3
    named = "".join(report.tables({"direct": {"right": 0.5}, "full": {"right": 1.0}}))
    assert "<td>direct</td><td>0.5</td>" in named


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "README.md").write_text("`python -m experiments.one.run`")
    (tmp_path / "one" / "README.md").write_text("# One\n\n<script>alert(1)</script>\n")
    assert "&lt;script&gt;" in report.page(tmp_path)
    (tmp_path / "one" / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged"):
        report.page(tmp_path)
