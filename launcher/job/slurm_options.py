"""Options of sbatch that exclude each other, have a key of their own, or belong to launcher.

From the manual of sbatch. Slurm 22.05 takes `hint` beside `threads-per-core`, `exclusive` beside
`oversubscribe`, and goes by one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

EXCLUSIVE = (
    frozenset({"mem", "mem-per-cpu", "mem-per-gpu"}),
    frozenset({"core-spec", "thread-spec"}),
    frozenset({"hint", "threads-per-core"}),
    frozenset({"hint", "extra-node-info"}),
    frozenset({"nodelist", "nodefile"}),
    frozenset({"exclusive", "oversubscribe"}),
)
"""Sets of options of which one can count."""

BY_NAME = (
    *("partition", "account", "qos", "reservation", "constraint", "exclude", "nodelist"),
    *("mem", "dependency", "begin", "comment"),
)
"""Options whose key of `cluster` has their name, and which Slurm alone reads."""
KEYS = {
    **{name: f"cluster.{name}" for name in ("nodes", *BY_NAME, "requeue")},
    "mail-user": "cluster.mail_user",
    "mail-type": "cluster.mail_type",
    "job-name": "name",
    "time": "cluster.time_limit",
    "cpus-per-task": "cluster.cpus_per_node",
    "cpus-per-gpu": "cluster.cpus_per_node",
    "gpus": "cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "gpus-per-task": "cluster.gpus_per_node",
    "gpus-per-socket": "cluster.gpus_per_node",
    "no-requeue": "cluster.requeue",
}
"""Options that a key of the job file says, which is also what the plan goes by."""

_ONE_TASK = (
    "launcher starts one task on each node, and the ranks under it; say how many ranks by "
    "cluster.ranks_per_node"
)
_ANSWER = "launcher reads sbatch's answer, and goes by it"
DECIDED = {
    **dict.fromkeys(
        (
            "ntasks",
            "ntasks-per-node",
            "ntasks-per-core",
            "ntasks-per-socket",
            "ntasks-per-gpu",
            "tres-per-task",
        ),
        _ONE_TASK,
    ),
    **dict.fromkeys(("parsable", "quiet", "test-only", "wait"), _ANSWER),
    "wrap": "launcher hands over a script of its own",
    "array": "a run is one job; for several runs see `launcher sweep`",
    "open-mode": "every attempt of a job writes on in the same files",
    "signal": "launcher has itself warned before the time limit, early enough for a save",
}
"""Options that a job cannot give, by the reason."""

_LETTERS = {
    "A": "account",
    "C": "constraint",
    "J": "job-name",
    "N": "nodes",
    "c": "cpus-per-task",
    "d": "dependency",
    "n": "ntasks",
}
_LETTERS |= {
    "p": "partition",
    "q": "qos",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
    "S": "core-spec",
    "F": "nodefile",
    "G": "gpus",
}
_LETTERS |= {
    "a": "array",
    "b": "begin",
    "s": "oversubscribe",
    "B": "extra-node-info",
    "m": "distribution",
    "H": "hold",
    "D": "chdir",
}


def long_name(option: str) -> str:
    """Return the name that sbatch reads of an option written otherwise: one letter, with `_`, or cut short."""
    name = _LETTERS.get(option, option.replace("_", "-").lower() if len(option) > 1 else option)
    known = {*KEYS, *DECIDED, *(member for group in EXCLUSIVE for member in group)}
    longer = sorted(one for one in known if one.startswith(name))
    return longer[0] if len(longer) == 1 and len(name) > 2 else name


def is_asked(value: object) -> bool:
    """Return whether a value in a job file asks for its option: false takes it back."""
    return value is not None and value is not False


def rivals(options: Collection[str]) -> set[str]:
    """Return every option that one of these excludes."""
    return {other for group in EXCLUSIVE for name in group.intersection(options) for other in group - {name}}


def named(cluster: Mapping[str, Any]) -> set[str]:
    """Return the options of sbatch that a `cluster` of a job file or a profile asks for, by its own keys and
    in its `sbatch`."""
    more = cluster.get("sbatch")
    given = [(key, value) for key, value in cluster.items() if key != "sbatch"]
    given += list(more.items()) if isinstance(more, Mapping) else []
    return {str(key).replace("_", "-") for key, value in given if is_asked(value)}


def without(cluster: Mapping[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """Return a copy of such a `cluster` that does not ask for these options."""
    left_out = set(options)
    kept = {key: value for key, value in cluster.items() if key.replace("_", "-") not in left_out}
    if isinstance(more := kept.get("sbatch"), Mapping):
        kept["sbatch"] = {
            key: value for key, value in more.items() if str(key).replace("_", "-") not in left_out
        }
    return kept
