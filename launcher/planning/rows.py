"""Plan a job on GPUs that are not here, as one row of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planning.alternatives import Offloading
from launcher.planning.decide import elsewhere
from launcher.planning.decide import plan as decide
from launcher.planning.forecast import Forecast, Trace, forecast
from launcher.planning.gpus import NETWORKS, GpuType, gpu_type, on_network, seen
from launcher.planning.hardware import Hardware
from launcher.planning.memory import gib
from launcher.planning.nearest import PER_NODE
from launcher.planning.plan import Plan


@dataclass(frozen=True)
class Row:
    """One of several plans beside each other."""

    gpu: str
    plan: Plan
    forecast: Forecast | None
    price: float | None = None
    """Of one GPU and hour."""
    why_not: str | None = None
    """Why it will not do, where one was sought that does."""

    @property
    def hours(self) -> float | None:
        """To the end of training; None where it is not known how many steps an epoch has, or how fast they are."""
        lasts = self.forecast and self.forecast.duration
        return lasts.total / 3600 if lasts else None

    @property
    def cost(self) -> float | None:
        """Of all GPUs to the end of training."""
        return None if self.hours is None or self.price is None else self.hours * self.plan.mesh.world_size * self.price

    @property
    def gpus(self) -> str:
        """`8 x h100-80gb`."""
        return f"{self.plan.mesh.world_size} x {self.gpu}"

    def to_dict(self) -> dict[str, Any]:
        made = self.forecast.to_dict() if self.forecast else None
        facts = {"gpu": self.gpu, "gpus": self.plan.mesh.world_size, "hours": self.hours, "cost": self.cost, "why_not": self.why_not}
        plan = self.plan.model_dump(
            mode="json", include={"engine", "sharding", "offload", "activation_checkpointing", "batch", "mesh", "decisions", "refused"}
        )
        return facts | plan | {"forecast": made}

    def cells(self) -> list[str]:
        """What a table shows."""
        plan, made = self.plan, self.forecast
        passes = f"{plan.batch.micro_batch_size} x {plan.batch.accumulation_steps}"
        cut = f"{plan.engine} {plan.sharding}, {passes}, recompute {plan.activation_checkpointing}"
        cut += f", {plan.offload} offloaded" if plan.offload != "none" else ""
        if made is None:
            return [self.gpu, str(plan.mesh.world_size), *["?"] * 8, cut]
        s = made.speed
        rates = [f"{s.step:.2f}", f"{s.tokens_per_second:,.0f}", f"{s.utilisation:.0%}"] if s else ["?"] * 3
        hours = "?" if self.hours is None else f"{self.hours:.2f}"
        cost = "?" if self.cost is None else f"{self.cost:,.0f}"
        does = made.fits and self.why_not is None
        memory = [gib(made.footprint.highest.total), gib(made.memory_bytes), "yes" if does else "no"]
        return [self.gpu, str(plan.mesh.world_size), *memory, *rates, hours, cost, cut]


def joined(job: Job, network: str | None) -> Job:
    """The job with its nodes joined by that, where it is given. Raises ConfigurationError for a network that the table does not have."""
    if network is None:
        return job
    if network not in NETWORKS:
        raise ConfigurationError(Problem("--network", network, f"is not in the table; there are {', '.join(NETWORKS)}"))
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"network": network})})


def kinds(job: Job, gpus: str | None) -> list[GpuType]:
    """The GPUs of these names with commas, else of the one that the job has, else those of this machine.

    Raises ConfigurationError where there are none, or where the table does not have one.
    """
    if gpus is not None:
        found = [gpu_type(name) for name in gpus.split(",")]
    elif job.cluster.gpu is not None:
        found = [gpu_type(job.cluster.gpu, "cluster.gpu")]
    else:
        here = seen(Hardware.detect())
        if here is None:
            raise ConfigurationError(Problem("--gpu", None, "has to say which GPU, as there is none here; add --gpu h100-80gb"))
        found = [here]
    return [on_network(kind, job.cluster.network) for kind in found]


def per_node(job: Job) -> int:
    """GPUs of a node: as the job says, or what nodes commonly have."""
    asked = job.cluster.gpus_per_node
    return PER_NODE if asked in ("auto", 0) else int(asked)


def impossible(job: Job, num_gpus: int) -> str | None:
    """Why the job cannot be on so many GPUs; None where nothing is known against it."""
    size, whole = job.batch.global_batch_size, per_node(job)
    if num_gpus > whole and num_gpus % whole:
        return f"no whole number of nodes of {whole} GPUs"
    return f"batch.global_batch_size {size} cannot be cut over so many" if size % num_gpus else None


def on(job: Job, gpu: GpuType, num_gpus: int | None = None, offloading: Offloading = "where needed", trace: Trace | None = None) -> Row:
    """The job on such GPUs: as many as it says, or so many, in parts of a node or whole nodes."""
    cluster, ranks = job.cluster, per_node(job)
    nodes = cluster.nodes
    if num_gpus is not None:
        ranks = min(ranks, num_gpus)
        nodes = num_gpus // ranks
    asked = cluster.model_copy(update={"gpus_per_node": ranks, "ranks_per_node": "auto", "nodes": nodes})
    hardware = elsewhere(cluster, gpu, ranks)
    plan = decide(job.model_copy(update={"cluster": asked}), None, hardware, local=False, offloading=offloading, trace=trace)
    return Row(gpu.key, plan, forecast(plan, gpu.memory_bytes, gpu, host_memory_bytes=hardware.memory_bytes))


def prices(texts: list[str]) -> dict[str, float]:
    """`h100-80gb=2.5` -> the price of one GPU and hour, by its name. Raises ConfigurationError for anything else."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            price = float(amount)
        except ValueError:
            price = float("nan")
        if not isfinite(price) or price < 0:
            raise ConfigurationError(Problem("--price", text, "is no price; write NAME=AMOUNT, as h100-80gb=2.5"))
        found[gpu_type(name, "--price").key] = price
    return found


def priced(rows: list[Row], texts: list[str]) -> list[Row]:
    """The rows with what each costs. Raises ConfigurationError for the price of a GPU that none of them is of."""
    known, there = prices(texts), list(dict.fromkeys(row.gpu for row in rows))
    for name in known.keys() - set(there):
        raise ConfigurationError(Problem("--price", name, f"is of a GPU that is not planned for; there are {', '.join(there)}"))
    return [replace(row, price=known.get(row.gpu)) for row in rows]
