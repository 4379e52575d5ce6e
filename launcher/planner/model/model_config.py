"""Find a model's config.json: in the job file, the model's directory or the hub's cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem, one_line
from launcher.job.schema import Model
from launcher.plain_files import read_json
from launcher.planner.model.model_sizes import is_size, wrong_sizes
from launcher.planner.model.vocabulary import read_vocabulary


def locate(name: str, revision: str | None = None) -> str:
    """Return the directory of a model: the name itself, or its place in the hub's cache, in a revision if one
    is given.

    Without a revision it is the main branch, else the latest one fetched.
    """
    if (Path(name) / "config.json").exists():
        return name
    folder = _hub_cache() / f"models--{name.replace('/', '--')}"
    configs = sorted(folder.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):  # what is no branch and no tag is taken for a commit
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    taken = [path for path in configs if path.parent.name == commit] or (configs if revision is None else [])
    return str(taken[-1].parent) if taken else name


def fetch_config(name: str, revision: str | None = None) -> None:
    """Fetch a hub model's config.json into the hub's cache, unless it is on this machine already.

    Raises ConfigurationError if the hub does not have it, or cannot be reached.
    """
    if (Path(locate(name, revision)) / "config.json").exists():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # One request first: a download tries six times, over 24 s, and logs each.
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
        hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:  # a connection's are of another library, from version to version
        reached = isinstance(error, (OSError, ValueError)) and not isinstance(error, ConnectionError)
        why = "cannot be fetched" if reached else "is not on this machine, and the hub cannot be reached"
        raise ConfigurationError(
            Problem("model.name", name, f"its config.json {why}: {one_line(error)}")
        ) from None


def cached_models() -> list[str]:
    """Return the names of the models whose config.json the hub's cache holds."""
    configs = _hub_cache().glob("models--*/snapshots/*/config.json")
    folders = {path.parents[2].name.removeprefix("models--") for path in configs}
    return sorted(folder.replace("--", "/") for folder in folders)


def _hub_cache() -> Path:
    """Return huggingface_hub's folder of models, from the same variables in the same order."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def read_config(directory: str) -> dict[str, Any] | None:
    """Return a model's config.json; None if there is none, or if it cannot be read."""
    try:
        config = read_json(Path(directory) / "config.json")
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def config_of(model: Model, as_stored: bool = False) -> dict[str, Any] | None:
    """Return the job file's `model.config`, else the model's own config.json; None if that is not here.

    With `resize_embeddings`, its vocabulary has a row for each token of the tokenizer, unless `as_stored`.
    Raises ConfigurationError with all impossible sizes at once.
    """
    directory = locate(model.name, model.revision) if model.config is None else ""
    config = read_config(directory) if model.config is None else model.config
    wrong = wrong_sizes(config or {})
    if wrong and model.config is None:
        path = Path(directory) / "config.json"
        raise ConfigurationError([Problem("model.name", model.name, f"in {path}, {one}") for one in wrong])
    if wrong:
        raise ConfigurationError([Problem(f"model.config.{one.key}", one.value, one.reason) for one in wrong])
    if config is None or as_stored or not model.resize_embeddings:
        return config
    vocabulary, number = read_vocabulary(locate(model.name, model.revision)), num_embeddings(config)
    if vocabulary is None or number is None or vocabulary.num_ids <= number:
        return config
    text = {**_of_text(config), "vocab_size": vocabulary.num_ids}
    return {**config, "text_config": text} if isinstance(config.get("text_config"), dict) else text


def num_embeddings(config: dict[str, Any]) -> int | None:
    """Return the number of rows of a model's embedding from its config; None if it has none."""
    number = _of_text(config).get("vocab_size", config.get("vocab_size"))
    return number if is_size(number) else None


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config
