"""Target of a plan: the machine of a job, and the device for a forecast."""

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
"""The share of a device's memory that a plan may fill; the rest is for estimation errors and other users."""
CORES_OF_A_GPU = 8
"""Cores per GPU of a node that is not here. Assumed; Slurm is asked for them."""
NODE_MEMORY = 1 << 40
"""Host memory in bytes of a GPU node that is not here. Assumed."""
GPUS_PER_NODE = 8
"""GPUs per node if their number is unknown."""


@dataclass(frozen=True)
class Target:
    """The device of a plan: everything that a forecast needs in addition to the plan."""

    memory_bytes: int = 0
    """Memory of one rank's device; 0 if unknown."""
    gpu: GpuType | None = None
    """The rates of that device; None if its speed is unknown."""
    host_memory_bytes: int = 0
    """Host memory of a node, for offloading; 0 if unknown."""
    disk_rate: float | None = None
    """Bytes per second of a node's disk, if measured."""

    def usable_bytes(self, device: str) -> int:
        """Return the bytes of the device's memory that a plan may fill."""
        return int(self.memory_bytes * USABLE[device])


def target_of(plan: Plan, hardware: Hardware, network: NetworkName | None = None) -> Target:
    """Return the device of one rank of a plan on this hardware, with nodes connected by `network`."""
    rates = rates_for(plan, hardware)
    memory_bytes = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    return Target(memory_bytes, rates and on_network(rates, network), hardware.memory_bytes)


def target_here(plan: Plan, hardware: Hardware, network: NetworkName | None = None) -> Target:
    """Return the device of one rank of a plan on this machine, whose disk may have been measured."""
    return replace(target_of(plan, hardware, network), disk_rate=Machine.read().disk_rate())


def target_of_job(job: Job, plan: Plan) -> Target:
    """Return the device that a job's cluster section describes.

    The memory of GPUs is unknown without `cluster.gpu`, and that of CPU nodes without `cluster.mem`.
    """
    host = node_memory(job.cluster)
    if plan.mesh.device == "cpu":
        return Target((host or 0) // plan.mesh.ranks_per_node)
    if job.cluster.gpu is None:
        return Target(host_memory_bytes=host or NODE_MEMORY)
    gpu = on_network(gpu_type(job.cluster.gpu, "cluster.gpu"), job.cluster.network)
    return Target(gpu.memory_bytes, gpu, host or NODE_MEMORY)


def hardware_of(job: Job, local: bool) -> Hardware:
    """Return the hardware of a job's nodes: this machine, or if not `local` the job's description.

    The job has to give kind and number of GPUs that are not here; otherwise this machine stands for a node.
    """
    cluster = job.cluster
    gpu = gpu_type(cluster.gpu, "cluster.gpu") if cluster.gpu is not None else None
    if not local and gpu is not None and cluster.gpus_per_node not in ("auto", 0):
        return node_of(cluster, gpu, int(cluster.gpus_per_node))
    here, memory = Hardware.detect(), node_memory(cluster)
    return here if local or memory is None else replace(here, memory_bytes=memory)


def node_of(cluster: Cluster, gpu: GpuType, num_gpus: int) -> Hardware:
    """Return a node with these GPUs that is not here; the login node's hardware tells nothing about it."""
    cores = cluster.cpus_per_node or CORES_OF_A_GPU * num_gpus
    return as_hardware(gpu, num_gpus, cores, node_memory(cluster) or NODE_MEMORY)
