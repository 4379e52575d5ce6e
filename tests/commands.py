"""Run a command of launcher in this process.

For tests in which the process is not the point: a new one spends seconds on imports.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path

from launcher.cli.main import main


def launcher(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it and return its exit code and what it printed. `folder`: where it is called, if not here."""
    words = [str(argument) for argument in arguments]
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(errors))
        if folder is not None:
            stack.enter_context(contextlib.chdir(folder))
        try:
            main(words)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    printed = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, code, *printed)
