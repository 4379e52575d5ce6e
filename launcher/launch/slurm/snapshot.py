"""Copy the code at submission, so that later edits change no waiting run."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import launcher
from launcher.launch.slurm.script_files import choose
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically

LEFT_OUT = "left-out.txt"
_MOST_NAMED = 1000
_SCRIPT = "script"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", "pages")
"""Names of the package's files that are left out: `pages` is what `launcher help` reads, which no job does."""


def of_launcher(run: RunDirectory) -> Path:
    """Return the directory in RUN/code that holds this launcher; made where it is not there yet."""
    package = Path(launcher.__file__).parent
    names = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in sorted(name for name in names if not {"__pycache__", "pages"} & {*name.parts}):
        digest.update(str(name).encode() + b"\0" + (package / name).read_bytes() + b"\0")
    target = run.path / "code" / f"launcher-{digest.hexdigest()[:12]}"
    if not target.exists():
        new = target.with_name(f".{target.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(package, new / package.name, ignore=_LEFT_OUT)
        new.rename(target)
    return target


def of_script(run: RunDirectory, script: Path) -> Path:
    """Return a copy of a training script with what `choose` takes of its folder, below RUN/code; the copy's
    own path.

    What was left out is named, with the reason, in RUN/code/left-out.txt. Raises ConfigurationError as
    `choose` does.
    """
    chosen = choose(script)
    digest = hashlib.sha256()
    for file, (content, _) in chosen.files.items():
        digest.update(str(file).encode(errors="surrogateescape") + b"\0" + content + b"\0")
    target = run.path / "code" / f"script-{digest.hexdigest()[:12]}"
    if not target.exists():
        new = target.with_name(f".{target.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for file, (content, executable) in chosen.files.items():
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(
                new / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o777 if executable else 0o666
            )
            with open(descriptor, "wb") as copy:
                copy.write(content)
        new.rename(target)
    lines = [f"{str(file)!r}: {reason}\n" for file, reason in chosen.left_out.items()]
    more = f"and {len(lines) - _MOST_NAMED:,} more\n" if len(lines) > _MOST_NAMED else ""
    write_atomically(run.path / "code" / LEFT_OUT, "".join(lines[:_MOST_NAMED]) + more)
    return target / script.name


def left_out(run: RunDirectory) -> list[str]:
    """Return a line for each file that the newest copy of the script does without, and why; none where it
    has no script."""
    try:
        return (run.path / "code" / LEFT_OUT).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def keep_script(run: RunDirectory, plan: Plan) -> None:
    """Copy the plan's script, where it has one, and note which copy belongs to the next attempts."""
    if plan.script:
        write_atomically(run.path / "code" / _SCRIPT, str(of_script(run, Path(plan.script[0]))) + "\n")


def as_submitted(run: RunDirectory, plan: Plan) -> Plan:
    """Return the plan with its script as it was when it was submitted."""
    note = run.path / "code" / _SCRIPT
    if not plan.script or not note.exists():
        return plan
    return plan.model_copy(update={"script": (note.read_text(encoding="utf-8").strip(), *plan.script[1:])})
