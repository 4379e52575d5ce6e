"""submit.sbatch: the plan as a Slurm batch script; and the same in parts, for whoever submits it otherwise."""

from __future__ import annotations

from launcher.planning.plan import Container, Plan
from launcher.render.place import AFTER, NODE, PREPARE, Place, quoted, variables

SIGNAL_SECONDS = 30
"""How long before the time limit Slurm sends its signal; it may come up to a minute early. The ranks' own clock stops them sooner where a
save takes longer."""
PATIENT = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh"]
"""Before a command that is to heed that signal: until it can, it must not die of it. Signals that a process ignores it hands on."""


def script(plan: Plan, place: Place) -> str:
    """The text of submit.sbatch. Every value from the plan or of a path is quoted."""
    asked = options(plan) | {"signal": f"USR2@{SIGNAL_SECONDS}"}
    if not any(sign in place.rendered for sign in "\\%"):  # sbatch would read these as patterns
        asked |= {"output": f"{place.rendered}/slurm-%j.out"}
    lines = ["#!/bin/bash", *(f"#SBATCH {_option(name, value)}" for name, value in asked.items()), ""]
    lines += [f"run={quoted([place.run])}", f"rendered={quoted([place.rendered])}", PREPARE.rstrip("\n"), *before(plan, place), ""]
    srun = quoted(["srun", *srun_options(plan, place)])
    return "\n".join([*lines, f'{srun} \\\n  {python_command(plan, place)} -u -m {NODE} "$run"']) + "\n"


def options(plan: Plan) -> dict[str, str]:
    """sbatch's long options by name; empty text for one that takes no value."""
    mesh, slurm = plan.mesh, plan.slurm
    cores = slurm.cpus_per_node or mesh.ranks_per_node * mesh.threads_per_rank
    asked = {"job-name": plan.name, "nodes": slurm.nodes or str(mesh.nodes), "cpus-per-task": str(cores)}
    if slurm.nodes is None:
        asked["ntasks-per-node"] = "1"  # of a range it would have Slurm give the fewest (seen with 22.05)
    if mesh.device == "cuda":
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        asked |= (
            {"gres": f"gpu:{kind}{mesh.ranks_per_node}"}
            if slurm.gpu_option == "gres"
            else {"gpus-per-node": f"{kind}{mesh.ranks_per_node}"}
        )
    if slurm.time_limit_minutes is not None:
        asked["time"] = str(slurm.time_limit_minutes)
    return asked | {"open-mode": "append", "requeue" if slurm.requeue else "no-requeue": "", **slurm.options}


def before(plan: Plan, place: Place) -> list[str]:
    """The lines before the ranks start: what is decided after them, come what may, then the site's set-up, of which no line may fail."""
    slurm = plan.slurm
    exported = {**variables(plan), **slurm.environment}
    if place.code:
        # Python would look into the working directory first, where the code may have been edited since.
        theirs = slurm.environment.get("PYTHONPATH")
        exported |= {"PYTHONPATH": f"{place.code}:{theirs}" if theirs else place.code, "PYTHONSAFEPATH": "1"}
    after = f'{quoted([place.python, "-m", AFTER, place.run])} "$1"'
    return [
        "# The shell outlives the signals that the ranks get, and hands over what came of them.",
        "trap : HUP INT TERM USR1 USR2",
        # A request to go on has Slurm end this shell: whoever makes it must not die of that.
        f"after() {{ trap '' TERM; exec {after}; }}",
        "trap 'after $?' EXIT",
        "unset LAUNCHER_PARENT",
        *_exports(exported),
        *(
            ["set -e", *(f"module load {quoted([name])}" for name in slurm.modules), *slurm.setup, "set +e"]
            if slurm.modules or slurm.setup
            else []
        ),
    ]


def _exports(exported: dict[str, str]) -> list[str]:
    lines = []
    for name, value in exported.items():
        rest = "${PYTHONPATH:+:$PYTHONPATH}" if name == "PYTHONPATH" else ""
        lines.append(f"export {name}={quoted([value])}{rest}")
    return lines


def srun_options(plan: Plan, place: Place) -> list[str]:
    """One task on each node, none of which ends the others: the first node does that, and knows why."""
    cores = plan.slurm.cpus_per_node or plan.mesh.ranks_per_node * plan.mesh.threads_per_rank
    given = ["--ntasks-per-node=1", f"--cpus-per-task={cores}", "--kill-on-bad-exit=0", "--wait=0"]
    container = plan.slurm.container
    if container is None or container.runtime != "pyxis":
        return given
    return [*given, f"--container-image={container.image}", f"--container-mounts={','.join(_mounts(container, place))}", *container.options]


def python_command(plan: Plan, place: Place) -> str:
    """What starts the interpreter on the nodes as shell words, inside its container where there is one."""
    container = plan.slurm.container
    if container is None:
        return quoted([*PATIENT, place.python])
    if container.runtime == "pyxis":
        return quoted([*PATIENT, container.python])
    gpus = ["--nv"] if plan.mesh.device == "cuda" else []
    binds = [word for mount in _mounts(container, place) for word in ("--bind", mount)]
    return quoted([*PATIENT, "apptainer", "exec", *gpus, *binds, *container.options, container.image, container.python])


def _mounts(container: Container, place: Place) -> list[str]:
    """The run directory at its own place, and what the job names."""
    return [f"{place.run}:{place.run}", *(mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts)]


def _option(name: str, value: str) -> str:
    return f"--{name}={_sbatch_quoted(value)}" if value else f"--{name}"


def _sbatch_quoted(value: str) -> str:
    """A value as sbatch reads it in an #SBATCH line: bare where it is plain, else in double quotes with backslashes before `"` and `\\`."""
    if all((sign.isalnum() and sign.isascii()) or sign in "-_.:,/=@%+[]" for sign in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
