"""The tab on which pictures are drawn."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cogview2_jax.page import records, tools
from cogview2_jax.page.desk import MOST_SEED, Desk
from cogview2_jax.page.limits import Refused
from cogview2_jax.page.words import say

_SHARE = {
    "candidate": 0.3,
    "base": 0.5,
    "direct": 0.6,
}  # of the time, about, that is over after a step


# The files of a picture's animation, and of how sure the model was.
Inside = tuple[str, str]


class GenerateTab(NamedTuple):
    """What other tabs need of this one."""

    pictures: Any  # the gallery
    chosen: Any  # the number of the picture that is chosen
    edit: Any  # the button to edit it


def add(desk: Desk, folder: tools.Folder, visits: tools.Visits, t: Any) -> GenerateTab:
    """Add the tab's components and what they do. `t` is name → words in the browser's language."""
    import gradio as gr

    limits = desk.limits
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label=t("prompt"), lines=2, elem_id="prompt", autofocus=True)
            with gr.Row():
                draw = gr.Button(t("generate"), variant="primary", min_width=120, elem_id="draw")
                cancel = gr.Button(t("cancel"), min_width=120, elem_id="cancel")
            images = gr.Slider(1, limits.images, 4, step=1, label=t("images"), elem_id="images")
            styles = desk.styles()
            style = gr.Dropdown(
                styles, value=styles[0], label=t("style"), visible=len(styles) > 1, elem_id="style"
            )
            with gr.Accordion(t("more"), open=False, elem_id="more"):
                seed = gr.Number(
                    0, label=t("seed"), info=t("seed_info"), precision=0, elem_id="seed"
                )
                candidates = gr.Slider(
                    *(1, limits.candidates, desk.cv.bundle.sampling.candidates),
                    step=1,
                    label=t("candidates"),
                    info=t("candidates_info"),
                    elem_id="candidates",
                )
            load = gr.UploadButton(t("load"), size="sm", elem_id="load")
        with gr.Column(scale=3, min_width=300):
            state = gr.HTML(tools.status(), elem_id="state")
            pictures = tools.gallery(t("pictures"), "pictures")
            with gr.Row():
                best = gr.Button(t("best"), min_width=120, elem_id="best")
                edit = gr.Button(t("edit_this"), min_width=120, elem_id="edit-this")
                download = gr.DownloadButton(
                    t("download"), interactive=False, min_width=120, elem_id="download"
                )
            with gr.Accordion(t("making"), open=False, elem_id="making"):
                shown_making = tools.look_inside(t("making"), "animation")
                shown_sure = tools.look_inside(t("confidence"), "confidence")
    chosen, settings, insides = gr.State(0), gr.State({}), gr.State([])
    inside = [shown_making, shown_sure]

    asked = [prompt, seed, images, candidates, style]
    shown = [pictures, state, settings, download, chosen, insides, *inside]
    ticket = gr.State(0)
    # Outside the queue, so that whoever waits in it can cancel too.
    gr.on(
        [draw.click, prompt.submit],
        _begin(visits),
        None,
        ticket,
        show_progress="hidden",
        queue=False,
        trigger_mode="once",
    ).then(
        _drawer(desk, folder, visits),
        [*asked, ticket],
        shown,
        show_progress="hidden",
        concurrency_id="model",
    )
    cancel.click(tools.canceller(visits), None, state, queue=False, show_progress="hidden")
    best.click(
        _ranker(desk, folder),
        [prompt, pictures, settings, insides],
        [pictures, state, download, chosen, insides, *inside],
        concurrency_id="model",
    )
    load.upload(_loader(desk), load, [*asked, state], show_progress="hidden")
    pictures.select(_chooser(), insides, [chosen, *inside], queue=False, show_progress="hidden")
    return GenerateTab(pictures, chosen, edit)


def _begin(visits: tools.Visits) -> Any:
    import gradio as gr

    def begin(request: gr.Request) -> int:
        return visits.ended(request)

    return begin


def _drawer(desk: Desk, folder: tools.Folder, visits: tools.Visits) -> Any:
    import gradio as gr

    def draw(
        prompt: str,
        seed: Any,
        images: Any,
        candidates: Any,
        style: Any,
        ended: int,
        request: gr.Request,
    ) -> Iterator[Any]:
        spoken, begin, number = tools.language(request), time.perf_counter(), 0
        kept = [gr.skip()] * 6
        cancelled = gr.skip(), tools.status(say("cancelled", spoken)), *kept
        if visits.ended(request) != ended:
            yield cancelled
            return
        yield gr.skip(), tools.status(say("working", spoken), 0.02), *kept
        made: list[Image.Image] = []
        steps: list[Any] = []
        settings = {
            "prompt": prompt.strip() if isinstance(prompt, str) else "",
            "seed": seed,
            "num_images": images,
            "candidates": candidates,
            "stage": desk.stage,
            "style": style,
        }
        with tools.telling(spoken):
            try:
                for step, each in desk.generate(prompt, seed, images, candidates, style):
                    if visits.ended(request) != ended:
                        yield cancelled
                        return
                    if step == "confidence":
                        sure = [Image.fromarray(one) for one in each]
                        break
                    number += step == "round"
                    share = _SHARE.get(step, 0.6 + 0.4 * number / desk.rounds)
                    words = say(step, spoken, number=number, rounds=desk.rounds)
                    made = [Image.fromarray(one) for one in each]
                    # Nothing of the pictures before goes with these, should they be the last.
                    empty: Any = settings, gr.DownloadButton(interactive=False), 0, [], None, None
                    yield made, tools.status(words, share), *(kept if steps else empty)
                    steps.append((step, each))
            except Refused as error:
                yield gr.skip(), tools.status(tools.explain(error, spoken)), *kept
                raise
        settings |= {"seed": int(seed), "num_images": int(images), "candidates": int(candidates)}
        files = [folder.write("picture.png", records.png(one, settings)) for one in made]
        how = [
            (
                folder.write("making.webp", one),
                folder.write("confidence.png", records.png(map_, {})),
            )
            for one, map_ in zip(desk.animations(steps), sure, strict=True)
        ]
        words = say("done", spoken, seconds=time.perf_counter() - begin)
        found = _archive(folder, files, settings, how)
        yield files, tools.status(words), settings, found, 0, how, *how[0]

    return draw


def _archive(
    folder: tools.Folder, files: list[str], settings: dict[str, Any], insides: list[Inside]
) -> Any:
    """The button that downloads the pictures, how they came to be, and settings."""
    import gradio as gr

    content = records.archive(
        [Path(file) for file in files], settings, [tuple(map(Path, one)) for one in insides]
    )
    return gr.DownloadButton(value=folder.write("cogview2.zip", content), interactive=True)


def _ranker(desk: Desk, folder: tools.Folder) -> Any:
    import gradio as gr

    def best(
        prompt: str,
        shown: Any,
        settings: dict[str, Any],
        insides: list[Inside],
        request: gr.Request,
    ) -> tuple[Any, ...]:
        spoken = tools.language(request)
        files = [file for file, _ in shown or []]
        with tools.telling(spoken):
            ranked = desk.best(settings.get("prompt") or prompt, files)
        ordered = [(files[number], f"{score:.3f}") for number, score in ranked]
        said = tools.status(say("ranked", spoken))
        if not insides:  # of pictures that were not finished
            return ordered, said, gr.skip(), 0, [], None, None
        how = [insides[number] for number, _ in ranked]
        found = _archive(folder, [file for file, _ in ordered], settings, how)
        return ordered, said, found, 0, how, *how[0]

    return best


def _loader(desk: Desk) -> Any:
    import gradio as gr

    def load(file: str | None, request: gr.Request) -> tuple[Any, ...]:
        spoken, limits = tools.language(request), desk.limits
        with tools.telling(spoken):
            if not file:
                raise Refused("no_settings")
            found = records.read(Path(file))
        chosen = [
            min(max(value, low), high) if isinstance(value, int) else gr.skip()
            for value, low, high in (
                (found.get("seed"), 0, MOST_SEED),
                (found.get("num_images"), 1, limits.images),
                (found.get("candidates"), 1, limits.candidates),
            )
        ]
        text, style = found["prompt"][: limits.characters], found.get("style")
        chosen.append(style if style in desk.styles() else gr.skip())
        return text, *chosen, tools.status(say("loaded", spoken))

    return load


def _chooser() -> Any:
    import gradio as gr

    def choose(insides: list[Inside], event: gr.SelectData) -> tuple[Any, ...]:
        number = int(event.index)
        return number, *(insides[number] if number < len(insides) else [gr.skip()] * 2)

    return choose
