"""Decide a submission's request to Slurm, and refuse what a site profile does not allow."""

from __future__ import annotations

from pathlib import Path

from launcher.job import profile
from launcher.job.cluster import node_range
from launcher.job.schema import Cluster
from launcher.job.slurm_options import BY_NAME
from launcher.planner.decider import Decider
from launcher.planner.plan import Slurm

_MAIL = {"mail_user": "mail-user", "mail_type": "mail-type"}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def node_memory(cluster: Cluster) -> int | None:
    """Return a node's memory in bytes from `cluster.mem`, which is in MiB without a unit; None if it is not
    set, or is 0 (all of it)."""
    text = (cluster.mem or "").strip().upper().removesuffix("B")
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, _UNITS["M"])
    return int(number) * unit or None if number.isdigit() else None


def request(decider: Decider, num_gpus: int) -> Slurm:
    """Return the plan's settings for Slurm. num_gpus: GPUs per node."""
    cluster = decider.job.cluster
    if cluster.profile is not None:
        decider.problems += profile.problems(
            cluster, node_range(cluster.nodes)[1], num_gpus, profile.read(Path(cluster.profile))[0]
        )
    options = {name: value for name in BY_NAME if (value := getattr(cluster, name)) is not None}
    options |= {
        option: value for name, option in _MAIL.items() if (value := getattr(cluster, name)) is not None
    }
    options |= {"exclusive": ""} if cluster.exclusive else {}
    options |= {
        name: "" if value is True else str(value)
        for name, value in cluster.sbatch.items()
        if value is not False
    }
    low, high = node_range(cluster.nodes)
    return Slurm(
        nodes=f"{low}-{high}" if low < high else None,
        time_limit_minutes=None if cluster.time_limit is None else max(1, int(cluster.time_limit // 60)),
        options=options,
        gpu_option=cluster.gpu_option,
        gpu_type=cluster.gpu_type,
        cpus_per_node=cluster.cpus_per_node,
        modules=cluster.modules,
        setup=cluster.setup,
        environment=cluster.environment,
        container=cluster.container,
        interface=cluster.interface,
        requeue=cluster.requeue,
        attempts_without_progress=cluster.attempts_without_progress,
    )
