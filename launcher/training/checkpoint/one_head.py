"""One of several heads with the body, named as in transformers' own class for that head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from launcher.plain_files import read_json
from launcher.tasks.traits import HEADS
from launcher.training.checkpoint.weights import Entry, Weights
from launcher.training.model.model_files import EVALUATION
from launcher.training.model.with_heads import head_class, head_config, head_name


class OneHead:
    """The tensors of one task's own model class, under the names of that class."""

    def __init__(self, weights: Weights, model_files: Path, task: str) -> None:
        """Read the config of the model with all heads from the directory `model_files`."""
        self._weights, self._task = weights, task
        whole = AutoConfig.from_pretrained(model_files)
        self._config = head_config(whole, task)
        with torch.device("meta"):
            own = head_class(whole, task)._from_config(self._config)
        # Some heads use less of the body than others: a token classifier has no pooler.
        own_names = own.state_dict(keep_vars=True).keys()
        begins = f"{head_name(task)}."
        named = {entry.name.removeprefix(begins): entry for entry in weights.entries()}
        self._entries = {name: entry for name, entry in named.items() if name in own_names}

    def entries(self) -> list[Entry]:
        return [replace(entry, name=name) for name, entry in self._entries.items()]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        return self._weights.pieces(self._entries[name].name)

    def write_config(self, directory: Path) -> None:
        """Write config.json."""
        self._config.save_pretrained(directory)

    def write_evaluation(self, file: Path, directory: Path) -> None:
        """Write this task's part of an evaluation of all tasks."""
        whole: dict[str, Any] = read_json(file)
        begins = f"{self._task}/"
        metrics = {
            name.removeprefix(begins): value
            for name, value in whole.get("metrics", {}).items()
            if name.startswith(begins)
        }
        own = whole | {"metrics": metrics, "details": whole.get("details", {}).get(self._task, {})}
        (directory / EVALUATION).write_text(json.dumps(own) + "\n", encoding="utf-8")


def heads_of(model_files: Path) -> list[str]:
    """Return the tasks of a model with several heads; an empty list for a model with one head."""
    return list(read_json(model_files / "config.json").get(HEADS) or {})
