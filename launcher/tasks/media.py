"""Files as parts of samples: a sample keeps its file's path, or its original bytes, and a hash of them.

Decoded data is never stored. It is decoded again for each batch, and the hash is compared.
"""

from __future__ import annotations

from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.rows import BAD_VALUE, EMPTY, MISSING, UNREADABLE, RowProblem, is_missing, missing
from launcher.errors import DataError
from launcher.lazy import Lazy
from launcher.plain_files import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import xxhash
else:
    np, xxhash = Lazy("numpy"), Lazy("xxhash")

MOST_BYTES = 1 << 30
"""The most bytes of a file, which is read in one piece."""
_PATH, _BYTES = 0, 1
"""Meanings of a stored file's first byte: whether a path or the file's bytes follow."""


class Content(NamedTuple):
    """A file's bytes, from disk or from a row."""

    name: str
    """For people: the end of its path; empty for bytes in a row."""
    data: bytes

    @property
    def begins(self) -> str:
        """Return the beginning of a message about the file."""
        return f"{self.name}: " if self.name else ""


def named(row: Mapping[str, Any], columns: Sequence[str]) -> str | bytes:
    """Return the path or the bytes in the first of the columns that a row has.

    Raises RowProblem if it has none.
    """
    column = next((column for column in columns if not is_missing(row.get(column))), None)
    if column is None:
        present = next((column for column in columns if column in row), columns[-1])
        raise missing(dict(row), present)
    value = row[column]
    if isinstance(value, bytes) or (isinstance(value, str) and value.strip()):
        return value
    if isinstance(value, str):
        raise RowProblem(EMPTY, f"{column!r} names no file")
    raise RowProblem(BAD_VALUE, f"{column!r} is a {type(value).__name__}, not a path or bytes")


def why_absent(value: str | bytes) -> RowProblem | None:
    """Return why a row's file has no bytes, from its status alone; None if it has some."""
    if isinstance(value, bytes):
        return None if value else RowProblem(EMPTY, "no bytes in it")
    try:
        status = Path(value).stat()
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            return RowProblem(UNREADABLE, f"{value}: {getattr(error, 'strerror', None) or error}")
        return RowProblem(MISSING, f"{value}: no such file; paths are relative to the file that names them")
    if not S_ISREG(status.st_mode):
        return RowProblem(UNREADABLE, f"{value}: is no file")
    return None if status.st_size else RowProblem(EMPTY, f"{value}: no bytes in it")


def content(value: str | bytes) -> Content:
    """Return the bytes of the file that a row names or contains. Raises RowProblem if there are none."""
    if isinstance(value, bytes):
        return _filled(Content("", value))
    name = "/".join(Path(value).parts[-2:])
    try:
        with open(value, "rb", opener=plain) as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RowProblem(MISSING, f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RowProblem(UNREADABLE, f"{name}: {reason}") from None
    if len(data) > MOST_BYTES:
        raise RowProblem(UNREADABLE, f"{name}: more than {MOST_BYTES:,} bytes")
    return _filled(Content(name, data))


def _filled(one: Content) -> Content:
    if not one.data:
        raise RowProblem(EMPTY, f"{one.begins}no bytes in it")
    return one


def stored(value: str | bytes, one: Content) -> dict[str, np.ndarray]:
    """Return the arrays that a sample keeps for a file.

    `media`, uint8 [n]: its path, or its bytes if the row contains them; `media_hash`, uint64 [1]: xxh3 of the
    bytes.
    """
    kind, data = (
        (_BYTES, value) if isinstance(value, bytes) else (_PATH, value.encode(errors="surrogateescape"))
    )
    return {
        "media": np.frombuffer(bytes((kind,)) + data, dtype=np.uint8),
        "media_hash": np.array([xxhash.xxh3_64_intdigest(one.data)], dtype=np.uint64),
    }


def stored_in_order(files: Sequence[tuple[str | bytes, Content]]) -> dict[str, np.ndarray]:
    """Return the arrays that a sample keeps for any number of files.

    `media` and `media_hash` as for one, concatenated; `media_ends`, int64 [files]: where each ends in
    `media`.
    """
    each = [stored(value, one) for value, one in files]
    empty = {"media": np.empty(0, np.uint8), "media_hash": np.empty(0, np.uint64)}
    arrays = {name: np.concatenate([none, *(one[name] for one in each)]) for name, none in empty.items()}
    return arrays | {"media_ends": np.cumsum([len(one["media"]) for one in each], dtype=np.int64)}


def first_files(sample: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Return the arrays of the first `number` files of a sample."""
    ends = sample["media_ends"][:number]
    size = int(ends[-1]) if number else 0
    return {"media": sample["media"][:size], "media_hash": sample["media_hash"][:number], "media_ends": ends}


def contents_in_order(sample: Mapping[str, np.ndarray]) -> list[Content]:
    """Return the bytes of a sample's files. Raises DataError as `stored_content` does."""
    files = np.split(sample["media"], sample["media_ends"])[:-1]
    pairs = zip(files, sample["media_hash"], strict=True)
    return [stored_content({"media": file, "media_hash": digest[None]}) for file, digest in pairs]


def stored_content(sample: Mapping[str, np.ndarray]) -> Content:
    """Return the bytes of a sample's file. Raises DataError if they have changed or cannot be read."""
    whole = sample["media"].tobytes()
    value: str | bytes = whole[1:]
    if whole[0] == _PATH:
        value = whole[1:].decode(errors="surrogateescape")
    try:
        one = content(value)
    except RowProblem as problem:
        raise DataError(
            f"{_place(value)} was read when the data was prepared, and is not now: {problem}"
        ) from None
    if xxhash.xxh3_64_intdigest(one.data) != int(sample["media_hash"][0]):
        reason = "changed since the data was prepared; put it back as it was, or begin a new run"
        raise DataError(f"{_place(value)} {reason}")
    return one


def _place(value: str | bytes) -> str:
    return value if isinstance(value, str) else "a file in the rows"
