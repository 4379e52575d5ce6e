"""Call Slurm's commands with a time limit, and shorten a refusal to one line."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence

from launcher.errors import ControllerUnreachableError, SchedulerError

_UNREACHABLE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "zero bytes were transmitted",
    "not responding",
)
_PREFIXES = (
    "sbatch: error: ",
    "squeue: error: ",
    "scontrol: error: ",
    "scancel: error: ",
    "sacct: error: ",
    "sinfo: error: ",
)


def call(command: Sequence[str], seconds: float = 30.0, environment: Mapping[str, str] | None = None) -> str:
    """Return what a command of Slurm prints. `environment` is another than one's own.

    Raises ControllerUnreachableError where the controller did not answer, else SchedulerError with what Slurm
    said.
    """
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            errors="replace",
        )
    except FileNotFoundError:
        raise SchedulerError(
            f"{command[0]} is not on this machine: call this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise ControllerUnreachableError(f"{command[0]} got no answer in {seconds:g} s") from None
    if done.returncode == 0:
        return done.stdout
    # Some say on stdout what is wrong, as `scontrol ping` of a controller that is down.
    text = reason(done.stderr) or reason(done.stdout) or f"{command[0]} ended with code {done.returncode}"
    if any(words in done.stderr.lower() for words in _UNREACHABLE):
        raise ControllerUnreachableError(text)
    raise SchedulerError(text)


def patiently(command: Sequence[str], seconds: float) -> str:
    """Call again and again, as `call` does, for so long as the controller does not answer. Only for what may
    be asked twice."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call(command, min(30.0, max(1.0, until - time.monotonic())))
        except ControllerUnreachableError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def reason(stderr: str) -> str:
    """Return the last line in which a command of Slurm says what is wrong, without its own name."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")
    for prefix in _PREFIXES:
        line = line.removeprefix(prefix)
    return line.removeprefix("Batch job submission failed: ")
