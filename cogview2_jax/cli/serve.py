"""`cogview2 serve`: the web page."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from pathlib import Path

import click

from cogview2_jax.cli import common


@click.command(
    "serve",
    epilog="""\b
Examples:
  cogview2 serve
  cogview2 serve --port 8000 --bundle model
""",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at. 0.0.0.0 lets other machines in: there is no password.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, metavar="N")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for uploads and pictures; files older than an hour are removed from it. It must be"
    " empty or new.  [default: a temporary one, removed at the end]",
)
@common.dtype_option
@common.bundle_option
def serve_command(
    host: str, port: int, folder: Path | None, dtype: str, bundle: Path | None
) -> None:
    """Open a local web page to generate, edit and caption on.

    It listens to this machine alone unless --host says otherwise, and asks no other host for
    anything. Visitors wait in one queue. Ctrl-C ends it.
    """
    common.require_module("gradio", "page")
    model = common.check_model(bundle)
    _check_port(host, port)
    if folder is not None:
        common.check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise click.ClickException(f"{folder} is not empty: give another --folder")
    with contextlib.ExitStack() as stack:
        place = folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="cogview2_page_"))
        )
        from cogview2_jax import bundle as bundles
        from cogview2_jax.page import app
        from cogview2_jax.page.desk import Desk

        app.prepare(place.absolute(), host)
        with common.refusing():
            networks = bundles.networks_in(model)
            cv, _ = common.load(model, networks, dtype)
            page = app.launch(Desk(cv), place.absolute(), host, port)
        click.echo(f"http://{host}:{port} shows the page; Ctrl-C ends it")
        try:
            page.block_thread()
        finally:
            page.close()


def _check_port(host: str, port: int) -> None:
    """Raises ClickException unless a server can listen there."""
    if ":" in host:
        raise click.ClickException(f"the page has no IPv6 address: give another --host than {host}")
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:1]:
            with socket.socket(family) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a name"
        raise click.ClickException(
            f"cannot listen at {host}:{port} ({why}): give another --port or --host"
        ) from error
