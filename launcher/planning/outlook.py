"""Looking at a job before it runs: here, on GPUs that are not here, on more of them, on other kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job, node_range, parse_seconds
from launcher.planning.alternatives import Offloading
from launcher.planning.decide import plan as decide
from launcher.planning.epochs import one_pass
from launcher.planning.forecast import Forecast, Trace, forecast, forecast_here, why_not
from launcher.planning.gpus import NETWORKS, GpuType, as_hardware, gpu_type, on_network, seen
from launcher.planning.hardware import Hardware
from launcher.planning.memory import gib
from launcher.planning.nodes import Attempt, fewest, passes
from launcher.planning.plan import Decision, Plan
from launcher.planning.slurm import node_memory

PER_NODE = 8
"""GPUs of a node where the job does not say."""


@dataclass(frozen=True)
class Outlook:
    """A plan and what is to be expected of it."""

    plan: Plan
    forecast: Forecast | None
    why_not: str | None = None
    """Why there is no forecast."""
    traced: Forecast | None = None
    """By the model's real class, where that was asked for."""


@dataclass(frozen=True)
class Row:
    """One of several plans beside each other."""

    gpu: str
    plan: Plan
    forecast: Forecast | None
    price: float | None = None
    """Of one GPU and hour."""

    @property
    def hours(self) -> float | None:
        """To the end of training; None where it is not known how many steps an epoch has, or how fast they are."""
        lasts = self.forecast and self.forecast.duration
        return lasts.total / 3600 if lasts else None

    @property
    def cost(self) -> float | None:
        """Of all GPUs to the end of training."""
        return None if self.hours is None or self.price is None else self.hours * self.plan.mesh.world_size * self.price

    def to_dict(self) -> dict[str, Any]:
        made = self.forecast.to_dict() if self.forecast else None
        facts = {"gpu": self.gpu, "gpus": self.plan.mesh.world_size, "hours": self.hours, "cost": self.cost}
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
        memory = [gib(made.footprint.highest.total), gib(made.memory_bytes), "yes" if made.fits else "no"]
        return [self.gpu, str(plan.mesh.world_size), *memory, *rates, hours, cost, cut]


def look(job: Job, nproc: int | None = None, gpu: str | None = None, network: str | None = None, trace: Trace | None = None) -> Outlook:
    """The plan of a job on this machine, or on GPUs of the table, and its forecast.

    Raises ConfigurationError for a GPU or a network that the table does not have.
    """
    job = _joined(job, network)
    gpu = gpu or job.cluster.gpu
    if gpu is not None:
        kind = on_network(gpu_type(gpu), job.cluster.network)
        made = _on(job, kind, trace=trace)
        plan, found = made.plan, made.forecast
        traced = forecast(plan, kind.memory_bytes, kind, trace=trace) if trace else None
    else:
        hardware = Hardware.detect()
        plan = decide(job, nproc, hardware, trace=trace)
        found = forecast_here(plan, hardware, job.cluster.network)
        traced = forecast_here(plan, hardware, job.cluster.network, trace) if trace else None
    return Outlook(plan, found, None if found else why_not(plan), traced)


def _joined(job: Job, network: str | None) -> Job:
    """The job with its nodes joined by that, where it is given."""
    if network is None:
        return job
    if network not in NETWORKS:
        raise ConfigurationError(Problem("--network", network, f"is not in the table; there are {', '.join(NETWORKS)}"))
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"network": network})})


def _per_node(job: Job) -> int:
    asked = job.cluster.gpus_per_node
    return PER_NODE if asked in ("auto", 0) else int(asked)


def _on(job: Job, gpu: GpuType, num_gpus: int | None = None, offloading: Offloading = "where needed", trace: Trace | None = None) -> Row:
    cluster, per_node = job.cluster, _per_node(job)
    nodes = cluster.nodes
    if num_gpus is not None:
        per_node = min(per_node, num_gpus)
        nodes = -(-num_gpus // per_node)
    changed = job.model_copy(
        update={"cluster": cluster.model_copy(update={"gpus_per_node": per_node, "ranks_per_node": "auto", "nodes": nodes})}
    )
    hardware = as_hardware(gpu, per_node, memory_bytes=node_memory(cluster))
    plan = decide(changed, None, hardware, local=False, offloading=offloading, trace=trace)
    return Row(gpu.key, plan, forecast(plan, gpu.memory_bytes, gpu, host_memory_bytes=hardware.memory_bytes))


def compare(job: Job, gpus: str, network: str | None = None) -> list[Row]:
    """The job on each of several kinds of GPU, by their names with commas."""
    job = _joined(job, network)
    return [_on(job, on_network(gpu_type(name), job.cluster.network)) for name in gpus.split(",")]


def prices(texts: list[str]) -> dict[str, float]:
    """`h100-80gb=2.5` -> the price of one GPU and hour, by its name. Raises ConfigurationError for anything else."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            found[gpu_type(name).key] = float(amount)
        except ValueError:
            raise ConfigurationError(Problem("--price", text, "is no price; write NAME=AMOUNT, as h100-80gb=2.5")) from None
    return found


def priced(rows: list[Row], texts: list[str]) -> list[Row]:
    """The rows with what each costs."""
    known = prices(texts)
    return [replace(row, price=known.get(row.gpu)) for row in rows]


def in_time(job: Job, deadline: str | None, most: int, gpus: str | None, network: str | None = None) -> list[Row]:
    """Of each kind of GPU the fewest that fit and, where there is a deadline, end within it: at most so many, and within the range of
    nodes that the job may name.

    Raises ConfigurationError where no kind does, with the nearest.
    """
    seconds = None if deadline is None else _seconds(job, deadline)
    names = gpus.split(",") if gpus else [job.cluster.gpu]
    job = _joined(job, network)
    found, nearest = [], None
    for name in names:
        kind = on_network(_kind(name), job.cluster.network)
        row, rows = _fewest(job, kind, most, seconds, deadline)
        found += [row] if row else []
        nearest = min([*rows, *([nearest] if nearest else [])], key=lambda row: row.hours or 0.0, default=None)
    if found:
        return found
    key, value = ("--max-gpus", most) if deadline is None else ("--deadline", deadline)
    best = "nothing fits on so few" if nearest is None else f"the nearest is {nearest.hours:.1f} h on {_gpus(nearest)}"
    raise ConfigurationError(Problem(key, value, f"no plan on up to {most} GPUs {'fits' if deadline is None else 'ends in time'}; {best}"))


def _gpus(row: Row) -> str:
    return f"{row.plan.mesh.world_size} x {row.gpu}"


def _seconds(job: Job, deadline: str) -> float:
    seconds = parse_seconds(deadline)
    if not isinstance(seconds, float):
        raise ConfigurationError(Problem("--deadline", deadline, "is no time; write 90min, 24h or 2d"))
    if job.training.max_steps is None and one_pass(job.data.train, job.data, job.model.name, job.model.task) is None:
        reason = "needs training.max_steps, or training data in files that are here: how many steps an epoch has is not known"
        raise ConfigurationError(Problem("--deadline", deadline, reason))
    return seconds


def _kind(name: str | None) -> GpuType:
    kind = gpu_type(name) if name is not None else seen(Hardware.detect())
    if kind is None:
        raise ConfigurationError(Problem("--gpu", None, "has to say which GPU, as there is none here; add --gpu h100-80gb"))
    return kind


def _fewest(job: Job, gpu: GpuType, most: int, seconds: float | None, deadline: str | None) -> tuple[Row | None, list[Row]]:
    """The row of the fewest GPUs that will do, and those that fit and end too late."""

    def attempt(number: int, offloading: Offloading) -> Attempt:
        row = _on(job, gpu, number, offloading)
        return Attempt(row.plan, row.forecast)

    tried = fewest(_numbers(job, most), attempt, seconds, passes(job))
    late = [Row(gpu.key, one.plan, one.forecast) for _, one in tried.fitting]
    if tried.taken is None:
        if (error := tried.hopeless()) is not None:
            raise error
        return None, late
    number, one = tried.taken
    row = Row(gpu.key, one.plan, one.forecast)
    ends = "" if row.hours is None or deadline is None else f" and end within {deadline} ({row.hours:.2f} h)"
    offloaded = "; without offloading none does" if one.plan.offload != "none" and tried.offloads else ""
    decision = Decision(
        key="cluster.nodes", value=one.plan.mesh.nodes, reason=f"{number} GPU{'s' * (number > 1)}: the fewest that fit{ends}{offloaded}"
    )
    decisions = (decision, *(other for other in one.plan.decisions if other.key != decision.key))
    plan = one.plan.model_copy(update={"decisions": decisions, "refused": (*tried.refused("GPU"), *one.plan.refused)})
    return replace(row, plan=plan), late


def _numbers(job: Job, most: int) -> list[int]:
    """The numbers of GPUs that may be taken: parts of a node, then whole nodes; of a range of nodes only those in it."""
    per_node, (low, high) = _per_node(job), node_range(job.cluster.nodes)
    nodes = range(low, high + 1) if low < high else range(1, max(1, most // per_node) + 1)
    whole = [count * per_node for count in nodes]
    parts = list(range(1, per_node)) if low == high else []
    return [number for number in (*parts, *whole) if number <= most and job.batch.global_batch_size % number == 0]


def scaled(job: Job, span: str, gpu: str | None, network: str | None = None) -> list[Row]:
    """The job on more and more GPUs, each time twice as many, `8..1024`; those that the batch cannot be cut over are left out."""
    first, _, last = span.partition("..")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise ConfigurationError(Problem("--scale", span, "is no span of numbers of GPUs; write 8..1024"))
    kind = _kind(gpu or job.cluster.gpu)
    job = _joined(job, network)
    rows, kind, number = [], on_network(kind, job.cluster.network), int(first)
    while number <= int(last):
        if job.batch.global_batch_size % number == 0:
            rows.append(_on(job, kind, number))
        number *= 2
    if not rows:
        reason = (
            f"global_batch_size {job.batch.global_batch_size} cannot be cut over so many; the most is {job.batch.global_batch_size} GPUs"
        )
        raise ConfigurationError(Problem("--scale", span, reason))
    return rows
