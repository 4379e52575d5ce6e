"""The cache key of prepared data: a hash of everything that decides its contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import xxhash

from launcher.planner.plan import Plan
from launcher.runs import cache
from launcher.tasks.task import Task
from launcher.training.data.sources import Rows
from launcher.training.model.pretrained import drop_limits

FORMAT = 8
"""The version of the files, and of how samples and packs are made; a new one invalidates the cache."""
_IN_THE_BATCH = ("augmentation", "cut_at", "image_size")
"""Keys of `data` that only affect batches."""
_IN_THE_ORDER = ("mixing", "streaming", "shuffle_window")
"""Keys of `data` that only affect the order of samples."""
_OF_A_PLACE = ("is_local", "local_files_only")
"""Settings of a tokenizer that say where its files were found."""
Role = Literal["train", "evaluation"]


def cache_root() -> Path:
    """Return the folder of prepared data: XDG_CACHE_HOME/launcher/data."""
    return cache.root() / "data"


def cache_key(rows: Rows, role: Role, plan: Plan, task: Task, tokenizer: Any) -> str:
    """Return a hash of everything that decides the prepared data: contents, columns, settings, task, classes,
    tokenizer."""
    settings = plan.data.model_dump(
        mode="json", exclude={"train", "evaluation", "num_workers", "date", *_IN_THE_ORDER, *_IN_THE_BATCH}
    )
    # The two give the same samples, and differ only in the report.
    settings["unusable"] = settings["unusable"].replace("drop-few", "drop")
    classes: Any = task.labels if role == "evaluation" or task.labels_given else None
    if task.own_labels is not None:  # they decide the class of a label
        classes = {"rows": classes, "model": task.own_labels}
    parts: list[Any] = [
        FORMAT,
        role,
        rows.digest,
        [Path(file.path).suffix.lower() for file in rows.files],
        rows.source.limit,
    ]
    # The paths and times of files that rows name: changed ones are read again.
    parts += [stamp] if (stamp := rows.stamp) else []
    parts += [{"virtual tokens": task.virtual_tokens}] if task.virtual_tokens else []
    parts += ["prefix"] if task.virtual_prefix else []
    parts += [settings, task.name, task.key, task.layout, classes, tokenizer_digest(tokenizer)]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's behaviour: algorithm and vocabulary, special tokens and chat template.

    For a processor of files, a hash of its settings, and of its tokenizer if it has one.
    """
    hasher = xxhash.xxh3_128()
    if not hasattr(tokenizer, "get_vocab"):
        settings = [type(tokenizer).__name__, tokenizer.to_dict()]
        hasher.update(json.dumps(settings, sort_keys=True, default=str).encode())
        if (texts := getattr(tokenizer, "tokenizer", None)) is not None:
            hasher.update(tokenizer_digest(texts).encode())
        return str(hasher.hexdigest())
    drop_limits(tokenizer)  # left over from the last call, they would change the hash
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        hasher.update(backend.to_str().encode())
    else:
        hasher.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    details = [
        type(tokenizer).__name__,
        special,
        tokenizer.chat_template,
        tokenizer.padding_side,
        tokenizer.truncation_side,
    ]
    details.append(list(tokenizer.model_input_names))
    # Some settings are neither in the algorithm nor in the vocabulary: split_special_tokens, do_lower_case ...
    given = tokenizer.init_kwargs.items()
    details.append(
        {name: value for name, value in given if isinstance(value, bool) and name not in _OF_A_PLACE}
    )
    hasher.update(json.dumps(details, sort_keys=True, default=str).encode())
    return str(hasher.hexdigest())
