"""The page in a real browser, with its server as a user starts it, on the tiny model."""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from cogview2_jax.page import records

pytest.importorskip("gradio", exc_type=ImportError)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]

TEXT, OTHER = "a small green star", "左边的绿色星形"
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
PATIENCE = 60_000  # milliseconds: the machine may be busy
MOST_GROWTH = 700 << 20  # bytes of the server over all of this


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    """Address and process of a server with a temporary folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place, cache = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-m", "cogview2_jax.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--bundle", str(tiny_folder)],
        env=os.environ | {"TMPDIR": str(place), "JAX_COMPILATION_CACHE_DIR": str(cache)},
        cwd=place,
        stdout=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    # What it has compiled is not compiled again for the expected pictures.
    jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        assert process.stdout is not None and address in process.stdout.readline()
        yield address, process
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert "Traceback" not in said
    assert not list(place.rglob("*.png"))  # the temporary folder is gone


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=OPTIONS, timeout=PATIENCE, headless=True
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server):
    """A function that opens the page as a new visitor. No visit asks any other host."""
    outside: list[str] = []

    def new(**options):
        context = browser.new_context(**options)
        stack.callback(context.close)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on(
            "request",
            lambda asked: (
                None
                if asked.url.startswith((server[0], "data:", "blob:"))
                else outside.append(asked.url)
            ),
        )
        page.goto(server[0])
        page.wait_for_selector("#draw")
        return page

    with contextlib.ExitStack() as stack:
        yield new
    assert not outside
    assert server[1].poll() is None


def wait_for(page, selector: str, words: str) -> None:
    try:
        page.wait_for_function(
            "([selector, words]) => document.querySelector(selector).innerText.includes(words)",
            arg=[selector, words],
        )
    except playwright.TimeoutError:
        raise AssertionError(
            f"{selector} says {page.inner_text(selector)!r}, not {words!r}"
        ) from None


def draw(page, prompt: str, wait: bool = True) -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#draw")
    if wait:
        wait_for(page, "#state", "Done in")


def downloaded(page, button: str) -> tuple[dict, np.ndarray]:
    """The settings and the pictures of a download."""
    with page.expect_download() as caught:
        page.click(button)
    content = Path(caught.value.path()).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = sorted(name for name in archive.namelist() if name[:-4].isdigit())
        for name in archive.namelist():  # how each picture came to be, and how sure the model was
            if name.startswith("inside/"):
                with Image.open(io.BytesIO(archive.read(name))) as opened:
                    if name.endswith("_making.webp"):
                        assert opened.n_frames > 8 and opened.size == (96, 96)
                    else:
                        assert name.endswith("_confidence.png") and opened.size == (3 * 96, 96)
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
        (folder := Path(caught.value.path()).with_suffix(".read")).write_bytes(
            archive.read(records.FILE)
        )
    return records.read(folder), np.stack(pictures)


def choose(page, name: str, file: Path) -> None:
    """Upload with a button, as the browser's dialog does."""
    with page.expect_file_chooser() as chooser:
        page.click(name)
    chooser.value.set_files(file)


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def settled(page, area) -> dict[str, float]:
    """Where a part of the page is, once the page has stopped moving."""
    area.scroll_into_view_if_needed()
    place, before = area.bounding_box(), None
    while place != before:
        page.wait_for_timeout(300)
        place, before = area.bounding_box(), place
    return place


def toast(page) -> str:
    """The message that appeared, which is then closed."""
    shown = page.get_by_test_id("toast-body").first
    shown.wait_for()
    said = shown.inner_text()
    page.get_by_test_id("toast-close").first.click()
    shown.wait_for(state="detached")
    return said


def memory(process: subprocess.Popen) -> int:
    """Resident bytes of a process, 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    return 0


def test_a_visit(visit, tiny_folder, tmp_path):
    """Generate, download, load settings, edit a drawn box, caption: all as in Python."""
    page, cv = visit(locale="en-US"), cogview2_jax.load(tiny_folder)
    draw(page, TEXT)
    settings, pictures = downloaded(page, "#download")
    assert (settings["prompt"], settings["seed"], settings["num_images"]) == (TEXT, 0, 4)
    expected = cv.generate(TEXT, 4, key=jax.random.key(0), candidates=settings["candidates"])
    np.testing.assert_array_equal(pictures, expected)

    page.click("#making button")
    page.wait_for_function("document.querySelector('#animation img')?.naturalWidth == 96")
    page.wait_for_function("document.querySelector('#confidence img')?.naturalWidth == 288")

    page.click("#best")
    wait_for(page, "#state", "Best first")
    order = cv.rank(TEXT, list(expected))[0]
    np.testing.assert_array_equal(downloaded(page, "#download")[1], expected[order])

    page.click("#edit-this")
    area = page.locator("#part canvas")
    area.wait_for(state="visible")
    page.wait_for_function("document.querySelector('#part canvas').width == 96")
    place = settled(page, area)
    page.mouse.move(place["x"] + 1, place["y"] + 1)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] - 1, place["y"] + place["height"] / 2, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Seed and number").click()
    page.locator("#edit-images input").first.fill("4")
    page.fill("#edit-prompt textarea", OTHER)
    page.click("#redraw")
    wait_for(page, "#edit-state", "Done in")
    _, edited = downloaded(page, "#edit-download")
    before = expected[order[0]]
    np.testing.assert_array_equal(
        edited, cv.edit(OTHER, before, box=(0, 0, 0.5, 1), num_images=4, key=jax.random.key(0))
    )
    np.testing.assert_array_equal(edited[0][48:], before[48:])

    tab(page, "Caption")
    Image.fromarray(before).save(tmp_path / "before.png")
    choose(page, "#caption-upload", tmp_path / "before.png")
    page.wait_for_selector("#caption-picture img")
    page.click("#read")
    page.wait_for_function("document.querySelector('#words textarea').value != ''")
    assert page.input_value("#words textarea") == cv.caption(before)


def test_settings_are_loaded(visit, tmp_path):
    page = visit(locale="zh-CN", viewport={"width": 390, "height": 844})
    assert page.get_by_role("tab", name="编辑").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    settings = {"prompt": OTHER, "seed": 9, "num_images": 3, "candidates": 2}
    (tmp_path / "a.png").write_bytes(records.png(np.zeros((8, 8, 3), np.uint8), settings))
    choose(page, "#load", tmp_path / "a.png")
    wait_for(page, "#state", "设置已载入")
    assert page.input_value("#prompt textarea") == OTHER
    assert page.locator("#images input").first.input_value() == "3"


def test_what_cannot_be_used(visit, server, tmp_path):
    """Each ends in a clear message, and the server's memory stays bounded."""
    page, before = visit(locale="en-US"), memory(server[1])
    draw(page, "a star " * 1429, wait=False)
    assert "10,002 characters: at most 1,000" in toast(page)
    draw(page, "a zebra", wait=False)
    assert "zebra" in toast(page)
    Image.new("RGB", (10_000, 5_000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("Edit", "Caption"):
        tab(page, name)
        choose(page, f"#{name.lower()}-upload", tmp_path / "large.png")
        assert "50,000,000 pixels, more than 16,000,000" in toast(page)
        choose(page, f"#{name.lower()}-upload", tmp_path / "text.png")
        assert "not a picture" in toast(page)
    page.click("#read")
    assert "Choose a picture first" in toast(page)
    tab(page, "Edit")
    page.fill("#edit-prompt textarea", TEXT)
    page.click("#redraw")
    assert "Choose a picture first" in toast(page)
    assert memory(server[1]) - before < MOST_GROWTH


def test_cancelling_and_leaving(visit, server):
    """Whoever cancels, or closes the browser, leaves the model to the others."""
    page, leaver = visit(locale="en-US"), visit(locale="en-US")
    for each in (page, leaver):
        each.click("#more button")
        for name, most in (("candidates", "16"), ("images", "8")):  # seconds of work
            each.locator(f"#{name} input").first.fill(most)
            each.locator(f"#{name} input").first.press("Tab")
        draw(each, TEXT, wait=False)
        wait_for(each, "#state", "Drawing")
        if each is page:
            page.click("#cancel")
            wait_for(page, "#state", "Cancelled")
    leaver.context.close()
    page.locator("#candidates input").first.fill("1")
    page.locator("#candidates input").first.press("Tab")
    assert page.inner_text("#state") == "Cancelled"
    draw(page, OTHER)
    assert downloaded(page, "#download")[0]["candidates"] == 1


def test_two_visitors_at_once(visit):
    one, two = visit(locale="en-US"), visit(locale="en-US")
    draw(one, TEXT, wait=False)
    draw(two, OTHER, wait=False)
    for page, prompt in ((one, TEXT), (two, OTHER)):
        wait_for(page, "#state", "Done in")
        assert downloaded(page, "#download")[0]["prompt"] == prompt


def test_the_server_is_alive_and_bounded(server):
    address, process = server
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert answer.status == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    time.sleep(0.1)
    assert memory(process) < 2 << 30
