"""Write a site profile as commented YAML."""

from __future__ import annotations

import json
import re

from launcher.launch.slurm.site import Partition, Site

_PLAIN = re.compile(r"^[A-Za-z][A-Za-z0-9_.-]*$")
_WORD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.:-]*$")
_TAKEN_FOR_OTHERS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Words that YAML does not read as text."""


def text(site: Site, chosen: Partition | None) -> str:
    """Return the YAML; `chosen` is the partition of jobs that name none."""
    lines = [
        f"# The cluster {site.name}, as `launcher profile` found it. A job takes it with `cluster: "
        f"{{profile: {site.name}}}`;"
    ]
    lines += ["# what stands in the job file goes before what stands here.", "cluster:"]
    lines += [f"  {line}" for line in _cluster(site, chosen)]
    lines += ["", "# What a job is refused over, before Slurm is asked.", "limits:"]
    for partition in site.partitions:
        lines += [f"  {line}" for line in _limits(partition)]
    return "\n".join(lines) + "\n"


def _cluster(site: Site, chosen: Partition | None) -> list[str]:
    if chosen is None:
        lines = ["# partition: the site has no default; name one of those below"]
    else:
        lines = [f"partition: {_scalar(chosen.name)}{'  # the default here' if chosen.is_default else ''}"]
    lines += [
        f"account: {_scalar(site.account)}"
        if site.account
        else "# account: Slurm knows no default account of yours"
    ]
    return [
        *lines,
        *_gpus(site, chosen),
        "# What Slurm cannot know, for you to fill in:",
        "# modules: [cuda]",
        "# setup: [source /path/of/your/environment.sh]",
    ]


def _gpus(site: Site, chosen: Partition | None) -> list[str]:
    usual = chosen.usual_gpus if chosen and site.takes_gres else 0
    if not site.takes_gres:
        return ["gpus_per_node: 0  # Slurm hands out no GPUs here (GresTypes has no gpu)"]
    differs = (
        ""
        if chosen is None or chosen.is_uniform
        else f"  # nodes of this partition differ: up to {chosen.gpus_per_node}"
    )
    lines = [f"gpus_per_node: {usual}{differs or ('' if usual else '  # trains on CPUs')}"]
    lines += [
        "gpu_option: gres  # --gres=gpu:N; gpus-per-node asks with --gpus-per-node=N, for sites that "
        "want that"
    ]
    types = sorted({name for partition in site.partitions for name in partition.gpu_types})
    everywhere = all(
        partition.gpu_types == tuple(types) for partition in site.partitions if partition.gpus_per_node
    )
    if len(types) == 1 and everywhere and usual and _WORD.match(types[0]):
        lines += [f"gpu_type: {_scalar(types[0])}"]
    elif types:
        lines += [f"# gpu_type: any of them unless named: {', '.join(map(_comment, types))}"]
    return lines


def _limits(partition: Partition) -> list[str]:
    known = {
        "max_nodes": partition.max_nodes,
        "max_time": duration(partition.max_time),
        "gpus_per_node": partition.gpus_per_node,
        "cpus_per_node": partition.cpus_per_node,
    }
    inner = ", ".join(f"{key}: {value}" for key, value in known.items() if value is not None)
    return [f"# {'; '.join(_remarks(partition))}", f"{_scalar(partition.name)}: {{{inner}}}"]


def _remarks(partition: Partition) -> list[str]:
    remarks = [f"{partition.num_nodes} nodes"]
    if partition.memory_per_node:
        remarks.append(f"{partition.memory_per_node / 1024:.0f} GiB each")
    if partition.threads_per_core > 1:
        remarks.append(f"{partition.threads_per_core} of the cpus are one core")
    if partition.gpu_types:
        remarks.append(f"GPUs are called {', '.join(map(_comment, partition.gpu_types))}")
    if not partition.is_uniform:
        remarks.append("nodes differ, these are the largest")
    if partition.max_time is None:
        remarks.append("no time limit")
    if partition.accounts:
        remarks.append(f"only for accounts {', '.join(map(_comment, partition.accounts))}")
    if not partition.is_up:
        remarks.append("not up at the moment")
    return remarks


def duration(seconds: float | None) -> str | None:
    """Return a time in the largest unit in which it is whole."""
    if seconds is None:
        return None
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def _scalar(value: str) -> str:
    """Text that YAML reads as the same text: JSON's string, where it is not plain."""
    return value if _PLAIN.match(value) and value.lower() not in _TAKEN_FOR_OTHERS else json.dumps(value)


def _comment(value: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", value)
