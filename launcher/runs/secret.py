"""The secret that the processes of an attempt share for their rendezvous."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

STORE_VARIABLE = "LAUNCHER_STORE"
"""The variable, for the ranks of one machine, with the file through which they meet."""
SECRET_VARIABLE = "LAUNCHER_SECRET_FILE"
"""The variable, for the agents and ranks of several nodes, with the file of the attempt's secret."""
NAME = "secret"
_NUM_BYTES = 32


def make(directory: Path, secret: str = "") -> Path:
    """Write a secret (by default a new one) into an attempt's directory, and return its file.

    The file appears complete, and readable only by its owner whatever the umask. Raises OSError.
    """
    new = directory / f".{NAME}-{secrets.token_hex(4)}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, 0o600)
        file.write(secret or secrets.token_hex(_NUM_BYTES))
    return new.rename(directory / NAME)


def read(path: Path) -> str:
    """Return the secret in a file. Raises OSError, and ValueError if the file does not hold one."""
    secret = path.read_text(encoding="ascii").strip()
    if len(secret) != 2 * _NUM_BYTES:
        raise ValueError(f"{path} is no secret of an attempt")
    return secret
