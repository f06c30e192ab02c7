"""What the tabs share: messages, progress, the drawing area and the files that visitors get."""

import base64
import contextlib
import html
import io
import json
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from cogview2_jax.page.limits import Refused
from cogview2_jax.page.words import language_of, say

HERE = Path(__file__).parent
_SHOWN = 1024  # pixels of the longer side of a picture to draw on
_MOST_KEPT = 2 << 30  # bytes of all visitors' files


def language(request: Any) -> str:
    """The page's language for a visitor."""
    return language_of(request.headers.get("accept-language")) if request else "en"


@contextlib.contextmanager
def telling(spoken: str) -> Iterator[None]:
    """Turns Refused into the message that the visitor sees, in the language `spoken`."""
    import gradio as gr

    try:
        yield
    except Refused as error:
        message = html.escape(explain(error, spoken))
        raise gr.Error(message, duration=20, print_exception=False) from error


def explain(error: Refused, spoken: str) -> str:
    """What was refused and why, in one line."""
    values = dict(error.values)
    if "what" in values:
        values["what"] = say(values["what"], spoken)
    return say(error.name, spoken, **values)


def status(words: str = "", done: float | None = None) -> str:
    """A line that screen readers say, and a bar when a part, 0 to 1, is `done`."""
    bar = "" if done is None else f'<progress max="1" value="{done:.3f}"></progress>'
    return f'<div class="status" role="status" aria-live="polite">{html.escape(words)}{bar}</div>'


class Visits:
    """How often each visitor has cancelled or left: work ends when that changes. What Gradio
    cancels by itself may go on to its end if a step of it is running.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._ended: dict[str, int] = {}
        self._most = most  # visitors that are remembered

    def ended(self, request: Any) -> int:
        return self._ended.get(_session(request), 0)

    def end(self, request: Any) -> None:
        session = _session(request)
        self._ended[session] = self._ended.pop(session, 0) + 1
        while len(self._ended) > self._most:
            self._ended.pop(next(iter(self._ended)))  # the one that did so first


def _session(request: Any) -> str:
    return (request.session_hash if request else None) or ""


def canceller(visits: Visits | None = None) -> Any:
    """What a cancel button does, besides cancelling: it says so."""
    import gradio as gr

    def cancelled(request: gr.Request) -> str:
        if visits is not None:
            visits.end(request)
        return status(say("cancelled", language(request)))

    return cancelled


def gallery(label: Any, name: str) -> Any:
    """Pictures side by side, as the visitor's width allows."""
    import gradio as gr

    return gr.Gallery(
        label=label,
        columns=2,
        object_fit="contain",
        height="auto",
        format="png",
        interactive=False,
        elem_id=name,
        elem_classes="pictures",
        buttons=["download", "fullscreen"],
    )


def look_inside(label: Any, name: str) -> Any:
    """A picture of how another came to be, shown as the file is."""
    import gradio as gr

    return gr.Image(
        label=label,
        type="filepath",
        interactive=False,
        height="auto",
        elem_id=name,
        buttons=["download"],
    )


def drawing_area() -> Any:
    """The component to draw a box or a mask on; its value is that of `marks`."""
    import gradio as gr

    return gr.HTML(
        value="{}",
        html_template='<canvas tabindex="0" role="img" hidden></canvas>',
        js_on_load=(HERE / "part.js").read_text("utf-8"),
        elem_classes="part",
        elem_id="part",
    )


def marks(picture: Image.Image, tool: str, label: str) -> str:
    """The value of a drawing area with a picture and nothing drawn."""
    shown, content = picture.copy(), io.BytesIO()
    shown.thumbnail((_SHOWN, _SHOWN))
    shown.save(content, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return json.dumps({"picture": url, "tool": tool, "label": label, "box": None, "strokes": []})


def changed(value: str | None, **changes: Any) -> str:
    """The value of a drawing area with some of its fields changed."""
    try:
        said = json.loads(value or "{}")
    except (ValueError, RecursionError):
        said = {}
    return json.dumps({**(said if isinstance(said, dict) else {}), **changes})


class Folder:
    """Where everything is written that visitors send and get. Old files are removed."""

    def __init__(self, path: Path, kept_seconds: float) -> None:
        self.path, self._kept = path, kept_seconds

    def write(self, name: str, content: bytes) -> str:
        """A new file with this name, in a folder whose name cannot be guessed."""
        self.sweep()
        file = self.path / secrets.token_hex(16) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        return str(file)

    def sweep(self) -> None:
        """Remove what is too old, and the oldest if all is too large."""
        entries = []
        for each in self.path.iterdir():
            with contextlib.suppress(OSError):  # another visitor's sweep was first
                files = [each, *each.rglob("*")]
                sizes = sum(file.stat().st_size for file in files)
                entries.append((max(file.stat().st_mtime for file in files), sizes, each))
        total, now = 0, time.time()
        for changed_at, size, each in sorted(entries, reverse=True):
            total += size
            if now - changed_at > self._kept or total > _MOST_KEPT:
                with contextlib.suppress(OSError):  # as above
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
