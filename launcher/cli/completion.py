"""Completion with the tab key: job files, data files, runs, directories with a model, tasks, GPUs, keys.

Shells call these functions through typer, one for each kind; the questions of `launcher init` use them too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_JOB = (".yaml", ".yml")


def job_files(incomplete: str) -> list[str]:
    """Return the job files that begin with a text, and the folders that lead to more."""
    return _paths(incomplete, lambda path: path.endswith(_JOB))


def data_files(incomplete: str) -> list[str]:
    """Return the data files of supported formats that begin with a text, and folders that lead to more."""
    from launcher.data.formats import FORMATS

    return _paths(incomplete, lambda path: path.lower().endswith(tuple(FORMATS)))


def models(incomplete: str) -> list[str]:
    """Return the directories with a model that begin with a text, the folders that lead to more, and the
    models in the hub's cache."""
    from launcher.planner.model.model_config import cached_models

    here = _paths(incomplete, _holds_model, files=False)
    return here + [name for name in cached_models() if name.startswith(incomplete)]


def models_to_train(incomplete: str) -> list[str]:
    """Return the results of `models`, and names of models in Python packages, which `launcher init` knows."""
    from launcher.training.demo.models import installed

    return [*models(incomplete), *(name for name in installed() if name.startswith(incomplete))]


def runs(incomplete: str) -> list[str]:
    """Return the names of runs below runs/ that begin with a text; otherwise the folders."""
    from launcher.runs.layout import runs_folder

    named = sorted(path.parent.name for path in runs_folder().glob("*/plan.json"))
    return [name for name in named if name.startswith(incomplete)] or _paths(incomplete, lambda path: False)


def runs_and_models(incomplete: str) -> list[str]:
    """Return the runs below runs/, and the directories with a model, that begin with a text."""
    return list(dict.fromkeys([*runs(incomplete), *models(incomplete)]))


def task_names(incomplete: str) -> list[str]:
    """Return the tasks that begin with a text."""
    from launcher.tasks import names

    return [name for name in names() if name.startswith(incomplete)]


def gpu_names(incomplete: str) -> list[str]:
    """Return the GPUs in the planner's table that begin with a text; several are separated by commas."""
    from launcher.planner.hardware.gpu_table import BY_KEY

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in BY_KEY if name.startswith(last)]


def keys(incomplete: str) -> list[str]:
    """Return the keys of a job file that begin with a text, followed by `=`."""
    if "=" in incomplete:
        return []
    from launcher.job.describe import keys as every
    from launcher.job.describe import section_of

    plain = (key.path for key in every() if section_of(key.field) is None)
    return [f"{path}=" for path in dict.fromkeys(plain) if path.startswith(incomplete)]


def _holds_model(path: str) -> bool:
    return (Path(path) / "config.json").is_file()


def _paths(incomplete: str, wanted: Callable[[str], bool], files: bool = True) -> list[str]:
    """Return the wanted entries that begin with a text, and folders, which end in `/`.

    A folder that is the only candidate is searched too: a shell adds a space after a single completion.
    """
    while True:
        some = _beside(incomplete, wanted, files)
        if len(some) != 1 or not some[0].endswith("/") or some[0] == incomplete:
            return some
        incomplete = some[0]


def _beside(incomplete: str, wanted: Callable[[str], bool], files: bool) -> list[str]:
    folder, _, begin = incomplete.rpartition("/")
    folder = f"{folder}/" if "/" in incomplete else ""
    try:
        entries = sorted(os.scandir(Path(folder).expanduser()), key=lambda entry: entry.name)
    except OSError:
        return []
    some = []
    for entry in entries:
        if not entry.name.startswith(begin) or (entry.name.startswith(".") and not begin.startswith(".")):
            continue
        if entry.is_dir():
            some.append(
                f"{folder}{entry.name}" if not files and wanted(entry.path) else f"{folder}{entry.name}/"
            )
        elif files and wanted(entry.name):
            some.append(f"{folder}{entry.name}")
    return some
