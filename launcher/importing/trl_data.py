"""The data sets that TRL and alignment-handbook name: one, or a mixture of several.

Read from TRL 1.16 (trl/scripts/utils.py), and from alignment-handbook before and since July 2025
(src/alignment/data.py). All concatenate: every row comes once per epoch. The handbook's weight is a share of
a data set's own rows, so it becomes a limit here, not a weight.
"""

from __future__ import annotations

from typing import Any

from launcher.importing import mixture
from launcher.importing.mixture import DataSet
from launcher.importing.reading import Reading, as_number, brief
from launcher.importing.trainer_keys import hold_out

_DATA = {"dataset_name", "dataset_config", "dataset_config_name", "dataset_train_split", "dataset_test_split"}
_KINDS = ("dataset_mixer", "dataset_mixture", "datasets")
MIXTURES = (*_KINDS, "dataset_splits", "dataset_configs")
"""The keys of a mixture, and the keys that accompany one."""
_OTHER_NAMES = {"path": "id", "name": "config"}
"""TRL's names for the handbook's."""


def data_set(content: dict[str, Any], reading: Reading, evaluates: bool = False) -> set[str]:
    """Record the named data set and its splits; return the keys that were read. A mixture has precedence."""
    name = reading.word(content, "dataset_name")
    if name is None or reading.has("data.train.name") or reading.has("data.train.sources"):
        return _DATA if name is None else _DATA - {"dataset_name"}
    kind, value = mixture.source(name)
    reading.record(f"data.train.{kind}", value, "dataset_name")
    subset_said = "dataset_config" if content.get("dataset_config") is not None else "dataset_config_name"
    subset = reading.word(content, subset_said)
    split, held_out = (
        reading.word(content, "dataset_train_split"),
        reading.word(content, "dataset_test_split"),
    )
    if kind == "path":
        return _DATA
    if subset is not None:
        reading.record("data.train.subset", subset, subset_said)
    if split is not None:
        reading.record("data.train.split", split, "dataset_train_split")
    if evaluates:
        for key, part, option in (("name", value, "dataset_name"), ("subset", subset, subset_said)):
            if part is not None:
                reading.record(f"data.evaluation.{key}", part, option)
        reading.record("data.evaluation.split", held_out or "test", "dataset_test_split")
    return _DATA


def mixture_of(content: dict[str, Any], reading: Reading) -> list[str]:
    """Record the data sets of a mixture; return the columns that it keeps."""
    key = next((key for key in _KINDS if content.get(key)), None)
    if key is None:
        return []
    value = content[key]
    held_out: list[dict[str, Any]] = []
    is_first_rows = isinstance(value, dict) and "datasets" not in value  # the handbook before July 2025
    if is_first_rows:
        entries, held_out = _of_mapping(value, content)
    else:
        listed = value.get("datasets") if isinstance(value, dict) else value
        entries = (
            [_renamed(one) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        )
    if not entries or not all(isinstance(entry.get("id"), str) for entry in entries):
        text = "cannot be read as data sets with their names; write data.train yourself"
        reading.cannot_say(key, brief(value), text)
        return []
    several = sum(as_number(entry.get("weight")) != 0 for entry in entries) > 1
    train: list[DataSet] = []
    for entry in entries:
        share = as_number(entry.get("weight"))
        if share == 0:
            reading.ignore(f"{key}.weight", f"{entry['id']}: 0", "no row of it is taken, so it is no source")
            continue
        places = _places(entry, key, reading)
        if share is not None and share != 1:
            limit = f"data.train.{len(train)}.limit" if several else "data.train.limit"
            _say_share(key, entry["id"], share, limit, is_first_rows, reading)
        train += [DataSet(place, key) for place in places]
    evaluation = [
        DataSet(place, "dataset_splits") for entry in held_out for place in _places(entry, key, reading)
    ]
    mixture.record(train, evaluation, reading)
    if isinstance(value, dict) and not is_first_rows and value.get("test_split_size"):
        hold_out(f"{key}.test_split_size", value["test_split_size"], reading)
    columns = next((entry["columns"] for entry in entries if isinstance(entry.get("columns"), list)), None)
    return [str(column) for column in columns or ()]


def _of_mapping(
    value: dict[str, Any], content: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the data sets of {name: share}, with their splits and configurations: those for training with
    their shares, and those held out, which are evaluated in full."""
    splits, configs = content.get("dataset_splits"), content.get("dataset_configs")
    names = [str(split) for split in splits] if isinstance(splits, list) else ["train"]
    train = [split for split in names if "train" in split] or names[:1]
    held_out = [split for split in names if "train" not in split and "test" in split]
    subsets = configs if isinstance(configs, list) and len(configs) == len(value) else [None] * len(value)
    data_sets = [{"id": str(name), "config": subset} for name, subset in zip(value, subsets, strict=True)]
    # The handbook's shares go to (data set, split) pairs in order: with several splits some get none.
    loaded = [one | {"split": split} for one in data_sets for split in train]
    learned = [one | {"weight": share} for one, share in zip(loaded, value.values(), strict=False)]
    return learned, [one | {"split": split} for one in data_sets for split in held_out]


def _renamed(entry: dict[Any, Any]) -> dict[str, Any]:
    names = {} if "id" in entry else _OTHER_NAMES
    return {names.get(str(key), str(key)): value for key, value in entry.items()}


def _places(entry: dict[str, Any], key: str, reading: Reading) -> list[dict[str, Any]]:
    if entry.get("data_dir"):
        text = "a folder of a data set; write its files as sources"
        reading.cannot_say(f"{key}.data_dir", brief(entry["data_dir"]), text)
    files, subset, split = entry.get("data_files"), entry.get("config"), entry.get("split")
    return mixture.places(entry["id"], files, subset, split, key, reading)


def _say_share(key: str, name: str, share: float, limit: str, is_first_rows: bool, reading: Reading) -> None:
    """Remark that only a share of a data set's rows is used; `limit` is launcher's key for their number."""
    rows = f"int({share:g} x its rows)"
    if is_first_rows:
        text = f"the first {rows}: write that number as {limit}"
    else:
        text = f"{rows}, drawn at random once; launcher takes all, or by {limit} the first so many"
    text += ". A weight here is another thing: a share of the epoch"
    reading.cannot_say(f"{key}.weight", f"{name}: {share:g}", text)
