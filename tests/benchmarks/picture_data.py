"""The pictures of `launcher data inspect` in the docs: what it shows on a terminal of 80 columns, as SVG.

launcher data inspect JOB --rows 1 --json > seen.json; python tests/benchmarks/picture_data.py seen.json
docs/images/data-NAME.svg "COMMAND"
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from launcher.cli.data_view import show


def main() -> None:
    seen = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # The picture is the same wherever the data lies.
    for entry in [*seen["files"], *seen["examples"], *seen["samples"]]:
        name = "path" if "path" in entry else "file"
        entry[name] = Path(entry[name]).name
    console = Console(
        record=True,
        width=80,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        markup=False,
    )
    show(seen, console, whole=False)
    console.save_svg(sys.argv[2], title=sys.argv[3])


if __name__ == "__main__":
    main()
