"""The tab on which a picture is put into words."""

from collections.abc import Iterator
from typing import Any

from cogview2_jax.page import tools
from cogview2_jax.page.desk import Desk
from cogview2_jax.page.limits import Refused
from cogview2_jax.page.words import say
from cogview2_jax.pipeline.settings import LANGUAGES

_NAMES = {"en": "English 英文", "zh": "中文 Chinese"}


def add(desk: Desk, t: Any) -> None:
    """Add the tab's components and what they do."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=300):
            upload = gr.UploadButton(t("upload"), elem_id="caption-upload")
            shown = gr.Image(
                format="png",
                interactive=False,
                show_label=False,
                height=320,
                buttons=["fullscreen"],
                elem_id="caption-picture",
            )
        with gr.Column(min_width=300):
            language = gr.Radio(
                [(_NAMES[each], each) for each in LANGUAGES],
                value=LANGUAGES[0],
                label=t("caption_language"),
                elem_id="caption-language",
            )
            with gr.Row():
                read = gr.Button(t("caption"), variant="primary", min_width=120, elem_id="read")
                cancel = gr.Button(t("cancel"), min_width=120)
            state = gr.HTML(tools.status(), elem_id="caption-state")
            words = gr.Textbox(
                label=t("its_caption"),
                interactive=False,
                lines=2,
                buttons=["copy"],
                elem_id="words",
            )
    file = gr.State(None)
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    upload.upload(_uploader(desk), upload, [file, shown, words], concurrency_id="model", **quiet)
    reading = read.click(
        _reader(desk), [file, language], [state, words], concurrency_id="model", **quiet
    )
    cancel.click(tools.canceller(), None, state, cancels=[reading], queue=False, **quiet)


def _uploader(desk: Desk) -> Any:
    import gradio as gr

    def upload(file: str | None, request: gr.Request) -> tuple[Any, Any, str]:
        with tools.telling(tools.language(request)):
            opened = desk.picture(file).copy()
        opened.thumbnail((1024, 1024))
        return file, opened, ""

    return upload


def _reader(desk: Desk) -> Any:
    import gradio as gr

    def read(file: str | None, language: str, request: gr.Request) -> Iterator[tuple[str, Any]]:
        spoken = tools.language(request)
        with tools.telling(spoken):
            desk.picture(file)
        yield tools.status(say("captioning", spoken), 0.1), ""
        with tools.telling(spoken):
            try:
                said = desk.caption(file, language)
            except Refused as error:
                yield tools.status(tools.explain(error, spoken)), ""
                raise
        yield tools.status(), said

    return read
