"""The failures that launcher can name, each with its exit code.

LauncherError                     1   something in launcher itself is wrong
├── ConfigurationError            2   the job file or the command line cannot be used as it is
├── DataError                     3   a data file is missing, unreadable, changed, or has rows the policy refuses
├── OutOfMemoryError              4   a rank needed more memory than it has
├── StorageError                  5   a disk is full, read-only or out of reach
├── CheckpointError               6   no complete checkpoint can be read where one is needed
├── RunInUseError                 7   another process works in this run directory
├── DivergedError                 8   the loss or gradient was not finite for too many steps in a row, or jumped
├── RankLostError                 9   a rank died without saying why
├── ScriptError                  10   the user's own script raised an error, or its exit code was not 0
├── SchedulerError               11   Slurm refused a request
│   └── ControllerUnreachableError   12   Slurm's controller did not answer; the request may have been granted
├── HungError                    13   no rank made progress within `cluster.hang_after`, and all were killed
├── GpuError                     14   a GPU is broken: an ECC error, fallen off the bus
└── Stopped                      75   stopped on request with everything saved: run it again to resume

0 is success. 75 is EX_TEMPFAIL of sysexits.h: run it again, and it resumes where it stopped.
130 is a second Ctrl-C, or a grace period that ran out: nothing more was saved.
"""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST = 400


class LauncherError(Exception):
    """The base class of every error that launcher raises on purpose; its text is for people."""

    exit_code = 1
    failure_class = "internal"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job file or a command line."""

    key: str
    value: object
    reason: str

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {self.value!r}"
        return f"{self.key}{shown}: {self.reason}"


class ConfigurationError(LauncherError):
    """The job file or the command line cannot be used as it is; carries every problem found."""

    exit_code = 2
    failure_class = "configuration"

    def __init__(self, problems: str | Problem | list[Problem], source: str = "") -> None:
        if isinstance(problems, str):
            problems = [Problem("", None, problems)]
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.source = source
        lines = [str(problem).removeprefix(": ") for problem in self.problems]
        where = f"{source}: " if source else ""
        if len(lines) == 1:
            super().__init__(where + lines[0])
        else:
            super().__init__(f"{where}{len(lines)} problems\n" + "\n".join(f"  - {line}" for line in lines))


class DataError(LauncherError):
    """A data file is missing, unreadable, changed under the run, or has rows that the policy refuses."""

    exit_code = 3
    failure_class = "data"


class OutOfMemoryError(LauncherError):
    """A rank needed more memory than it has."""

    exit_code = 4
    failure_class = "out-of-memory"


class StorageError(LauncherError):
    """A disk is full, read-only or out of reach."""

    exit_code = 5
    failure_class = "storage"


class CheckpointError(LauncherError):
    """No complete checkpoint can be read where one is needed."""

    exit_code = 6
    failure_class = "checkpoint"


class RunInUseError(LauncherError):
    """Another process works in this run directory."""

    exit_code = 7
    failure_class = "run-in-use"


class DivergedError(LauncherError):
    """The loss or the gradient was not finite for too many steps in a row, or the loss jumped more often than
    the run may return to an earlier checkpoint."""

    exit_code = 8
    failure_class = "diverged"


class RankLostError(LauncherError):
    """A rank died without saying why: killed from outside, or crashed in native code."""

    exit_code = 9
    failure_class = "rank-lost"


class ScriptError(LauncherError):
    """A script that was started with --script raised an error, or ended with an exit code other than 0."""

    exit_code = 10
    failure_class = "script"


class SchedulerError(LauncherError):
    """Slurm refused a request."""

    exit_code = 11
    failure_class = "scheduler"


class ControllerUnreachableError(SchedulerError):
    """Slurm's controller did not answer: the request may have been carried out all the same."""

    exit_code = 12
    failure_class = "scheduler-unreachable"


class HungError(LauncherError):
    """No rank made progress for longer than `cluster.hang_after` allows, and all were killed."""

    exit_code = 13
    failure_class = "hung"


class GpuError(LauncherError):
    """A GPU is broken, according to CUDA or the kernel's log: an ECC error, fallen off the bus."""

    exit_code = 14
    failure_class = "gpu"


class Stopped(LauncherError):
    """Stopped on request with everything saved."""

    exit_code = 75
    failure_class = "stopped"


def leaves(root: type[LauncherError] = LauncherError) -> list[type[LauncherError]]:
    """Return the root and all its subclasses, sorted by exit code."""
    classes = [root]
    for child in root.__subclasses__():
        classes += leaves(child)
    return sorted(classes, key=lambda error: error.exit_code)


def by_failure_class(failure_class: str) -> type[LauncherError]:
    """Return the exception class with this failure class; LauncherError if none has it."""
    return next((error for error in leaves() if error.failure_class == failure_class), LauncherError)


def one_line(error: BaseException) -> str:
    """Return an error as one line of at most 400 characters.

    The text of a LauncherError is unchanged; the text of any other error follows the name of its type.
    """
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not isinstance(error, LauncherError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name if it has none, to quote in a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:_LONGEST]
