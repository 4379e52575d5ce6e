"""Programs that say what a test has them say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Makes programs of given names, which are the only ones besides the shell's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{script}\n")
            (folder / name).chmod(0o755)

    return make
