"""Files next to a model's weights that an export copies: code, templates, processors."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.utils.hub import HF_MODULES_CACHE

from launcher.plain_files import read_json
from launcher.planner.plan import Plan

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".gguf",
    ".npz",
    ".index.json",
)
EVALUATION = "launcher_evaluation.json"
"""A file in an export: the newest evaluation of its run, with thresholds fitted on the held-out rows."""
_OF_ITSELF = (
    EVALUATION,
    "README.md",
    ".gitattributes",
    ".gitignore",
    "trainer_state.json",
    "adapter_config.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "predict_results.json",
    "config_sentence_transformers.json",
)
"""Files about that model, or its own training, which would be wrong for another."""
_MODULES = "modules.json"
_OF_EMBEDDINGS = re.compile(r"modules\.json|data_config\.json|sentence_\w+_config\.json")
"""Files of sentence-transformers, beside its modules.json: they describe a model of embeddings, which no task
trains."""
_OF_A_MODEL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".bpe", ".codes", ".vocab", ".spm")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"


def directory_of(plan: Plan) -> Path | None:
    """Return the directory of the plan's model: the named one, or the hub's cache; None if it is in
    neither."""
    path = Path(plan.model.name)
    if path.is_dir():
        return path
    try:
        cached = try_to_load_from_cache(plan.model.name, "config.json", revision=plan.model.revision)
    except ValueError:  # not a valid name on the hub
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def lacks_processor(plan: Plan) -> bool:
    """Return whether the model's files are local, and without a processor for images or sounds."""
    directory = directory_of(plan)
    return directory is not None and not any((directory / name).is_file() for name in _PROCESSORS)


def is_weights(path: Path) -> bool:
    """Return whether a file has weights, or is their index."""
    return path.name.endswith(_WEIGHTS)


def kept(directory: Path) -> Iterator[Path]:
    """Yield the files of a model's directory that an export copies, by relative path: all at its top but
    weights, named chat templates, and code."""
    embeds = (directory / _MODULES).is_file()
    for path in sorted(directory.iterdir()):
        left_out = path.name in _OF_ITSELF or (embeds and _OF_EMBEDDINGS.fullmatch(path.name))
        if path.is_file() and not is_weights(path) and not left_out:
            yield path.relative_to(directory)
    for path in sorted(directory.glob("*/**/*")):
        inside = path.relative_to(directory)
        hidden = any(part.startswith((".", "_")) for part in inside.parts[:-1])
        if path.is_file() and not hidden and (path.suffix == ".py" or inside.parts[0] == _TEMPLATES):
            yield inside


@contextlib.contextmanager
def own_code(plan: Plan) -> Iterator[None]:
    """Hold the machine's lock for copying a model's code to transformers' import folder, and importing it.

    The ranks of a machine share that folder, and transformers does not prevent one from importing a
    half-written file of another.
    """
    if not plan.model.trust_remote_code:
        yield
        return
    import filelock

    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".launcher.lock"):
        # Another rank may have written files since this one looked.
        importlib.invalidate_caches()
        yield


def copy(directory: Path, target: Path) -> None:
    """Copy a model's further files (`kept`) into a directory, which is created; other files there are not
    copied."""
    for inside in kept(directory):
        if inside.suffix not in _OF_A_MODEL and not inside.name.startswith(_LICENCES):
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        # The hub's cache has links; their targets are copied.
        shutil.copyfile(directory / inside, target / inside)


def name_own_code(target: Path, plan: Plan) -> None:
    """Make the config and the tokenizer in a directory refer to the code next to them, not to its
    repository."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = target / name
        if not path.is_file():
            continue
        content = read_json(path)
        references = content.get("auto_map")
        if isinstance(references, dict):
            changed = {
                key: _without_repository(value, f"{plan.model.name}--", target)
                for key, value in references.items()
            }
            if changed != references:
                path.write_text(
                    json.dumps(content | {"auto_map": changed}, indent=2, sort_keys=True) + "\n",
                    encoding="utf-8",
                )


def _without_repository(reference: Any, repository: str, target: Path) -> Any:
    """Return a reference to code, or a pair of them: `repository--module.Class` as `module.Class` if that
    module is in `target`."""
    if isinstance(reference, (list, tuple)):
        return [_without_repository(one, repository, target) for one in reference]
    if not isinstance(reference, str) or not reference.startswith(repository):
        return reference
    plain = reference.removeprefix(repository)
    return plain if (target / f"{plain.partition('.')[0]}.py").is_file() else reference
