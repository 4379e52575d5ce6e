"""Where a plan runs: the machine of a job, and the device that a forecast counts with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.job.cluster import NetworkName
from launcher.job.schema import Cluster, Job
from launcher.planner.hardware.calibration import rates_for
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import GpuType, as_hardware, gpu_type, on_network
from launcher.planner.plan import Plan
from launcher.planner.resolve.slurm_request import node_memory
from launcher.runs.machine import Machine

USABLE = {"cuda": 0.95, "cpu": 0.9}
"""What a plan may fill of a device's memory; the rest is what the formulas miss and what else lives there."""
CORES_OF_A_GPU = 8
"""Cores of a node that is not here, for each of its GPUs. Assumed; Slurm is asked for them."""
NODE_MEMORY = 1 << 40
"""Bytes of the memory of a node with GPUs that is not here. Assumed."""
GPUS_PER_NODE = 8
"""GPUs of a node where nothing says how many it has."""


@dataclass(frozen=True)
class Target:
    """The device that a plan is for: everything but the plan that its forecast counts with."""

    memory_bytes: int = 0
    """Of one rank's device; 0 where it is not known."""
    gpu: GpuType | None = None
    """The rates of that device; None where nothing is known of its speed."""
    host_memory_bytes: int = 0
    """Of a node's own memory, for what is offloaded; 0 where it is not known."""
    disk_rate: float | None = None
    """Bytes a second of a node's disk, where it was measured."""

    def usable_bytes(self, device: str) -> int:
        """Return the bytes of the device's memory that a plan may fill."""
        return int(self.memory_bytes * USABLE[device])


def target_of(plan: Plan, hardware: Hardware, network: NetworkName | None = None) -> Target:
    """Return the device of one rank of a plan on such hardware, with its nodes joined by `network`."""
    rates = rates_for(plan, hardware)
    memory_bytes = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    return Target(memory_bytes, rates and on_network(rates, network), hardware.memory_bytes)


def target_here(plan: Plan, hardware: Hardware, network: NetworkName | None = None) -> Target:
    """Return the device of one rank of a plan on this machine, whose disk may have been measured."""
    return replace(target_of(plan, hardware, network), disk_rate=Machine.read().disk_rate())


def target_of_job(job: Job, plan: Plan) -> Target:
    """Return the device that a job's cluster section describes.

    Nothing is known of the memory of GPUs without `cluster.gpu`, and of CPU nodes without `cluster.mem`.
    """
    host = node_memory(job.cluster)
    if plan.mesh.device == "cpu":
        return Target((host or 0) // plan.mesh.ranks_per_node)
    if job.cluster.gpu is None:
        return Target(host_memory_bytes=host or NODE_MEMORY)
    gpu = on_network(gpu_type(job.cluster.gpu, "cluster.gpu"), job.cluster.network)
    return Target(gpu.memory_bytes, gpu, host or NODE_MEMORY)


def hardware_of(job: Job, local: bool) -> Hardware:
    """Return the hardware of a job's nodes: this machine, or where it is not `local` what the job describes.

    Of GPUs that are not here the job has to say which and how many; otherwise this machine stands for a node.
    """
    cluster = job.cluster
    gpu = gpu_type(cluster.gpu, "cluster.gpu") if cluster.gpu is not None else None
    if not local and gpu is not None and cluster.gpus_per_node not in ("auto", 0):
        return node_of(cluster, gpu, int(cluster.gpus_per_node))
    here, memory = Hardware.detect(), node_memory(cluster)
    return here if local or memory is None else replace(here, memory_bytes=memory)


def node_of(cluster: Cluster, gpu: GpuType, num_gpus: int) -> Hardware:
    """Return a node with such GPUs that is not here; what a login node has says nothing of it."""
    cores = cluster.cpus_per_node or CORES_OF_A_GPU * num_gpus
    return as_hardware(gpu, num_gpus, cores, node_memory(cluster) or NODE_MEMORY)
