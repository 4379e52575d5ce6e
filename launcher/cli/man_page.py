"""The manual page launcher(1), generated from the commands' own parsers.

`python -m launcher.cli.man_page FILE` writes it; a test checks that docs/man/launcher.1 is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.cli.app import command, load
from launcher.cli.commands import SUMMARY, available
from launcher.cli.topics import pages, rows

_FILES = {
    "job.yaml": "The job file: what to train, on what, and how. launcher help job-file lists its keys.",
    "runs/NAME/": "A run: its plan, events, metrics, attempts and checkpoints.",
    "runs/NAME/attempts/NNNN/failure.json": "Why an attempt ended, with the trace.",
    "~/.cache/launcher/": "Tokenised data, unpacked models and measurements of this machine (XDG_CACHE_HOME).",
}
_SEE_ALSO = (
    "launcher help TOPIC shows the guides, keys, exit codes and messages. sbatch(1), squeue(1), torchrun"
)


def page() -> str:
    """Return the page in roff's man macros."""
    root = command()
    lines = [
        f'.TH LAUNCHER 1 "" "launcher {__version__}" "User Commands"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"launcher \\- {_text(SUMMARY).rstrip('.')}",
        ".SH SYNOPSIS",
        ".B launcher",
        "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGS\\fR]...",
        ".SH OPTIONS",
        *_parameters(root, root.make_context("launcher", [], resilient_parsing=True)),
        ".SH COMMANDS",
        *(line for name in available() for line in _command(("launcher", name), load(name))),
        ".SH EXIT STATUS",
        *_definitions({row[0]: row[3] for row in rows(pages()["exit-codes"].text)}),
        ".SH FILES",
        *_definitions(_FILES),
        ".SH SEE ALSO",
        _text(_SEE_ALSO),
    ]
    return "\n".join(lines) + "\n"


def _command(path: tuple[str, ...], of: Any, parent: Any = None) -> list[str]:
    """Return a command's usage, help and parameters; for a group, those of each subcommand."""
    context = of.context_class(of, parent=parent, info_name=path[-1])
    words = _text(" ".join(path))
    lines = [f".SS {words}", _text(_first_line(of.help))]
    if hasattr(of, "commands"):
        return lines + [
            line for name, one in of.commands.items() for line in _command((*path, name), one, context)
        ]
    usage = " ".join(of.collect_usage_pieces(context))
    return [*lines, ".PP", f".B {words}", _text(usage), *_parameters(of, context)]


def _parameters(of: Any, context: Any) -> list[str]:
    """Return the arguments and options of a command; `--help`, which all commands have, only for the root."""
    records = filter(None, (parameter.get_help_record(context) for parameter in of.get_params(context)))
    return _definitions({name: text for name, text in records if name != "--help"})


def _definitions(texts: dict[str, str]) -> list[str]:
    return [line for name, text in texts.items() for line in (".TP", f"\\fB{_text(name)}\\fR", _text(text))]


def _first_line(text: str | None) -> str:
    """Return the first paragraph of a text as one line."""
    return " ".join((text or "").partition("\n\n")[0].split())


def _text(text: str) -> str:
    """Return a text escaped for roff: no part of it is a roff command, and hyphens can be copied."""
    one = re.sub(r"\s+", " ", text).strip().replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{one}" if one[:1] in (".", "'") else one


def main() -> None:
    """Write the page to the file named on the command line."""
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
