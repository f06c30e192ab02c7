"""The tab on which a part of a picture is redrawn."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogview2_jax.page import records, tools
from cogview2_jax.page.desk import Desk
from cogview2_jax.page.generate_tab import GenerateTab
from cogview2_jax.page.limits import Refused
from cogview2_jax.page.words import say

_TOOLS = [("□ box 方框", "box"), ("✎ brush 画笔", "brush")]


def add(desk: Desk, folder: tools.Folder, t: Any, tabs: Any, generated: GenerateTab) -> None:
    """Add the tab's components and what they do; the generated pictures can be edited here."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=300):
            upload = gr.UploadButton(t("upload"), elem_id="edit-upload")
            tool = gr.Radio(_TOOLS, value="box", label=t("tool"), elem_id="tool")
            area = tools.drawing_area()
            clear = gr.Button(t("erase"), size="sm", elem_id="clear")
            numbers = gr.Textbox(label=t("numbers"), info=t("numbers_info"), elem_id="numbers")
        with gr.Column(min_width=300):
            prompt = gr.Textbox(label=t("edit_prompt"), lines=2, elem_id="edit-prompt")
            with gr.Row():
                redraw = gr.Button(t("edit"), variant="primary", min_width=120, elem_id="redraw")
                cancel = gr.Button(t("cancel"), min_width=120, elem_id="edit-cancel")
            with gr.Accordion(t("more_of_edit"), open=False):
                seed = gr.Number(0, label=t("seed"), precision=0)
                images = gr.Slider(
                    1, desk.limits.images, 2, step=1, label=t("images"), elem_id="edit-images"
                )
            state = gr.HTML(tools.status(), elem_id="edit-state")
            results = tools.gallery(t("results"), "results")
            compare = gr.ImageSlider(
                label=t("compare"),
                format="png",
                interactive=False,
                elem_id="compare",
                max_height=512,
                buttons=["fullscreen"],
            )
            download = gr.DownloadButton(t("download"), interactive=False, elem_id="edit-download")
    file, before = gr.State(None), gr.State(None)

    opened = [file, area]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    upload.upload(_uploader(desk), [upload, tool], opened, concurrency_id="model", **quiet)
    generated.edit.click(
        _taker(desk),
        [generated.pictures, generated.chosen, tool],
        [*opened, tabs],
        **quiet,
    )
    tool.change(lambda area, tool: tools.changed(area, tool=tool), [area, tool], area, **quiet)
    clear.click(lambda area: tools.changed(area, box=None, strokes=[]), area, area, **quiet)
    editing = redraw.click(
        _editor(desk, folder),
        [prompt, file, area, numbers, seed, images],
        [state, results, compare, download, before],
        concurrency_id="model",
        trigger_mode="once",
        **quiet,
    )
    cancel.click(tools.canceller(), None, state, cancels=[editing], queue=False, **quiet)
    results.select(_comparer(), [results, before], compare, **quiet)


def _uploader(desk: Desk) -> Any:
    import gradio as gr

    def upload(file: str | None, tool: str, request: gr.Request) -> tuple[Any, Any]:
        spoken = tools.language(request)
        with tools.telling(spoken):
            return file, tools.marks(desk.picture(file), tool, say("draw", spoken))

    return upload


def _taker(desk: Desk) -> Any:
    import gradio as gr

    def take(shown: Any, chosen: int, tool: str, request: gr.Request) -> tuple[Any, Any, Any]:
        spoken = tools.language(request)
        with tools.telling(spoken):
            if not shown:
                raise Refused("no_pictures")
            file = shown[min(chosen, len(shown) - 1)][0]
            value = tools.marks(desk.picture(file), tool, say("draw", spoken))
        return file, value, gr.Tabs(selected="edit")

    return take


def _editor(desk: Desk, folder: tools.Folder) -> Any:
    import gradio as gr

    def redraw(
        prompt: str,
        file: str | None,
        area: str | None,
        numbers: str,
        seed: Any,
        images: Any,
        request: gr.Request,
    ) -> Iterator[Any]:
        spoken, begin = tools.language(request), time.perf_counter()
        yield tools.status(say("editing", spoken), 0.1), *[gr.skip()] * 4
        with tools.telling(spoken):
            try:
                opened, made = desk.edit(prompt, file, area, numbers, seed, images)
            except Refused as error:
                yield tools.status(tools.explain(error, spoken)), *[gr.skip()] * 4
                raise
        settings = {"prompt": prompt.strip(), "seed": int(seed), "num_images": len(made)}
        before = folder.write("before.png", records.png(opened, {}))
        files = [folder.write("edited.png", records.png(one, settings)) for one in made]
        words = say("done", spoken, seconds=time.perf_counter() - begin)
        content = records.archive([Path(each) for each in files], settings)
        found = gr.DownloadButton(value=folder.write("cogview2.zip", content), interactive=True)
        yield tools.status(words), files, (before, files[0]), found, before

    return redraw


def _comparer() -> Any:
    import gradio as gr

    def compare(shown: Any, before: str | None, event: gr.SelectData) -> Any:
        return (before, shown[event.index][0]) if before and shown else gr.skip()

    return compare
