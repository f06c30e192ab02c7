"""All experiments on one page: questions, commands, tables, plots and picture grids.

\b
    python -m experiments.report --out report.html

Nothing is run: the page shows what is committed, the README of each experiment with its pictures,
and below it every figure of its JSON files. It is one file of HTML, to be opened without a server.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; background: white; }
pre, table { display: block; overflow-x: auto; }
pre { padding: .6rem; background: color-mix(in srgb, currentColor 8%, transparent); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid #8886; padding: .2rem .7rem .2rem 0; text-align: left; }
section { border-top: 2px solid #8888; margin-top: 3rem; }
summary { cursor: pointer; margin: .5rem 0; }
"""


def page(root: Path = ROOT) -> str:
    """The whole page. Raises ValueError, with the file's name, for a JSON file that is damaged."""
    folders = [folder for folder in in_order(root) if (folder / "README.md").is_file()]
    links = []
    for folder in folders:
        title = html.escape(title_of(folder / "README.md"))
        links.append(f'<li><a href="#{folder.name}">{title}</a></li>')
    sections = "\n".join(section(folder) for folder in folders)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>cogview2_jax: experiments</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Experiments</h1>\n<ul>\n{chr(10).join(links)}\n</ul>\n{sections}\n</body>\n</html>\n"
    )


def in_order(root: Path) -> list[Path]:
    """The folders of experiments: as the index in README.md has them, then the others."""
    index = (root / "README.md").read_text("utf-8")
    named = re.findall(r"python -m experiments\.(\w+)\.", index)
    others = sorted(folder.name for folder in root.iterdir() if (folder / "README.md").is_file())
    return [root / name for name in dict.fromkeys([*named, *others])]


def title_of(readme: Path) -> str:
    return readme.read_text("utf-8").split("\n", 1)[0].removeprefix("# ")


def section(folder: Path) -> str:
    """An experiment: its README, and the figures of its JSON files, folded."""
    parts = [f'<section id="{folder.name}">', readme(folder / "README.md")]
    for file in sorted(folder.glob("*.json")):
        try:
            figures = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        parts.append(f"<details><summary>{file.name}</summary>")
        parts += tables(figures)
        parts.append("</details>")
    return "\n".join([*parts, "</section>"])


def readme(file: Path) -> str:
    """A README as HTML, its pictures in the text and its links to other files without a target."""
    from markdown_it import MarkdownIt

    made: str = (
        MarkdownIt("commonmark", {"html": False}).enable("table").render(file.read_text("utf-8"))
    )

    def embedded(found: re.Match[str]) -> str:
        picture = file.parent / found[1]
        kind = {".jpg": "jpeg", ".svg": "svg+xml"}.get(picture.suffix, picture.suffix[1:])
        content = base64.b64encode(picture.read_bytes()).decode()
        return f'src="data:image/{kind};base64,{content}"'

    made = re.sub(r'src="((?!https?:|data:)[^"]+)"', embedded, made)
    return re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", made, flags=re.DOTALL)


def tables(value: Any, name: str = "") -> Iterator[str]:
    """Figures as tables: rows with one column for each field, and single values together."""
    heading = f"<h4>{html.escape(name)}</h4>" if name else ""
    if _are_rows(value):
        rows = [_flat(row) for row in value]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        yield heading + _table(columns, [[row.get(one, "") for one in columns] for row in rows])
    elif isinstance(value, dict) and value and _are_rows(list(value.values())):
        named = [{"": key, **each} for key, each in value.items()]
        yield from tables(named, name)
    elif isinstance(value, dict):
        single = {key: each for key, each in value.items() if not isinstance(each, (dict, list))}
        if single:
            yield heading + _table(["", "value"], [list(pair) for pair in single.items()])
        for key, each in value.items():
            if key not in single:
                yield from tables(each, f"{name}: {key}" if name else key)
    elif isinstance(value, list) and value:
        yield heading + f"<p>{html.escape(', '.join(map(_said, value)))}</p>"


def _are_rows(value: Any) -> bool:
    """Whether these are objects of single values, perhaps in inner objects."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(row, dict) and row and _is_flat(row) for row in value)


def _is_flat(row: Mapping[str, Any]) -> bool:
    return all(
        _is_flat(each) if isinstance(each, dict) else not isinstance(each, list)
        for each in row.values()
    )


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in row.items():
        made |= (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
        )
    return made


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(_said(cell))}</{tag}>" for cell in cells)

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f"<table>\n<thead><tr>{line(columns, 'th')}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"))
def main(out: Path) -> None:
    try:
        out.write_text(page(), "utf-8")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(out)


if __name__ == "__main__":
    main()
