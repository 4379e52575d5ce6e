"""The code as it was when the run was submitted, so that what is edited later changes no run that waits in the queue."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import launcher
from launcher.errors import ConfigurationError, Problem
from launcher.planning.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically

_LARGEST_BYTES = 64 << 20
_SCRIPT = "script"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git")


def of_launcher(run: RunDirectory) -> Path:
    """The directory in RUN/code that holds this launcher; made where it is not there yet."""
    package = Path(launcher.__file__).parent
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return _copied(package, run.path / "code" / f"launcher-{digest.hexdigest()[:12]}", package.name)


def _copied(source: Path, target: Path, name: str) -> Path:
    if not target.exists():
        made = target.with_name(f".{target.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(source, made / name, ignore=_LEFT_OUT)
        made.rename(target)
    return target


def of_script(run: RunDirectory, script: Path) -> Path:
    """A copy of a training script with what lies beside it, below RUN/code; the copy's own path.

    In a git repository that is what git tracks, and what it does not ignore, of the script's folder; elsewhere its Python files.
    Raises ConfigurationError where that is too much to be code.
    """
    folder = script.parent
    files = _known_to_git(folder) or [path.relative_to(folder) for path in sorted(folder.rglob("*.py"))]
    files = sorted({*files, Path(script.name)})
    sizes = sum((folder / file).stat().st_size for file in files)
    if sizes > _LARGEST_BYTES:
        reason = f"{sizes >> 20} MiB lie beside it, which are copied with it; put it into a folder with its own code only"
        raise ConfigurationError(Problem("--script", str(script), reason))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file).encode() + b"\0" + (folder / file).read_bytes() + b"\0")
    target = run.path / "code" / f"script-{digest.hexdigest()[:12]}"
    if not target.exists():
        made = target.with_name(f".{target.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        for file in files:
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / file, made / file)
        made.rename(target)
    return target / script.name


def keep_script(run: RunDirectory, plan: Plan) -> None:
    """Copy the plan's script, where it has one, and note which copy belongs to the next attempts."""
    if plan.script:
        write_atomically(run.path / "code" / _SCRIPT, str(of_script(run, Path(plan.script[0]))) + "\n")


def as_submitted(run: RunDirectory, plan: Plan) -> Plan:
    """The plan with its script as it was when it was submitted."""
    note = run.path / "code" / _SCRIPT
    if not plan.script or not note.exists():
        return plan
    return plan.model_copy(update={"script": (note.read_text(encoding="utf-8").strip(), *plan.script[1:])})


def _known_to_git(folder: Path) -> list[Path]:
    """Files below `folder` that belong to a git repository; none where there is no git, or no repository."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "."]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [Path(name) for name in listed.split("\0") if name and (folder / name).is_file()]
