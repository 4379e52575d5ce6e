"""Looking at a job before it runs: here, on GPUs that are not here, on more of them, on other kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planning.decide import plan as decide
from launcher.planning.forecast import Forecast, forecast, why_not
from launcher.planning.gpus import NETWORKS, GpuType, as_hardware, gpu_type, seen
from launcher.planning.hardware import Hardware
from launcher.planning.memory import gib
from launcher.planning.plan import Plan

PER_NODE = 8
"""GPUs of a node where the job does not say."""


@dataclass(frozen=True)
class Outlook:
    """A plan and what is to be expected of it."""

    plan: Plan
    forecast: Forecast | None
    why_not: str | None = None
    """Why there is no forecast."""


@dataclass(frozen=True)
class Row:
    """One of several plans beside each other."""

    gpu: str
    plan: Plan
    forecast: Forecast | None

    def to_dict(self) -> dict[str, Any]:
        made = self.forecast.to_dict() if self.forecast else None
        return {"gpu": self.gpu, "gpus": self.plan.mesh.world_size, "batch": self.plan.batch.model_dump(), "forecast": made}

    def cells(self) -> list[str]:
        """What a table shows."""
        plan, made = self.plan, self.forecast
        passes = f"{plan.batch.micro_batch_size} x {plan.batch.accumulation_steps}"
        cut = f"{plan.engine} {plan.sharding}, {passes}, recompute {plan.activation_checkpointing}"
        if made is None:
            return [self.gpu, str(plan.mesh.world_size), *["?"] * 7, cut]
        s = made.speed
        rates = [f"{s.step:.2f}", f"{s.tokens_per_second:,.0f}", f"{s.utilisation:.0%}"] if s else ["?"] * 3
        hours = f"{s.step * plan.length.value / 3600:.2f}" if s and plan.length.unit == "steps" else "?"
        memory = [gib(made.footprint.highest.total), gib(made.memory_bytes), "yes" if made.fits else "no"]
        return [self.gpu, str(plan.mesh.world_size), *memory, *rates, hours, cut]


def look(job: Job, nproc: int | None = None, gpu: str | None = None, network: str | None = None) -> Outlook:
    """The plan of a job on this machine, or on GPUs of the table, and its forecast.

    Raises ConfigurationError for a GPU or a network that the table does not have.
    """
    speed_of_network = _network(network)
    if gpu is not None:
        made = _on(job, gpu_type(gpu), speed_of_network)
        return Outlook(made.plan, made.forecast, None if made.forecast else why_not(made.plan))
    hardware = Hardware.detect()
    plan = decide(job, nproc, hardware)
    memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    found = forecast(plan, memory, seen(hardware), speed_of_network)
    return Outlook(plan, found, None if found else why_not(plan))


def _network(name: str | None) -> float | None:
    if name is None:
        return None
    if name not in NETWORKS:
        raise ConfigurationError(Problem("--network", name, f"is not in the table; there are {', '.join(NETWORKS)}"))
    return NETWORKS[name]


def _on(job: Job, gpu: GpuType, network: float | None, num_gpus: int | None = None) -> Row:
    cluster = job.cluster
    per_node = PER_NODE if cluster.gpus_per_node in ("auto", 0) else int(cluster.gpus_per_node)
    nodes = cluster.nodes
    if num_gpus is not None:
        per_node = min(per_node, num_gpus)
        nodes = -(-num_gpus // per_node)
    changed = job.model_copy(
        update={"cluster": cluster.model_copy(update={"gpus_per_node": per_node, "ranks_per_node": "auto", "nodes": nodes})}
    )
    hardware = as_hardware(gpu, per_node)
    plan = decide(changed, None, hardware, local=False)
    return Row(gpu.key, plan, forecast(plan, gpu.memory_bytes, gpu, network))


def compare(job: Job, gpus: str, network: str | None = None) -> list[Row]:
    """The job on each of several kinds of GPU, by their names with commas."""
    wire = _network(network)
    return [_on(job, gpu_type(name), wire) for name in gpus.split(",")]


def scaled(job: Job, span: str, gpu: str | None, network: str | None = None) -> list[Row]:
    """The job on more and more GPUs, each time twice as many, `8..1024`; those that the batch cannot be cut over are left out."""
    first, _, last = span.partition("..")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise ConfigurationError(Problem("--scale", span, "is no span of numbers of GPUs; write 8..1024"))
    kind = gpu_type(gpu) if gpu is not None else seen(Hardware.detect())
    if kind is None:
        raise ConfigurationError(Problem("--scale", span, "needs to know the GPU, and there is none here; add --gpu h100-80gb"))
    rows, wire, number = [], _network(network), int(first)
    while number <= int(last):
        if job.batch.global_batch_size % number == 0:
            rows.append(_on(job, kind, wire, number))
        number *= 2
    if not rows:
        reason = (
            f"global_batch_size {job.batch.global_batch_size} cannot be cut over so many; the most is {job.batch.global_batch_size} GPUs"
        )
        raise ConfigurationError(Problem("--scale", span, reason))
    return rows
