"""launcher board: serve the pages of a folder's runs on this machine, live."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.output import open_in_browser, print_json
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.board.pages import Pages
    from launcher.board.server import Server

Runs = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIR]",
        help="Where the runs are; of a sweep, its folder points/. [default: $LAUNCHER_RUNS or runs]",
    ),
]
Port = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="The port on this machine; 0 takes a free one.")
]


Open = Annotated[bool, typer.Option("--open", help="Open it in a browser on this machine.")]


def board(folder: Runs = None, port: Port = 0, open_it: Open = False, as_json: AsJson = False) -> None:
    """Show the runs in a folder in a browser, live, on this machine alone."""
    from launcher.board.pages import Pages
    from launcher.cli.progress import notice
    from launcher.cli.watch import leaving_at_interrupt
    from launcher.errors import ConfigurationError, Problem
    from launcher.planner.prices import known_prices
    from launcher.report.page import check_installed
    from launcher.runs.layout import runs_folder

    folder = folder or runs_folder()
    check_installed("launcher board")
    if not folder.is_dir():
        raise ConfigurationError(Problem("DIR", str(folder), "is no folder; name the one that runs are in"))
    pages = Pages(folder, notice, known_prices())
    with (
        leaving_at_interrupt() as leaving,
        _listening(port, pages) as server,
        contextlib.ExitStack() as until_the_end,
    ):
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _say(server, folder, len(pages.runs()), as_json)
        if open_it:
            private = until_the_end.enter_context(_private_folder())
            hint = "there is no browser here: open the address on a machine that has one"
            if open_in_browser(_door(Path(private), server.address)):
                hint = "if no page opens, open the address above"
            typer.echo(hint, err=True)
        leaving.wait()
        server.shutdown()


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a private folder, if possible outside /tmp: a sandboxed browser may have its own /tmp."""
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = session if os.access(session, os.W_OK | os.X_OK) else None
    return tempfile.TemporaryDirectory(prefix="launcher-board-", dir=parent)


def _door(private: Path, address: str) -> str:
    """Return the address of a page in a private folder that redirects to the board: a browser's arguments
    are visible in the process table, and the board's address contains its token."""
    page = private / "board.html"
    page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">\n', encoding="utf-8")
    return page.as_uri()


def _listening(port: int, pages: Pages) -> Server:
    """Open a server on the port. Raises ConfigurationError if the port is not available."""
    from launcher.board.server import Server
    from launcher.errors import ConfigurationError, Problem

    try:
        return Server(port, pages.answer)
    except OSError as error:
        reason = f"{error.strerror}; --port 0 takes a free one"
        raise ConfigurationError(Problem("--port", port, reason)) from None


def _say(server: Server, folder: Path, num_runs: int, as_json: bool) -> None:
    """Print the board's address, and how a browser on another machine reaches it."""
    import getpass
    import socket

    from launcher.runs.wording import shown

    port = server.server_address[1]
    try:
        user = f"{getpass.getuser()}@"
    except (KeyError, OSError):  # the user has no name
        user = ""
    tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {user}{socket.gethostname()}"
    if as_json:
        print_json(
            {"address": server.address, "tunnel": tunnel, "folder": str(folder.absolute()), "port": port}
        )
        return
    typer.echo(f"{num_runs} run{'s' * (num_runs != 1)} in {shown(folder)}, for a browser on this machine:")
    typer.echo(f"\n  {server.address}\n\nFrom another machine, type there, and open the same address:\n")
    typer.echo(f"  {tunnel}\n\nWho has the address can read all that these runs hold. Ctrl-C ends it.")
