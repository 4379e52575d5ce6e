"""The data sets of an axolotl file: the place of the rows, and the meaning of their columns.

Read from version 0.18.0 (src/axolotl/utils/data, src/axolotl/utils/schemas/datasets.py): the data sets are
concatenated, so that every row comes once in an epoch.
"""

from __future__ import annotations

from typing import Any

from launcher.importing import mixture
from launcher.importing.mixture import DataSet
from launcher.importing.reading import Reading, brief

_NEUTRAL = {
    "roles_to_train": (["assistant"], ["assistant", "gpt"], None),
    "train_on_eos": ("turn", None),
    "train_on_eot": ("turn", None),
}
_KNOWN = {
    "path", "type", "name", "split", "data_files", "ds_type", "field_messages", "field", "trust_remote_code",
    "preprocess_shards", *_NEUTRAL,
}  # fmt: skip
"""Keys of an entry that are read, or do not affect what is learned."""
_SHARD = (
    "a part of its rows, drawn at random once; launcher takes all, or by limit the first so many: write "
    "those rows to a file of their own"
)
_CANNOT = {"shards": _SHARD, "shards_idx": _SHARD}
_ELSE = (
    "launcher has no key for it; it learns what messages with role and content say, and the assistant's "
    "turns of them"
)


def read(content: dict[str, Any], reading: Reading) -> None:
    """Record the data sets of `datasets` and `test_datasets`."""
    mixture.record(
        _data_sets(content, "datasets", "data.train", reading),
        _data_sets(content, "test_datasets", "data.evaluation", reading),
        reading,
    )


def _data_sets(content: dict[str, Any], option: str, key: str, reading: Reading) -> list[DataSet]:
    listed = content.get(option)
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if listed and not entries:
        reading.cannot_say(option, brief(listed), f"cannot be read as data sets; write {key} yourself")
    data_sets: list[DataSet] = []
    for number, entry in enumerate(entries):
        prefix = option if len(entries) == 1 else f"{option}.{number}"
        values = {str(name): value for name, value in entry.items()}
        # A data set on the hub without a split gets the one for its role, train or test.
        split = values.get("split") or ("test" if option == "test_datasets" else None)
        path = reading.word(values, "path", f"{prefix}.")
        files, subset = values.get("data_files"), values.get("name")
        columns = _columns(values, prefix, reading)
        data_sets += [
            DataSet(place, prefix, columns)
            for place in mixture.places(path, files, subset, split, prefix, reading)
        ]
    return data_sets


def _columns(entry: dict[str, Any], said: str, reading: Reading) -> dict[str, str]:
    """Return the meaning of an entry's columns; empty if axolotl formats its rows in a way of its own."""
    columns: dict[str, str] = {}
    way = entry.get("type")
    if way == "chat_template":
        columns = {"messages": str(entry.get("field_messages") or "messages")}
    elif way == "completion":
        columns = {"text": str(entry.get("field") or "text")}
    else:
        text = (
            "axolotl's own way to write a row; launcher takes columns as they are, by data.text, "
            "data.prompt and completion, or messages"
        )
        reading.cannot_say(f"{said}.type", brief(way), text)
    for name, value in entry.items():
        if (name not in _KNOWN and value not in (None, "", [], {}, False)) or (
            name in _NEUTRAL and value not in _NEUTRAL[name]
        ):
            reading.cannot_say(f"{said}.{name}", brief(value), _CANNOT.get(name, _ELSE))
    return columns
