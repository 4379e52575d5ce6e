"""Check the limits on open files before an attempt starts."""

from __future__ import annotations

import resource

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan

_FILES = 96
"""What the agent, and a rank with torch, tokenizer, data and a save under way, have open at once; measured,
and as much again."""
_FILES_PER_RANK = 4
"""An agent's pipes to each rank, a rank's connections to each other."""
_ENOUGH_FILES = 4096


def raise_open_files(plan: Plan) -> None:
    """Raise how many files a process may have open to what the system allows; children inherit it.

    Raises ConfigurationError where that is too few: what happens in libraries then is an abort, or a hang.
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
