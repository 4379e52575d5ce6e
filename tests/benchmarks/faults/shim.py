"""The orders of shim.c, which is compiled where a C compiler is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
_BYTES = 4096


def missing() -> str | None:
    """Why there can be no shim here; None where there can."""
    return None if shutil.which("gcc") else "gcc is not installed"


class Shim:
    """One file of orders, for all processes that are started with `variables`."""

    def __init__(self, folder: Path) -> None:
        self._library, self._control = folder / "shim.so", folder / "shim.control"
        self.order()

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of a process needs. Compiles the library where it is not there yet."""
        if not self._library.exists():
            subprocess.run(
                ["gcc", "-O2", "-shared", "-fPIC", "-o", self._library, _SOURCE, "-ldl"], check=True
            )
        return {"LD_PRELOAD": str(self._library), "SHIM_CONTROL": str(self._control)}

    def order(self, *lines: str) -> None:
        """From now on these hold, and no others."""
        text = "".join(f"{line}\n" for line in lines).encode()
        if len(text) >= _BYTES:
            raise ValueError("too many orders")
        # In place: the processes have this very file mapped.
        descriptor = os.open(self._control, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(descriptor, text.ljust(_BYTES, b"\0"), 0)
        os.close(descriptor)
