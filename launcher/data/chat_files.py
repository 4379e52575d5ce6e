"""Columns of chats with images: image files are named in parts of the messages, or in a separate list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.data.folder import PlacedColumn, placed
from launcher.data.rows import IfThere, is_missing
from launcher.data.written import list_in

_SOURCES = ("image", "path", "url", "bytes", "image_url")
"""The keys under which transformers and OpenAI store the file of an image part."""


def is_image(part: Any) -> bool:
    """Return whether a part of a message is an image."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url", "input_image")


def image_of(part: dict[str, Any]) -> Any:
    """Return the image that a part of a message names: a path, bytes, or a struct of both.

    None if it names none: then the next image of the separate list is meant.
    """
    value = next((part[key] for key in _SOURCES if not is_missing(part.get(key))), None)
    return value.get("url") if isinstance(value, dict) and "url" in value else value


def listed(value: Any) -> Any:
    """Return a list unchanged, or parse the list that a text contains; any other value unchanged."""
    return listed_in if isinstance(value, str) and (listed_in := list_in(value)) is not None else value


class ListedFiles(PlacedColumn, IfThere):
    """The name of a column with one file or a list of files, read if a source has it."""

    def placed(self, value: Any, folder: Path) -> Any:
        """Return the list with full paths."""
        value = listed(value)
        return [placed(one, folder) for one in value] if isinstance(value, list) else placed(value, folder)

    def paths(self, value: Any) -> Iterator[str]:
        """Yield the paths in a list returned by `placed`."""
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


class FilesInMessages(PlacedColumn):
    """The name of a column of messages, whose parts may name images."""

    def placed(self, value: Any, folder: Path) -> Any:
        """Return the messages with full paths, each under the key `image` of its part."""
        messages = listed(value)
        if not isinstance(messages, list):
            return value
        return [_message(one, folder) for one in messages]

    def paths(self, value: Any) -> Iterator[str]:
        """Yield the paths in messages returned by `placed`."""
        for message in value if isinstance(value, list) else []:
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else []:
                if is_image(part) and isinstance(path := image_of(part), str):
                    yield path


def _message(message: Any, folder: Path) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not any(map(is_image, content)):
        return message
    return {**message, "content": [_part(part, folder) if is_image(part) else part for part in content]}


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    value = image_of(part)
    return {"type": "image"} | ({} if value is None else {"image": placed(value, folder)})
