"""submit.sbatch: the plan as a Slurm batch script."""

from __future__ import annotations

import math

from launcher.planning.plan import Plan
from launcher.render.place import AGENT, ENTRY, PREPARE, Place, quoted, variables

_SLACK_SECONDS = 60
"""Slurm sends the signal up to a minute late."""

_BODY = r"""if [ -e "$run/FINISHED" ]; then
  echo "$run is finished"
  exit 0
fi

attempt=1
while [ -e "$run/attempts/$(printf %04d "$attempt")" ]; do attempt=$((attempt + 1)); done
export LAUNCHER_ATTEMPT_DIRECTORY="$run/attempts/$(printf %04d "$attempt")"
mkdir -p -- "$LAUNCHER_ATTEMPT_DIRECTORY"

# Two jobs whose first nodes are one machine must not share a port: each derives its own from its number.
case "$SLURM_JOB_ID" in
  '' | *[!0-9]*) echo "SLURM_JOB_ID=$SLURM_JOB_ID is no number" >&2; exit 2 ;;
esac
port=$((20000 + 10#$SLURM_JOB_ID % 20000))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}

# Slurm signals every process of the step. The shell between srun and the agent takes what the agent passes up to its parent.
"""


def script(plan: Plan, place: Place) -> str:
    """The text of submit.sbatch. Every value from the plan or of a path is quoted."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(plan, place)), ""]
    lines += [f"run={quoted([place.run])}", f"rendered={quoted([place.rendered])}", f"python={quoted([place.python])}"]
    lines += [f"export {name}={value}" for name, value in variables(plan).items()]
    return "\n".join([*lines, "set -euo pipefail", "unset LAUNCHER_PARENT", "", PREPARE]) + _BODY + _step(plan)


def _options(plan: Plan, place: Place) -> list[str]:
    """sbatch's own options, each `--name=value`."""
    mesh, slurm = plan.mesh, plan.slurm
    cores = mesh.ranks_per_node * mesh.threads_per_rank
    signal = f"USR1@{math.ceil(plan.grace_seconds) + _SLACK_SECONDS}"
    options = {"job-name": plan.name, "nodes": str(mesh.nodes), "ntasks-per-node": "1", "cpus-per-task": str(cores)}
    if mesh.device == "cuda":
        options["gres"] = f"gpu:{mesh.ranks_per_node}"
    if slurm.time_limit_minutes is not None:
        options |= {"time": str(slurm.time_limit_minutes), "signal": signal}
    if not any(sign in place.rendered for sign in "\\%"):  # sbatch would read these as patterns
        options["output"] = f"{place.rendered}/slurm-%j.out"
    options |= {"open-mode": "append", **slurm.options}
    return [f"--{name}={_sbatch_quoted(value)}" for name, value in options.items()]


def _sbatch_quoted(value: str) -> str:
    """A value as sbatch reads it in an #SBATCH line: bare where it is plain, else in double quotes with backslashes before `"` and `\\`."""
    if value and all((sign.isalnum() and sign.isascii()) or sign in "-_.:,/=@%+[]" for sign in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _step(plan: Plan) -> str:
    mesh = plan.mesh
    srun = ["srun", f"--nodes={mesh.nodes}", f"--ntasks={mesh.nodes}", "--ntasks-per-node=1"]
    srun += [f"--cpus-per-task={mesh.ranks_per_node * mesh.threads_per_rank}", "--kill-on-bad-exit=1"]
    shell = ["bash", "-c", 'trap : HUP INT TERM USR1 USR2; "$@"; exit $?', "agent"]
    agent = ["-m", AGENT, f"--nnodes={mesh.nodes}", f"--nproc-per-node={mesh.ranks_per_node}", "--max-restarts=0", "--rdzv-backend=c10d"]
    lines = [quoted(srun), quoted(shell), f'"$python" {quoted(agent)}']
    lines += ['--rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-$attempt"', f'-m {ENTRY} "$run" --attempt "$attempt"']
    return " \\\n  ".join(lines) + "\n"
