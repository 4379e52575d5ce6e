"""Files beside a model's weights that an export takes along: code, templates, processors."""

from __future__ import annotations

import contextlib
import importlib
import json
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
"""In an export: the newest evaluation of its run, with the thresholds that were fitted on the held-out rows."""
_OF_ITSELF = (
    EVALUATION,
    "README.md",
    ".gitattributes",
    ".gitignore",
    "trainer_state.json",
    "adapter_config.json",
    "all_results.json",
)
"""What says something of that model, or of its own training, and would be wrong of another."""
_OF_A_MODEL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".bpe", ".codes", ".vocab", ".spm")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"


def directory_of(plan: Plan) -> Path | None:
    """Return the directory that holds the plan's model: as it is named, or the hub's cache; None where it is
    in neither."""
    path = Path(plan.model.name)
    if path.is_dir():
        return path
    try:
        cached = try_to_load_from_cache(plan.model.name, "config.json", revision=plan.model.revision)
    except ValueError:  # no name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def lacks_processor(plan: Plan) -> bool:
    """Return whether the model's files are here, and say nothing of images or sounds."""
    directory = directory_of(plan)
    return directory is not None and not any((directory / name).is_file() for name in _PROCESSORS)


def is_weights(path: Path) -> bool:
    """Return whether a file holds weights, or says in which file they are."""
    return path.name.endswith(_WEIGHTS)


def kept(directory: Path) -> Iterator[Path]:
    """Yield, relative to a model's directory, what an export has of it: all at its top but weights, named
    chat templates, and code."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and not is_weights(path) and path.name not in _OF_ITSELF:
            yield path.relative_to(directory)
    for path in sorted(directory.glob("*/**/*")):
        inside = path.relative_to(directory)
        hidden = any(part.startswith((".", "_")) for part in inside.parts[:-1])
        if path.is_file() and not hidden and (path.suffix == ".py" or inside.parts[0] == _TEMPLATES):
            yield inside


@contextlib.contextmanager
def own_code(plan: Plan) -> Iterator[None]:
    """Let this process alone of its machine, while inside, copy a model's code to where transformers imports
    it from, and import it.

    The ranks of a machine share that folder, and transformers does not keep one from importing what another
    has half written.
    """
    if not plan.model.trust_remote_code:
        yield
        return
    import filelock

    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".launcher.lock"):
        # What another rank has written since this one looked.
        importlib.invalidate_caches()
        yield


def copy(directory: Path, target: Path) -> None:
    """Copy what goes along with a model into a directory, which is made; whatever else somebody keeps beside
    the model does not."""
    for inside in kept(directory):
        if inside.suffix not in _OF_A_MODEL and not inside.name.startswith(_LICENCES):
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        # Of the hub's cache files are links, and what is copied is what they lead to.
        shutil.copyfile(directory / inside, target / inside)


def name_own_code(target: Path, plan: Plan) -> None:
    """Let the config and the tokenizer in a directory name the code that lies beside them, and no longer the
    repository that it is from."""
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
    """A reference, or a pair of them, to code: `repository--module.Class` as `module.Class` where that module
    is in `target`."""
    if isinstance(reference, (list, tuple)):
        return [_without_repository(one, repository, target) for one in reference]
    if not isinstance(reference, str) or not reference.startswith(repository):
        return reference
    plain = reference.removeprefix(repository)
    return plain if (target / f"{plain.partition('.')[0]}.py").is_file() else reference
