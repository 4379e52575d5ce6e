"""The picture of `launcher watch` in the docs: what it shows of a run on disk, as SVG.

python tests/benchmarks/picture_watch.py RUN docs/images/watch.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from launcher.cli.watch import screen
from launcher.cli.watch_state import Watched
from launcher.runs.layout import RunDirectory


def main() -> None:
    run, target = Path(sys.argv[1]), Path(sys.argv[2])
    console = Console(record=True, width=110, height=34, file=io.StringIO(), force_terminal=True)
    console.print(screen(Watched(RunDirectory(run)).look(ask=False), console.width), height=34)
    console.save_svg(str(target), title="launcher watch")


if __name__ == "__main__":
    main()
