"""The rendering of submit.sbatch, in full or in the parts that submitit takes."""

from __future__ import annotations

from collections.abc import Collection

from launcher.planner.plan import Container, Plan
from launcher.render.launch_paths import AFTER, NODE, PREPARE, Place, quoted, variables

SIGNAL_SECONDS = 30
"""The seconds before the time limit at which Slurm sends its signal, which may come up to a minute early. If a
save takes longer, the ranks stop sooner by their own clock."""
PATIENT = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh"]
"""The prefix of a command that handles that signal: until it can, the signal must not kill it. Ignored signals
are inherited by exec."""

_OF_AN_ALLOCATION = {
    "SLURM_MEM_PER_CPU": "mem-per-cpu",
    "SLURM_MEM_PER_GPU": "mem-per-gpu",
    "SLURM_MEM_PER_NODE": "mem",
    "SLURM_CPUS_PER_GPU": "cpus-per-gpu",
    "SLURM_GPUS": "gpus",
    "SLURM_GPUS_PER_NODE": "gpus-per-node",
    "SLURM_GPUS_PER_TASK": "gpus-per-task",
    "SLURM_GPUS_PER_SOCKET": "gpus-per-socket",
    "SLURM_GPU_BIND": "gpu-bind",
    "SLURM_NTASKS_PER_GPU": "ntasks-per-gpu",
    "SLURM_NTASKS_PER_CORE": "ntasks-per-core",
    "SLURM_NTASKS_PER_SOCKET": "ntasks-per-socket",
    "SLURM_TRES_PER_TASK": "tres-per-task",
}
"""The variables that srun reads as its options, with the sbatch option for which Slurm sets each. If this job
does not set that option, the variable is left over from another job."""
_OF_A_STEP = ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "PMI")
"""The prefixes of variables that only a step of another job can have left: cores that this job may not have,
and the connection to that step."""


def script(plan: Plan, place: Place) -> str:
    """Return the text of submit.sbatch, with every value of the plan and every path quoted."""
    requested = options(plan) | {"signal": f"USR2@{SIGNAL_SECONDS}"}
    if not any(sign in place.rendered for sign in "\\%"):  # sbatch would read these as patterns
        requested |= {"output": f"{place.rendered}/slurm-%j.out"}
    lines = ["#!/bin/bash"]
    lines += [
        f"#SBATCH --{name}" + (f"={_sbatch_quoted(value)}" if value else "")
        for name, value in requested.items()
    ]
    lines += [
        "",
        f"run={quoted([place.run])}",
        f"rendered={quoted([place.rendered])}",
        PREPARE.rstrip("\n"),
        *before(plan, place),
        "",
    ]
    srun = quoted(["srun", *srun_options(plan, place)])
    return "\n".join([*lines, f'{srun} \\\n  {python_command(plan, place)} -u -m {NODE} "$run"']) + "\n"


def options(plan: Plan) -> dict[str, str]:
    """Return sbatch's long options by name; an empty text for one without a value."""
    mesh, slurm = plan.mesh, plan.slurm
    cores = slurm.cpus_per_node or mesh.ranks_per_node * mesh.threads_per_rank
    requested = {"job-name": plan.name, "nodes": slurm.nodes or str(mesh.nodes), "cpus-per-task": str(cores)}
    if slurm.nodes is None:
        requested["ntasks-per-node"] = "1"  # with a range Slurm would then give the fewest (seen with 22.05)
    if mesh.device == "cuda":
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        requested |= (
            {"gres": f"gpu:{kind}{mesh.ranks_per_node}"}
            if slurm.gpu_option == "gres"
            else {"gpus-per-node": f"{kind}{mesh.ranks_per_node}"}
        )
    if slurm.time_limit_minutes is not None:
        requested["time"] = str(slurm.time_limit_minutes)
    more = dict(slurm.options)
    if "gres" in requested and "gres" in more:
        more["gres"] = f"{requested['gres']},{more['gres']}"  # for example a GPU and a local disk
    return requested | {"open-mode": "append", "requeue" if slurm.requeue else "no-requeue": "", **more}


def before(plan: Plan, place: Place) -> list[str]:
    """Return the lines before the ranks start: a trap that runs the after-job decision in any case, then the
    site's set-up, of which no line may fail."""
    slurm = plan.slurm
    exported = {**variables(plan), **slurm.environment}
    if place.code:
        # Otherwise Python would search the working directory first, where the code may have changed since.
        theirs = slurm.environment.get("PYTHONPATH")
        exported |= {"PYTHONPATH": f"{place.code}:{theirs}" if theirs else place.code, "PYTHONSAFEPATH": "1"}
    after = f'{quoted([place.python, "-m", AFTER, place.run])} "$1"'
    return [
        "# The shell outlives the signals that the ranks get, and hands over what came of them.",
        "trap : HUP INT TERM USR1 USR2",
        # A requeue makes Slurm end this shell: the process that requests it must not die of that.
        f"after() {{ trap '' TERM; exec {after}; }}",
        "trap 'after $?' EXIT",
        "# Of a job that this one was submitted from, what srun would go by. What memory and GPUs this "
        "job has, srun knows from Slurm.",
        *_forgotten(options(plan)),
        "unset LAUNCHER_PARENT",
        *_exports(exported),
        *(
            ["set -e", *(f"module load {quoted([name])}" for name in slurm.modules), *slurm.setup, "set +e"]
            if slurm.modules or slurm.setup
            else []
        ),
    ]


def _forgotten(requested: Collection[str]) -> list[str]:
    names = [name for name, option in _OF_AN_ALLOCATION.items() if option not in requested]
    beginnings = [
        f"${{!{name}*}}" for name in _OF_A_STEP if name != "SLURM_MEM_BIND" or "mem-bind" not in requested
    ]
    return [f"unset {' '.join(names)}", f"unset {' '.join(beginnings)}"]


def _exports(exported: dict[str, str]) -> list[str]:
    lines = []
    for name, value in exported.items():
        rest = "${PYTHONPATH:+:$PYTHONPATH}" if name == "PYTHONPATH" else ""
        lines.append(f"export {name}={quoted([value])}{rest}")
    return lines


def srun_options(plan: Plan, place: Place) -> list[str]:
    """Return srun's options for one task on each node. No task ends the others: the first node does that, and
    knows the reason.

    A task gets the variables that the script exports, even if the script itself started with an empty
    environment (sbatch --export=NONE).
    """
    cores = plan.slurm.cpus_per_node or plan.mesh.ranks_per_node * plan.mesh.threads_per_rank
    given = [
        "--ntasks-per-node=1",
        f"--cpus-per-task={cores}",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        "--wait=0",
    ]
    container = plan.slurm.container
    if container is None or container.runtime != "pyxis":
        return given
    return [
        *given,
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(container, place))}",
        *container.options,
    ]


def python_command(plan: Plan, place: Place) -> str:
    """Return the shell words that start the interpreter on the nodes, inside the container if there is one."""
    container = plan.slurm.container
    if container is None:
        return quoted([*PATIENT, place.python])
    if container.runtime == "pyxis":
        return quoted([*PATIENT, container.python])
    gpus = ["--nv"] if plan.mesh.device == "cuda" else []
    binds = [word for mount in _mounts(container, place) for word in ("--bind", mount)]
    return quoted(
        [*PATIENT, "apptainer", "exec", *gpus, *binds, *container.options, container.image, container.python]
    )


def _mounts(container: Container, place: Place) -> list[str]:
    """Return the mounts: the run directory at its own path, and those of the job."""
    return [
        f"{place.run}:{place.run}",
        *(mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts),
    ]


def _sbatch_quoted(value: str) -> str:
    """Return a value for an #SBATCH line: bare if it is plain, else in double quotes with backslashes before
    `"` and `\\`."""
    if all((sign.isalnum() and sign.isascii()) or sign in "-_.:,/=@%+[]" for sign in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
