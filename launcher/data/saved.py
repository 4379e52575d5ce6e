"""Directories written by `save_to_disk` of the package datasets."""

from __future__ import annotations

from pathlib import Path

from launcher.plain_files import read_json


def saved_splits(directory: Path) -> list[str] | None:
    """Return the splits in a directory that `save_to_disk` wrote: empty for a single data set, None if the
    directory is something else."""
    if (directory / "state.json").is_file():
        return []
    try:
        splits = read_json(directory / "dataset_dict.json")["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(split) for split in splits] if isinstance(splits, list) else None
