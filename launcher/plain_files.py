"""Safe reading of files that anybody may have written: plain files only, of bounded size, without a traceback.

A pipe in place of a file would block its reader for ever, a device would never end, and a text of nothing but
brackets would exhaust the interpreter's stack.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_TEXT_BYTES = 64 << 20
"""The size limit of a text file; files that launcher or other tools write are far smaller."""
DEEPEST = 100
"""The most levels of nested sections and lists: copying and writing take up to six calls per level, of the
thousand that Python allows."""
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def plain(path: str, flags: int) -> int:
    """Open a plain file, for `open(..., opener=plain)`, without waiting for the other end of a pipe. Raises
    OSError for anything else."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            check_plain(path, Path(path).stat().st_mode)
        raise
    try:
        check_plain(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_plain(path: str | os.PathLike[str], mode: int) -> None:
    """Raise OSError, which names the kind of file, unless the mode is that of a plain file."""
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        raise OSError(
            errno.EINVAL,
            f"is {_KINDS.get(kind, 'something else')}, where a plain file is needed",
            os.fspath(path),
        )


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST_TEXT_BYTES) -> bytes:
    """Return the content of a plain file. Raises OSError, also if it has more than `most` bytes."""
    with open(path, "rb", opener=plain) as file:
        # read() allocates the requested size, not the size of the file.
        content: bytes = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(content) > most:
        limit = f"{most >> 20} MiB" if most >> 20 else f"{most >> 10} KiB"
        raise OSError(errno.EFBIG, f"is larger than {limit}, which no such file is", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], most: int = LARGEST_TEXT_BYTES) -> str:
    """Return the text of a plain file in UTF-8. Raises OSError, UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8")


def read_json(path: str | os.PathLike[str], most: int = LARGEST_TEXT_BYTES) -> Any:
    """Return the values in a JSON file. Raises OSError, and ValueError if it is not JSON or is nested too
    deeply."""
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """Return the values in a JSON text. Raises ValueError if it is not JSON or is nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    if text.count("[") + text.count("{") > DEEPEST and too_deep(content):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return content


def too_deep(content: Any) -> bool:
    """Return whether sections and lists are nested more than DEEPEST levels deep."""
    level, depth = [content], 0
    while level:
        depth += 1
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if depth > DEEPEST:
            return True
    return False
