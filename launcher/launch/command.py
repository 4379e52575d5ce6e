"""The command and the environment of an attempt."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.launch import gpu_env, malloc_env, rendezvous
from launcher.launch import script_run as scripts
from launcher.launch.agent import NODE_VARIABLE
from launcher.launch.fork_server import VARIABLE as WARM_VARIABLE
from launcher.launch.rendezvous import ATTEMPT_VARIABLE
from launcher.planner.hardware.detect import cpu_flags
from launcher.planner.plan import Plan
from launcher.redaction import is_variable_of_secret, redact, redact_all
from launcher.runs import cache, doors, secret
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import PARENT_VARIABLE

ENTRY = "launcher.training.entry"
_TRAINER = "launcher.training.attempt"
"""The module that every rank imports, which takes seconds."""
_PREFIXES = {
    "ACCELERATE",
    "CUDA",
    "DNNL",
    "DS",
    "GLOO",
    "HF",
    "LAUNCHER",
    "LD",
    "LRU",
    "MALLOC",
    "MKL",
    "NCCL",
    "NVIDIA",
    "OMP",
    "ONEDNN",
    "PYTORCH",
    "SLURM",
    "THP",
}
_MORE_PREFIXES = {"TOKENIZERS", "TORCH", "TRANSFORMERS", "TRITON", "XDG"}
_NAMES = {
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "TORCHELASTIC_ERROR_FILE",
}
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class Meeting:
    """The address where the agents of several nodes meet, and this agent's own node and address."""

    node: int
    address: str
    port: int
    own_address: str
    interface: str


def agent_command(
    run: RunDirectory,
    plan: Plan,
    attempt: int,
    stop_at: int | None = None,
    entry: str | None = None,
    meeting: Meeting | None = None,
) -> list[str]:
    """Return the command of an agent that runs `entry` on every rank of this machine; by default the trainer,
    or the plan's script."""
    program = [entry or (scripts.ENTRY if plan.script else ENTRY), str(run.path), "--attempt", str(attempt)]
    command = agent_of(plan.mesh.nodes, plan.mesh.ranks_per_node, meeting, program)
    if plan.script:
        return [*command, "--", *plan.script]
    return command if stop_at is None else [*command, "--stop-at", str(stop_at)]


def agent_of(num_nodes: int, num_ranks: int, meeting: Meeting | None, program: list[str]) -> list[str]:
    """Return the command of an agent that runs `program`, a module with its arguments, on every rank here.

    Numeric addresses need no name service. Each of several nodes knows its number, so that rank 0 is always on
    the first node.
    """
    endpoint = rendezvous.HERE if meeting is None else f"{meeting.address}:{meeting.port}"
    return [
        *(sys.executable, "-m", "launcher.launch.agent"),
        f"--nnodes={num_nodes}",
        f"--nproc-per-node={num_ranks}",
        "--max-restarts=0",
        f"--rdzv-backend={rendezvous.BACKEND}",
        f"--rdzv-endpoint={endpoint}",
        *([f"--local-addr={meeting.own_address}"] if meeting is not None else []),
        "--monitor-interval=0.1",
        *("-m", *program),
    ]


def environment(
    run: RunDirectory, plan: Plan, attempt: int, meeting: Meeting | None = None
) -> dict[str, str]:
    """Return the environment variables of the agent and the ranks."""
    interface = doors.loopback() if meeting is None else meeting.interface
    network = dict.fromkeys(doors.INTERFACE_VARIABLES, interface) if interface else {}
    if meeting is not None:
        network[secret.SECRET_VARIABLE] = str(run.attempt(attempt) / secret.NAME)
    if plan.mesh.device == "cpu":
        of_device = malloc_env.variables(run) | ({} if plan.script else {WARM_VARIABLE: _TRAINER})
    else:
        of_device = gpu_env.variables(run.attempt(attempt), os.environ)
    if plan.model.compile:
        # In the shared cache, because files on a node's own disk are gone after a Slurm job. One directory per
        # set of CPU flags, because code for one node's processor may not run on another's.
        flags = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:16]
        of_device["TORCHINDUCTOR_CACHE_DIR"] = str(cache.root() / "compiled" / flags)
    return {
        **of_device,
        **os.environ,
        "OMP_NUM_THREADS": str(plan.mesh.threads_per_rank),
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        "PYTHONUNBUFFERED": "1",
        # transformers uses the first visible GPU, whatever the plan says.
        **({"CUDA_VISIBLE_DEVICES": ""} if plan.mesh.device == "cpu" else {}),
        PARENT_VARIABLE: str(os.getpid()),
        ATTEMPT_VARIABLE: str(run.attempt(attempt)),
        NODE_VARIABLE: str(meeting.node if meeting else 0),
        **network,
        **(scripts.script_variables(run, plan, attempt) if plan.script else {}),
    }


def public(variables: dict[str, str]) -> dict[str, str]:
    """Return the variables that matter to a run and hold no secret, sorted by name."""
    matters = {
        name: value
        for name, value in variables.items()
        if name in _NAMES or name.split("_")[0] in _PREFIXES | _MORE_PREFIXES
    }
    kept = {name: value for name, value in matters.items() if not is_variable_of_secret(name)}
    return {
        name: redact(_PASSWORD_IN_URL.sub("://***@", value), variables)
        for name, value in sorted(kept.items())
    }


def write_command(path: Path, command: list[str], variables: dict[str, str]) -> None:
    """Write command.json: the command, its working directory and its environment."""
    content = {"command": redact_all(command), "directory": str(Path.cwd()), "environment": public(variables)}
    write_atomically(path, json.dumps(content, indent=2) + "\n")
