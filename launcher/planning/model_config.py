"""A model's config.json, wherever it stands: in the job file, in the model's directory, or in the hub's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launcher.job.schema import Model


def locate(name: str) -> str:
    """The directory of a model: as it is named, or where the hub's cache holds it."""
    if (Path(name) / "config.json").exists() or "/" not in name:
        return name
    root = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = root / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return str(found[-1].parent) if found else name


def read_config(directory: str) -> dict[str, Any] | None:
    """A model's config.json; None where there is none that can be read."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def config_of(model: Model) -> dict[str, Any] | None:
    """What the job file says the model is, else what its own file says; None where that is not here."""
    return model.config if model.config is not None else read_config(locate(model.name))
