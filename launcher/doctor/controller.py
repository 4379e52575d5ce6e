"""Checks of Slurm as this machine sees it: commands, controller, munge."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import time

from launcher.doctor.finding import Finding, failed, ok, warning
from launcher.errors import SchedulerError
from launcher.launch.slurm.client import call
from launcher.launch.slurm.site import settings

_CHECK = "Slurm"
_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_SECONDS = 10.0
_SECONDS_BEFORE_ASKING_AGAIN = (1.0, 2.0, 2.0)
_AWAY = (
    "wait for the controller, without which jobs go on; where only this machine gets no answer, see its "
    "slurm.conf and munged"
)


def check(is_needed: bool = False) -> list[Finding]:
    """Check commands, controller and munge. Unless Slurm `is_needed`, its absence is fine, and problems
    with it are warnings."""
    findings = _findings(is_needed)
    if is_needed:
        return findings
    return [
        warning(each.check, each.found, each.advice) if each.level == "failed" else each for each in findings
    ]


def _findings(is_needed: bool) -> list[Finding]:
    absent = [name for name in _COMMANDS if shutil.which(name) is None]
    if len(absent) == len(_COMMANDS):
        text = "no command of Slurm is here"
        advice = "call this on a login node of the cluster, or load the site's module of Slurm"
        return [failed(_CHECK, text, advice) if is_needed else ok(_CHECK, text)]
    if absent:
        advice = "load the site's module of Slurm, or have PATH name its folder"
        return [failed(_CHECK, f"{', '.join(absent)} are not in PATH", advice)]
    answer = controller()
    return [answer] if answer.level == "failed" else [answer, *munge()]


def controller() -> Finding:
    """Check whether a controller answers within a few attempts: a busy one may miss a request."""
    answer = _ping()
    for seconds in _SECONDS_BEFORE_ASKING_AGAIN:
        if answer.level != "failed":
            break
        time.sleep(seconds)
        answer = _ping()
    return answer


def _ping() -> Finding:
    try:
        answer = call(["scontrol", "ping"], seconds=_SECONDS)
    except SchedulerError as error:
        return failed(_CHECK, f"scontrol ping: {error}", _AWAY)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    up = [line for line in lines if line.endswith("UP")]
    if not up:
        reason = "; ".join(lines) or "scontrol ping says nothing"
        return failed(_CHECK, reason, _AWAY)
    if len(up) < len(lines):
        return warning(_CHECK, "; ".join(lines), "one controller is away; Slurm goes on with the other")
    return ok(_CHECK, "; ".join(lines))


def munge() -> list[Finding]:
    """Check whether munge encodes and decodes a credential, at sites that use it."""
    try:
        configuration = settings(call(["scontrol", "show", "config"], seconds=_SECONDS))
    except SchedulerError as error:
        advice = "have munged started here, with the cluster's key and the right time"
        return [failed("munge", f"the controller refuses: {error}", advice)]
    kind = configuration.get("AuthType", "auth/munge")
    if kind != "auth/munge":
        return [ok("munge", f"is not used here ({kind})")]
    if shutil.which("munge") is None or shutil.which("unmunge") is None:
        return [ok("munge", "its programs are not here; the controller accepts us")]
    socket = re.search(r"socket=([^,\s]+)", configuration.get("AuthInfo", ""))
    where = [f"--socket={socket[1]}"] if socket else []
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=_SECONDS, check=True)
    try:
        run(["unmunge", "--no-output", *where], input=run(["munge", "--no-input", *where]).stdout)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        advice = "have munged started here, with the cluster's key and the right time"
        return [failed("munge", reason, advice)]
    return [ok("munge", "seals and opens")]
