"""Secrets that the processes of an attempt share, for meeting each other."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

STORE_VARIABLE = "LAUNCHER_STORE"
"""Set for the ranks of one machine: the file through which they meet."""
SECRET_VARIABLE = "LAUNCHER_SECRET_FILE"
"""Set for the agents and ranks of several nodes: the file with the attempt's secret."""
NAME = "secret"
_NUM_BYTES = 32


def make(directory: Path, secret: str = "") -> Path:
    """Write a secret, or a new one, into an attempt's directory, and give its file.

    It is written whole, for its owner alone whatever the umask says. Raises OSError.
    """
    new = directory / f".{NAME}-{secrets.token_hex(4)}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, 0o600)
        file.write(secret or secrets.token_hex(_NUM_BYTES))
    return new.rename(directory / NAME)


def read(path: Path) -> str:
    """Give the secret in a file. Raises OSError, and ValueError where it is none."""
    secret = path.read_text(encoding="ascii").strip()
    if len(secret) != 2 * _NUM_BYTES:
        raise ValueError(f"{path} is no secret of an attempt")
    return secret
