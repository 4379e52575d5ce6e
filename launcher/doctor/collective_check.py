"""A node's part of the test all-reduce: ranks under a run's usual agent, which meets the others' agents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from launcher.launch.agent import NODE_VARIABLE
from launcher.launch.command import Meeting, agent_of
from launcher.launch.fork_server import VARIABLE as WARM_VARIABLE
from launcher.launch.rendezvous import ATTEMPT_VARIABLE
from launcher.runs import doors, failure
from launcher.runs.processes import PARENT_VARIABLE, RUN_VARIABLE
from launcher.runs.secret import SECRET_VARIABLE, make

SECONDS = 180
"""Time limit for the agents to import torch (slow over a network) and to meet, and for the ranks."""
SECONDS_TO_ADD_UP = 60
"""Time limit for the ranks alone, after they have imported torch."""
_PROGRAM, _MARK = "launcher.training.all_reduce", '{"import_seconds"'
"""The ranks' module, and the beginning of the line that each rank writes."""


def add_up(place: Meeting, num_nodes: int, num_gpus: int, word: str) -> dict[str, Any]:
    """Sum over all nodes' GPUs, or over one rank per node without GPUs; `word` is their secret.

    Returns the answer of this node's slowest rank, or the first problem.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-doctor-") as attempt:
        program = [_PROGRAM, attempt, "nccl" if num_gpus else "gloo", str(SECONDS_TO_ADD_UP)]
        command = agent_of(num_nodes, num_gpus or 1, place if num_nodes > 1 else None, program)
        interface = place.interface or doors.loopback()
        more = {PARENT_VARIABLE: str(os.getpid()), ATTEMPT_VARIABLE: attempt, NODE_VARIABLE: str(place.node)}
        more |= {SECRET_VARIABLE: str(make(Path(attempt), word)), "OMP_NUM_THREADS": "1"}
        more |= {RUN_VARIABLE: "", WARM_VARIABLE: "0"}  # set if this is called inside a run's job
        more |= dict.fromkeys(doors.INTERFACE_VARIABLES, interface) if interface else {}
        variables = {**os.environ, **more}
        try:
            done = subprocess.run(
                command, env=variables, capture_output=True, text=True, errors="replace", timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"not done after {SECONDS} s"}
        answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if len(answers) == (num_gpus or 1):
            return dict(max(answers, key=lambda answer: float(answer["seconds"])))
        if (first := failure.first(Path(attempt))) is not None:
            alarmed = f"signal {signal.SIGALRM.value} " in first.cause
            return {"problem": f"not done after {SECONDS_TO_ADD_UP} s" if alarmed else first.cause}
        lines = done.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else f"its agent ended with code {done.returncode}"}
