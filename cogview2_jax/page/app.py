"""The page put together, and its server."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from cogview2_jax.page import caption_tab, edit_tab, generate_tab, tools, words
from cogview2_jax.page.desk import Desk

# The browser is to ask this server alone: no fonts, scripts or counters from elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self' ws: wss: data: blob:; worker-src 'self' blob:; object-src 'none'"
)


def prepare(folder: Path, host: str) -> None:
    """Tell Gradio, before it is imported, to write into `folder` and to send nothing anywhere: when
    it asks its own server at `host` whether it is there, no proxy either.
    """
    for name in ("NO_PROXY", "no_proxy"):
        others = os.environ.get(name)
        os.environ[name] = ",".join(filter(None, [others, host, "127.0.0.1", "localhost"]))
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_MCP_SERVER": "False",
        "GRADIO_NODE_SERVER_NAME": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    logging.getLogger("httpx").setLevel(logging.WARNING)


def build(desk: Desk, folder: tools.Folder) -> tuple[Any, Any]:
    """The page, and its words in all languages."""
    import gradio as gr

    chinese = words.table("zh")
    visits = tools.Visits()
    spoken = gr.I18n(en=words.table("en"), zh=chinese, **{"zh-CN": chinese, "zh-TW": chinese})
    with gr.Blocks(title="CogView2", analytics_enabled=False) as page:
        gr.Markdown("# CogView2")
        gr.Markdown(spoken("title"))
        with gr.Tabs(selected="generate") as tabs:
            with gr.Tab(spoken("generate"), id="generate", elem_id="tab-generate"):
                generated = generate_tab.add(desk, folder, visits, spoken)
            with gr.Tab(spoken("edit"), id="edit", elem_id="tab-edit"):
                edit_tab.add(desk, folder, spoken, tabs, generated)
            with gr.Tab(spoken("caption"), id="caption", elem_id="tab-caption"):
                caption_tab.add(desk, spoken)

        def leave(request: gr.Request) -> None:
            visits.end(request)

        page.unload(leave)
    page.queue(max_size=desk.limits.waiting, default_concurrency_limit=1, api_open=False)
    return page, spoken


def launch(desk: Desk, path: Path, host: str, port: int) -> Any:
    """Serve the page on `host` and `port`; `path` is the one folder that it writes to.

    Returns the page at once; `close()` ends it. Raises OSError for a port in use.
    """
    import gradio as gr

    folder = tools.Folder(path, desk.limits.kept_seconds)
    page, spoken = build(desk, folder)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=desk.limits.file_bytes,
        state_session_capacity=100,
        prevent_thread_lock=True,
        i18n=spoken,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=[tools.HERE / "page.css"],
        app_kwargs={"middleware": _middleware(folder), "docs_url": None, "redoc_url": None},
    )
    return page


def _middleware(folder: tools.Folder) -> list[Any]:
    from starlette.middleware import Middleware

    return [Middleware(_Policy), Middleware(_Sweeping, folder=folder)]


class _Sweeping:
    """Removes old files before another one is uploaded."""

    def __init__(self, app: Any, folder: tools.Folder) -> None:
        self._app, self._folder = app, folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/upload"):
            await asyncio.to_thread(self._folder.sweep)
        await self._app(scope, receive, send)


class _Policy:
    """Adds the policy to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self._app(scope, receive, with_policy)
