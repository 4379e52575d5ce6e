"""`#SBATCH` lines and options of srun, read as keys of the cluster section."""

from __future__ import annotations

import re
from typing import Any

from launcher.importing.reading import Reading, as_number

_LONG = {
    "N": "nodes", "n": "ntasks", "t": "time", "p": "partition", "A": "account", "J": "job-name",
    "o": "output", "e": "error",
    "c": "cpus-per-task", "w": "nodelist", "x": "exclude", "C": "constraint", "q": "qos", "d": "dependency",
    "G": "gpus", "D": "chdir",
    "a": "array", "b": "begin", "i": "input", "M": "clusters", "L": "licenses", "m": "distribution",
    "S": "core-spec", "k": "no-kill",
    "H": "hold", "O": "overcommit", "s": "oversubscribe", "Q": "quiet", "v": "verbose", "W": "wait",
}  # fmt: skip
"""sbatch's short options; srun has the same, but for -K, -l, -u and -W."""
_SWITCHES = {
    "exclusive", "requeue", "no-requeue", "hold", "no-kill", "overcommit", "oversubscribe", "quiet",
    "verbose", "parsable", "wait-all-nodes", "contiguous", "spread-job", "use-min-nodes", "ignore-pbs",
    "reboot", "label", "unbuffered", "kill-on-bad-exit", "overlap", "exact", "whole", "pty", "l", "u", "K",
}  # fmt: skip
"""Options that have no value, or a value after `=`."""
_SAME = {
    "partition": "partition", "account": "account", "qos": "qos", "reservation": "reservation",
    "constraint": "constraint",
    "exclude": "exclude", "nodelist": "nodelist", "mem": "mem", "dependency": "dependency", "begin": "begin",
    "comment": "comment",
    "mail-user": "mail_user", "mail-type": "mail_type",
}  # fmt: skip
_OWN = {
    "output", "error", "open-mode", "signal", "ntasks", "ntasks-per-node", "input", "export", "quiet",
    "verbose", "parsable", "get-user-env", "chdir", "cpus-per-task", "gpu-bind", "cpu-bind", "distribution",
    "kill-on-bad-exit", "wait", "no-kill", "gpus-per-task", "ntasks-per-gpu", "tasks-per-node",
    "threads-per-core",
}  # fmt: skip
"""Options that launcher's script sets: one task per node, logs in the run directory, an early signal."""
_GPUS = ("gres", "gpus-per-node", "gpus", "gpus-per-task", "ntasks-per-gpu")


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options by their long names, and the words after them."""
    by_name: dict[str, str] = {}
    index = 0
    while index < len(words) and words[index].startswith("-") and len(words[index]) > 1:
        word = words[index]
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
        else:
            name, equals, value = _LONG.get(word[1], word[1]), word[2:3], word[2:].removeprefix("=")
        if not equals and name not in _SWITCHES and index + 1 < len(words):
            index += 1
            value = words[index]
        by_name[name] = value
        index += 1
    return by_name, words[index:]


def read(given: dict[str, str], reading: Reading) -> None:
    """Record the facts of sbatch's options about the cluster."""
    option = {name: f"#SBATCH --{name}" for name in given}
    for name in [name for name, value in given.items() if "$" in value or "`" in value]:
        text = "the shell fills this in; nothing is executed here, so write it yourself"
        reading.fill_in(option[name], given.pop(name)[:40], text)
    nodes = _nodes(given, reading)
    gpus(given, nodes, reading)
    if "job-name" in given:
        reading.record_once("name", given["job-name"], option["job-name"])
    if "time" in given:
        seconds = seconds_of(given["time"])
        if seconds is not None:
            reading.record("cluster.time_limit", int(seconds), option["time"])
        elif given["time"].upper() not in ("UNLIMITED", "INFINITE", "0"):
            reason = "write a time as Slurm has it: 30, 2:30:00, 1-12:00:00"
            reading.refuse(option["time"], given["time"], reason)
    for name, key in _SAME.items():
        if given.get(name):
            reading.record(f"cluster.{key}", given[name], option[name])
    if "exclusive" in given:
        reading.record("cluster.exclusive", True, option["exclusive"])
    if "no-requeue" in given:
        reading.record("cluster.requeue", False, option["no-requeue"])
    cores = as_number(given.get("cpus-per-task"))
    if cores:
        reading.record("cluster.cpus_per_node", int(cores) * _tasks(given, nodes), option["cpus-per-task"])
    if "array" in given:
        text = "one job here; `launcher sweep` makes an array of jobs that differ in keys"
        reading.cannot_say(option["array"], given["array"], text)
    read_keys = {
        "nodes", "job-name", "time", "exclusive", "requeue", "no-requeue", "array", *_SAME, *_GPUS, *_OWN,
    }  # fmt: skip
    for name, value in given.items():
        if name not in read_keys and re.fullmatch(r"[A-Za-z][\w-]*", name):
            reading.record(f"cluster.sbatch.{name}", value or True, option[name])
    if own := [option[name] for name in given if name in _OWN and name not in ("cpus-per-task", *_GPUS)]:
        text = (
            "launcher's own script says it: one task a node, logs in the run directory, a signal in time "
            "to save"
        )
        reading.ignore(", ".join(own), None, text)


def _tasks(given: dict[str, str], nodes: int | None) -> int:
    """Return the number of tasks on each node."""
    each = as_number(given.get("ntasks-per-node", given.get("tasks-per-node")))
    total = as_number(given.get("ntasks"))
    return max(1, int(each or (total or 1) // (nodes or 1)))


def _nodes(given: dict[str, str], reading: Reading) -> int | None:
    """Return the number of nodes, if it is a single number; record a range as a range."""
    value = given.get("nodes")
    if value is None:
        return None
    low, dash, high = value.partition("-")
    if dash and low.isdecimal() and high.isdecimal() and low != high:
        reading.record("cluster.nodes", value, "#SBATCH --nodes")
        return None
    count = reading.count({"nodes": low}, "nodes", "#SBATCH --")
    if count is not None:
        reading.record("mesh.nodes", count, "#SBATCH --nodes")
    return count


def gpus(given: dict[str, str], nodes: int | None, reading: Reading, prefix: str = "#SBATCH --") -> None:
    """Record the number and kind of GPUs on each node, and the option that requests them."""
    for name in _GPUS[:4]:
        value = given.get(name)
        if value is None:
            continue
        entry = next(
            (part for part in value.split(",") if name != "gres" or part.split(":")[0] == "gpu"), None
        )
        parts = [] if entry is None else re.sub(r"\(.*", "", entry).split(":")[1 if name == "gres" else 0 :]
        if entry is None:
            reading.record("cluster.sbatch.gres", value, prefix + name)
            continue
        number = int(parts.pop()) if parts and parts[-1].isdecimal() else 1
        if name == "gpus":
            number = number // (nodes or 1)
        elif name == "gpus-per-task":
            number *= _tasks(given, nodes)
        if number:
            reading.record("mesh.ranks_per_node", number, prefix + name)
            reading.record("mesh.device", "cuda", prefix + name)
        if parts and prefix.startswith("#"):
            reading.record("cluster.gpu_type", ":".join(parts), prefix + name)
        if name != "gres" and prefix.startswith("#"):
            reading.record("cluster.gpu_option", "gpus-per-node", prefix + name)
        return


def seconds_of(time: str) -> float | None:
    """Return Slurm's `30` (minutes), `30:00`, `2:30:00`, `1-12`, `1-12:30:00` as seconds; None for no
    limit, or for anything that is not a time."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())
    if match is None:
        return None
    days, *parts = (int(part) if part is not None else None for part in match.groups())
    first, second, third = (part or 0 for part in parts)
    if days is None and parts[2] is None:  # minutes, or minutes and seconds
        total = first * 60 + second
    else:
        total = (days or 0) * 86_400 + first * 3600 + second * 60 + third
    return float(total) or None


def of_srun(words: list[str], reading: Reading) -> None:
    """Record the nodes and GPUs that srun's own options request."""
    given, _ = options(words)
    kept: dict[str, Any] = {name: value for name, value in given.items() if "$" not in value}
    nodes = None
    if (
        "nodes" in kept
        and (nodes := reading.count({"nodes": kept["nodes"].partition("-")[0]}, "nodes", "srun --"))
        is not None
    ):
        reading.record("mesh.nodes", nodes, "srun --nodes")
    gpus(kept, nodes, reading, "srun --")
