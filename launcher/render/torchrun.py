"""torchrun.txt: the commands that start the plan by hand."""

from __future__ import annotations

from launcher.planning.plan import Plan
from launcher.render.place import AGENT, ENTRY, PREPARE, Place, quoted, variables

_PORT = 29500


def command(plan: Plan, place: Place, attempt: int = 1) -> str:
    """The shell lines to start the plan: on one machine as they stand, on several once on each, with HEAD set.

    The agent is torchrun's own with better manners; `python -m torch.distributed.run` takes the same arguments.
    """
    mesh = plan.mesh
    several = mesh.nodes > 1
    lines = ["# Once on each node. Set HEAD to the first node's name on all of them." if several else "# Once, in bash."]
    lines += [f"run={quoted([place.run])}", f"rendered={quoted([place.rendered])}", PREPARE.rstrip("\n")]
    lines += [f"export {name}={value}" for name, value in variables(plan).items()]
    lines += [f'export LAUNCHER_ATTEMPT_DIRECTORY="$run/attempts/{attempt:04d}"']
    agent = [place.python, "-m", AGENT, f"--nnodes={mesh.nodes}", f"--nproc-per-node={mesh.ranks_per_node}"]
    agent += ["--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-id={plan.name}-{attempt}"]
    endpoint = f'--rdzv-endpoint="${{HEAD:?set it to the name of the first node}}:{_PORT}"' if several else "--rdzv-endpoint=127.0.0.1:0"
    local = "" if several else " --local-addr=127.0.0.1"
    return "\n".join([*lines, f'{quoted(agent)} {endpoint}{local} -m {ENTRY} "$run" --attempt {attempt}']) + "\n"
