"""Resolve the files that a job names: they exist, and their paths become absolute."""

from __future__ import annotations

import difflib
import functools
import glob
import subprocess
import sys
from pathlib import Path

from launcher import tasks
from launcher.data.folder import file_column, why_no_rows
from launcher.data.formats import FORMATS
from launcher.data.saved import saved_splits
from launcher.data.section import Data, Source, Sources
from launcher.errors import Problem
from launcher.job import adapter_directory
from launcher.job.schema import Job, Model
from launcher.tasks.distillation import Distillation

PACKAGED = ("smollm2-135m", "minilm-l6")
"""Short names of models that come in Python packages; a folder of that name goes before."""
_UNPACKING = "unpacking "
"""How the line begins that says that a packaged model is being unpacked."""


def nearest_file(path: Path) -> str:
    """Return `; the nearest is NAME` for a path that is not there, or the empty string."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} is not there either"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"; the nearest there is {near[0]}" if near else ""


def resolve(job: Job, folder: Path) -> tuple[Job, list[Problem]]:
    """Return the job with absolute paths, and a problem for each file that is not there."""
    problems: list[Problem] = []
    holds_files = file_column(tasks.of_job(job).columns) is not None
    sources = {
        role: _sources(given, role, folder, problems, holds_files)
        for role, given in (("train", job.data.train), ("evaluation", job.data.evaluation))
        if given is not None
    }
    data: Data = job.data.model_copy(update=sources)
    memory = job.memory
    if memory.offload_to != "cpu":
        memory = memory.model_copy(
            update={"offload_to": str((folder / Path(memory.offload_to).expanduser()).absolute())}
        )
    changed = {"data": data, "memory": memory, "model": _model(job.model, folder, problems)}
    if (near := job.training.l2_sp) is not None and near.fisher is not None:
        path = (folder / Path(near.fisher).expanduser()).absolute()
        if not path.is_file():
            reason = f"no such file{nearest_file(path)}; `launcher evaluate --fisher` writes one"
            problems.append(Problem("training.l2_sp.fisher", near.fisher, reason))
        near = near.model_copy(update={"fisher": str(path)})
        changed["training"] = job.training.model_copy(update={"l2_sp": near})
    if job.distillation is not None:
        changed["distillation"] = _taught(job.distillation, folder, problems)
    return job.model_copy(update=changed), problems


def _sources(given: Sources, role: str, folder: Path, problems: list[Problem], holds_files: bool) -> Sources:
    """Resolve a source, or each one of a list."""
    parts: list[Source] = []
    for number, source in enumerate(given.parts):
        key = f"{given.key(role, number)}.path"
        if source.path is not None and source.targets is None:
            source = _source(source, key, folder, problems, holds_files)
        elif source.path is not None:
            source = _pair(source, key, folder, problems)
        parts.append(source)
    if given.sources is None:
        return given.model_copy(update={"path": parts[0].path, "targets": parts[0].targets})
    return given.model_copy(update={"sources": tuple(parts)})


def _taught(distillation: Distillation, folder: Path, problems: list[Problem]) -> Distillation:
    """The section with its teacher's directory: a whole model, or RUN/model where it is a run; or with that of
    its logits."""
    if distillation.logits is not None:
        path = (folder / Path(distillation.logits).expanduser()).absolute()
        if not path.is_dir():
            reason = f"no such directory{nearest_file(path)}; `launcher predict --logits` writes one"
            problems.append(Problem("distillation.logits", distillation.logits, reason))
        return distillation.model_copy(update={"logits": str(path)})
    key, name = "distillation.teacher", distillation.teacher
    if name is None:
        return distillation
    path = folder / Path(name).expanduser()
    reason = ""
    if (path / "plan.json").is_file():
        path, name = path / "model", str(path / "model")
        if not (path / "config.json").is_file():
            reason = "a run that has not begun yet; start it first"
    elif adapter_directory.is_adapter(path):
        reason = (
            "an adapter without its model; export it merged, and name that directory (virtual tokens cannot be "
            "merged, so that they teach nothing)"
        )
    if reason:
        problems.append(Problem(key, name, reason))
        return distillation
    wrong: list[Problem] = []
    located = _base(Model(name=name, task="causal-lm"), folder, wrong)
    problems += [Problem(key, name, one.reason) for one in wrong]
    return distillation.model_copy(update={"teacher": located.name})


def _source(
    source: Source, key: str, folder: Path, problems: list[Problem], holds_files: bool = False
) -> Source:
    """Resolve one source. `holds_files`: a folder may be a source, whose files are the rows."""
    assert source.path is not None
    path = folder / Path(source.path).expanduser()
    if path.is_dir() and (splits := saved_splits(path)) is not None:
        problems += _split(source, key, splits)
    elif path.is_dir() and holds_files:
        if (why := why_no_rows(path)) is not None:
            problems.append(Problem(key, source.path, why))
    elif path.is_dir():
        pattern = f"{source.path.rstrip('/')}/*.jsonl"
        problems.append(
            Problem(
                key,
                source.path,
                f"a directory that save_to_disk did not write; name a file or a pattern, as {pattern}",
            )
        )
    elif "split" in source.model_fields_set and (path.exists() or glob.has_magic(str(path))):
        reason = (
            "files have no splits, only a data set on the hub and a directory of save_to_disk; leave it out"
        )
        problems.append(Problem(key.replace(".path", ".split"), source.split, reason))
    elif not path.exists() and glob.has_magic(str(path)):
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        if not files:
            problems.append(Problem(key, source.path, f"no file fits this pattern (looked in {folder})"))
        problems += [
            _unreadable(key, source.path, file) for file in files if file.suffix.lower() not in FORMATS
        ][:1]
    elif not path.exists():
        problems.append(
            Problem(key, source.path, f"no such file (looked in {path.parent}){nearest_file(path)}")
        )
    elif path.suffix.lower() not in FORMATS:
        problems.append(_unreadable(key, source.path, path))
    return source.model_copy(update={"path": str(path)})


def _pair(source: Source, key: str, folder: Path, problems: list[Problem]) -> Source:
    """Resolve a source of two text files, or of two patterns with equal numbers of files."""
    absolute, numbers = {}, {}
    for name, value in (("path", source.path), ("targets", source.targets)):
        assert value is not None
        path = folder / Path(value).expanduser()
        absolute[name] = str(path)
        files = [path] if path.is_file() else glob.glob(str(path), recursive=True)
        numbers[name] = sum(Path(file).is_file() for file in files)
        if not numbers[name]:
            reason = f"no such file (looked in {path.parent}){nearest_file(path)}"
            problems.append(Problem(key.replace(".path", f".{name}"), value, reason))
    if all(numbers.values()) and numbers["path"] != numbers["targets"]:
        reason = f"names {numbers['targets']} files, and path {numbers['path']}: name as many of both"
        problems.append(Problem(key.replace(".path", ".targets"), source.targets, reason))
    if "split" in source.model_fields_set:
        reason = "text files have no splits; leave it out"
        problems.append(Problem(key.replace(".path", ".split"), source.split, reason))
    return source.model_copy(update=absolute)


def _split(source: Source, key: str, splits: list[str]) -> list[Problem]:
    """A problem where the split that is meant is not there, or where it is not said which rows are the ones
    held out."""
    key, named = key.replace(".path", ".split"), "split" in source.model_fields_set
    if not splits:
        return (
            [Problem(key, source.split, f"{source.path} is one data set without splits; leave it out")]
            if named
            else []
        )
    if source.split not in splits:
        return [
            Problem(key, source.split, f"{source.path} has the splits {', '.join(splits)}; write one of them")
        ]
    if not named and "evaluation" in key:
        return [Problem(key, None, f"name the split of {source.path} that is held out: {', '.join(splits)}")]
    return []


def _unreadable(key: str, value: str, file: Path) -> Problem:
    near = difflib.get_close_matches(file.suffix.lower(), FORMATS, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    return Problem(key, value, f"{file.name} is not of a kind that is read ({' '.join(FORMATS)}){hint}")


def _model(model: Model, folder: Path, problems: list[Problem]) -> Model:
    path = folder / Path(model.name).expanduser()
    if adapter_directory.is_adapter(path):
        model, adapter = adapter_directory.read(path, model, "model.name")
        problems += adapter
        return model if adapter else _base(model, folder, problems)
    if model.adapter is not None and model.adapter.weights is not None:
        path = folder / Path(model.adapter.weights).expanduser()
        if not adapter_directory.is_adapter(path):
            problems.append(
                Problem(
                    "model.adapter.weights",
                    model.adapter.weights,
                    f"holds no adapter: no {adapter_directory.SETTINGS} there",
                )
            )
            return model
        model, adapter = adapter_directory.read(path, model, "model.adapter.weights")
        problems += adapter
    return _base(model, folder, problems)


def _base(model: Model, folder: Path, problems: list[Problem]) -> Model:
    path = folder / Path(model.name).expanduser()
    meant_as_path = model.name.startswith((".", "/", "~")) or model.name.count("/") > 1
    if path.is_dir():
        if (path / "config.json").is_file() and (path / adapter_directory.SETTINGS).is_file():
            reason = (
                "holds a model and an adapter of peft: which of both is meant? Name a directory with one "
                "of them"
            )
            problems.append(Problem("model.name", model.name, reason))
        if any(path.glob("config.json")) or any(path.glob("*.gguf")):
            return model.model_copy(update={"name": str(path.resolve())})
        if meant_as_path:
            problems.append(
                Problem(
                    "model.name",
                    model.name,
                    "a directory without a config.json; name the one with the model's files in it",
                )
            )
    elif path.is_file():
        problems.append(
            Problem(
                "model.name",
                model.name,
                f"a file; name the directory of the model, as {Path(model.name).parent}",
            )
        )
    elif meant_as_path:
        problems.append(Problem("model.name", model.name, f"no such directory{nearest_file(path)}"))
    elif model.name in PACKAGED:
        directory, reason = _packaged(model.name)
        problems += [Problem("model.name", model.name, reason)] if reason else []
        return model.model_copy(update={"name": directory or model.name})
    return model


@functools.cache
def _packaged(name: str) -> tuple[str, str]:
    """Return the directory of a model that comes in a Python package, or why there is none.

    Asked of a process of its own: one of the models is unpacked with torch when it is first wanted, which is
    said on stderr.
    """
    command = [sys.executable, "-m", "launcher.training.demo.models", name]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            if line.startswith(_UNPACKING):
                print(line, end="", file=sys.stderr, flush=True)
        directory = process.stdout.read().strip()
    if process.returncode == 0:
        return directory, ""
    last = next(filter(None, reversed(lines)), f"code {process.returncode}")
    return "", last.partition(": ")[2] or last
