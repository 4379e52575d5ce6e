"""The rendering of torchrun.txt: the commands that start a plan by hand."""

from __future__ import annotations

from launcher.planner.plan import Plan
from launcher.render.launch_paths import AGENT, ENTRY, PREPARE, Place, quoted, variables

_PORT = 29500


def command(plan: Plan, place: Place, attempt: int = 1) -> str:
    """Return the shell lines that start the plan: on one machine as they are, on several once on each, with HEAD
    and NODE set.

    The agent is an adapted torchrun (launcher/launch/agent.py); agents and ranks meet where other users cannot
    reach them (launcher/launch/rendezvous.py).
    """
    mesh = plan.mesh
    several = mesh.nodes > 1
    comment = (
        "# Once on each node. Set HEAD to the first node's name on all of them, and NODE to 0 there and to "
        "1, 2 ... on the others."
    )
    lines = [comment if several else "# Once, in bash."]
    lines += [f"run={quoted([place.run])}", f"rendered={quoted([place.rendered])}", PREPARE.rstrip("\n")]
    lines += [f"export {name}={value}" for name, value in variables(plan).items()]
    lines += [f'export LAUNCHER_ATTEMPT_DIRECTORY="$run/attempts/{attempt:04d}"']
    if several:
        lines += [
            f'export LAUNCHER_NODE="${{NODE:?set it to the number of this node, from 0 to {mesh.nodes - 1}}}"'
        ]
    agent = [place.python, "-m", AGENT, f"--nnodes={mesh.nodes}", f"--nproc-per-node={mesh.ranks_per_node}"]
    agent += ["--max-restarts=0", "--rdzv-backend=launcher"]
    endpoint = f'"${{HEAD:?set it to the name of the first node}}:{_PORT}"' if several else "this-machine"
    return (
        "\n".join(
            [*lines, f'{quoted(agent)} --rdzv-endpoint={endpoint} -m {ENTRY} "$run" --attempt {attempt}']
        )
        + "\n"
    )
