"""launcher help: what a topic says, from the pages that come with launcher."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import Annotated

import typer

from launcher.cli.commands import available
from launcher.cli.topics import Entry, find, names, pages, parts
from launcher.errors import ConfigurationError

_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)#\s]*)[^)]*\)")
_WIDEST = 100
_HOW = """\
A topic is also a key of the job file (`training.optimizer`, or `optimizer`), a section of it (`training`), a
word that may stand in it (`muon`), an environment variable (`LAUNCHER_PRICE`), an exit code (`9`, `rank-lost`),
a term (`micro-batch`), a command, the heading of a page's section, or words of a message that you have seen.
`PAGE PART` looks in one page: `launcher help data packing`.
"""


def complete(incomplete: str) -> list[str]:
    """Return the topics that begin with the typed text."""
    known = {*available(), *names()}
    return sorted(name for name in known if name.startswith(incomplete) and " " not in name)


Topic = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TOPIC",
        help="A page, a key, an exit code, a term or words of a message; none lists the pages.",
        autocompletion=complete,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the topics, or what answers one, as JSON.")]


def help_(topic: Topic = None, as_json: AsJson = False) -> None:
    """Say what a topic is about: a page, a key, an exit code, a message."""
    words = " ".join(topic or ())
    try:
        answers = find(words) if words else []
    except ConfigurationError:
        if words not in available() or as_json:
            raise
        from launcher.cli.app import command

        command().main(args=[words, "--help"], prog_name="launcher", standalone_mode=False)
        return
    if as_json:
        from launcher.cli.output import print_json

        content = [{"kind": entry.kind, "page": entry.page, "text": entry.text} for entry in answers]
        print_json({"answers": content} if words else {"topics": {n: p.summary for n, p in pages().items()}})
        return
    _show(_text(words, answers) if words else _list())


def _list() -> str:
    rows = [f"| `{page.name}` | {page.summary or page.title} |" for page in pages().values()]
    return "\n".join(
        ["`launcher help TOPIC` shows one of these pages:", "", "| | |", "|---|---|", *rows, "", _HOW]
    )


def _text(words: str, answers: list[Entry]) -> str:
    """Return the answers one after another, and where else to look."""
    if answers[0].kind == "page":
        also = [f"launcher help {page} {words}" for page in {part.page: 0 for part in parts(words)}]
    else:
        also = [f"launcher help {page}" for page in {entry.page: 0 for entry in answers}]
    also += [f"launcher {words} --help"] if words in available() else []
    text = "\n".join(entry.text for entry in answers)
    return text + (f"\nSee also: {', '.join(f'`{one}`' for one in also)}\n" if also else "")


def _show(text: str) -> None:
    """Print a text as wide as the terminal, and page it there if it is longer than the screen."""
    from rich.console import Console
    from rich.markdown import Markdown

    size = shutil.get_terminal_size((_WIDEST, 24))
    console = Console(width=min(size.columns, _WIDEST), highlight=False)
    with console.capture() as captured:
        console.print(Markdown(_LINK.sub(_linked, text), hyperlinks=False))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    if sys.stdout.isatty() and len(lines) >= size.lines:
        import pydoc

        os.environ.setdefault("LESS", "-FRX")  # as git does: with colours, without another screen
        pydoc.pager("\n".join(lines))
    else:
        typer.echo("\n".join(lines))


def _linked(link: re.Match[str]) -> str:
    """Return a link as a terminal shows it: its text, and its target if that is a topic."""
    if link[0].startswith("!"):
        return ""
    name = next((name for name, page in pages().items() if page.file.endswith(link[2] or "#")), "")
    return f"{link[1]} (`launcher help {name}`)" if name else link[1]
