"""The limit on open files, raised and checked before an attempt starts."""

from __future__ import annotations

import resource

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan

_FILES = 96
"""The open files of an agent, or of a rank with torch, tokenizer, data and a save in progress: twice the
number measured."""
_FILES_PER_RANK = 4
"""The agent's pipes to one rank, and a rank's connections to one other."""
_ENOUGH_FILES = 4096


def raise_open_files(plan: Plan) -> None:
    """Raise the limit on open files as far as the system allows and a run needs; children inherit it.

    Raises ConfigurationError if it stays too low: libraries would abort or hang.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    needed = _FILES + _FILES_PER_RANK * plan.mesh.world_size
    if soft != resource.RLIM_INFINITY and soft < needed:
        reason = (
            f"a process may have {soft} files open, and a rank of this plan needs up to {needed}; write: "
            f"ulimit -n {_ENOUGH_FILES}"
        )
        advice = (
            "where the shell refuses that, it is set by root: nofile in /etc/security/limits.conf, or "
            "LimitNOFILE= of a service"
        )
        raise ConfigurationError(Problem("ulimit -n", soft, f"{reason}; {advice}"))
