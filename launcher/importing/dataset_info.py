"""LLaMA-Factory's dataset_info.json: the place of a data set's rows, and the meaning of their columns.

Read from version 0.9.6 (src/llamafactory/data/parser.py, converter.py, processor/pretrain.py).
"""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePath
from typing import Any

from launcher.importing import mixture
from launcher.importing.mixture import DataSet
from launcher.importing.reading import Reading, brief
from launcher.plain_files import read_json

NAME = "dataset_info.json"
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
"""The tags with which chats have the form that launcher reads."""
_KNOWN = {
    "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "subset", "split", "formatting", "columns", "tags",
    "ranking",
}  # fmt: skip
_CANNOT = {
    "num_samples": "drawn at random, and again where there are fewer; launcher takes all rows, or by limit the "
    "first so many"
}


def table(directory: str, beside: str) -> dict[str, dict[str, Any]]:
    """Return the data sets of a directory, relative to a file or the working directory; empty if none."""
    for folder in (PurePath(beside).parent / directory, PurePath(directory)):
        with contextlib.suppress(OSError, ValueError):
            content = read_json(Path(folder) / NAME)
            if isinstance(content, dict):
                return {str(name): entry for name, entry in content.items() if isinstance(entry, dict)}
    return {}


def data_set(
    name: str, entry: dict[str, Any], directory: str, stage: str, option: str, reading: Reading
) -> DataSet | None:
    """Return the data set of an entry; None if its rows are neither on the hub nor in files."""
    prefix = f"{NAME}: {name}"
    if isinstance(entry.get("hf_hub_url"), str):
        more = {key: str(entry[key]) for key in ("subset", "split") if entry.get(key)}
        place = {"name": entry["hf_hub_url"], **more}
    elif isinstance(entry.get("file_name"), str):
        first = mixture.first_rows(entry.get("split"), False, prefix, reading)
        place = {"path": str(PurePath(directory, entry["file_name"])), **first}
    else:
        return None
    for key, value in entry.items():
        if key not in _KNOWN and value not in (None, "", False):
            text = _CANNOT.get(str(key), "launcher has no key for it")
            reading.cannot_say(f"{prefix}.{key}", brief(value), text)
    return DataSet(place, option, _columns(entry, stage, prefix, reading))


def _columns(entry: dict[str, Any], stage: str, said: str, reading: Reading) -> dict[str, str]:
    """Return the meaning of the columns: texts with `stage: pt`, or chats with roles and contents."""
    kind = entry.get("formatting") or "alpaca"
    named, tags = (_words(entry.get(key)) for key in ("columns", "tags"))
    read: dict[str, str] = {}
    if stage == "pt" and kind == "alpaca" and named.keys() & {"prompt", "query"} == {"prompt"}:
        read = {"text": named.pop("prompt")}
        named.pop("response", None)  # LLaMA-Factory does not train on it in this stage
    elif kind in ("sharegpt", "openai") and stage == "sft" and tags.items() >= _TAGS.items():
        read = {"messages": named.pop("messages", "conversations")}
        read |= {"tools": named.pop("tools")} if "tools" in named else {}
    else:
        text = (
            "LLaMA-Factory's own way to make a chat of a row; write messages with role and content, and name "
            "them as data.messages"
        )
        reading.cannot_say(f"{said}.formatting", brief(kind), text)
        return {}
    if named:
        text = "columns that are learned or read too there; launcher reads those of its task alone"
        reading.cannot_say(f"{said}.columns", ", ".join(named), text)
    return read


def _words(value: Any) -> dict[str, str]:
    """Return the texts in a section; empty if it is not a section."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(key): text for key, text in items if isinstance(text, str) and text}
