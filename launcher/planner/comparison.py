"""Compare plans of one job: on several kinds of GPU, on increasing numbers of them, by cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planner.forecast import Forecast, forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import NETWORKS, GpuType, gpu_type, on_network, seen
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.plan import Plan, Refused, Why
from launcher.planner.prices import known_prices, prices
from launcher.planner.resolve.batch import divisors, nearest
from launcher.planner.search import plan_job
from launcher.planner.smallest_cluster import Offloading, refused_numbers
from launcher.planner.target import GPUS_PER_NODE, Target, node_of


@dataclass(frozen=True)
class PlanRow:
    """One of several plans in a comparison."""

    gpu: str
    plan: Plan
    forecast: Forecast | None
    price: float | None = None
    """Price of one GPU per hour."""
    why_not: str | None = None
    """Why it is no solution, if a plan with certain properties was searched for."""
    why_unknown: str | None = None
    """Why there is no forecast."""

    @property
    def hours(self) -> float | None:
        """Return the hours to the end of training; None if number or speed of the steps is unknown."""
        lasts = self.forecast and self.forecast.duration
        return lasts.total / 3600 if lasts else None

    @property
    def cost(self) -> float | None:
        """Return the cost of all GPUs to the end of training; None if hours or price are unknown."""
        return (
            None
            if self.hours is None or self.price is None
            else self.hours * self.plan.mesh.world_size * self.price
        )

    @property
    def gpus(self) -> str:
        """Return number and kind: `8 x h100-80gb`."""
        return f"{self.plan.mesh.world_size} x {self.gpu}"

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON; sizes in bytes, times in seconds or hours as their keys say."""
        shown = {
            "engine",
            "sharding",
            "offload",
            "activation_checkpointing",
            "batch",
            "mesh",
            "decisions",
            "refused",
        }
        facts = {"gpu": self.gpu, "gpus": self.plan.mesh.world_size, "hours": self.hours, "cost": self.cost}
        facts |= {"why_not": self.why_not} | self.plan.model_dump(mode="json", include=shown)
        return facts | {"forecast": self.forecast.to_dict() if self.forecast else None}


def with_network(job: Job, network: str | None) -> Job:
    """Return the job with its nodes connected by `network`, if it is given.

    Raises ConfigurationError for a network that is not in the table.
    """
    if network is None:
        return job
    if network not in NETWORKS:
        raise ConfigurationError(
            Problem("--network", network, f"is not in the table; there are {', '.join(NETWORKS)}")
        )
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"network": network})})


def gpu_types(job: Job, names: str | None) -> list[GpuType]:
    """Return the GPUs with these names, separated by commas, else the job's, else this machine's.

    Raises ConfigurationError if there are none, or if one is not in the table.
    """
    if names is not None:
        types = [gpu_type(name) for name in names.split(",")]
    elif job.cluster.gpu is not None:
        types = [gpu_type(job.cluster.gpu, "cluster.gpu")]
    else:
        here = seen(Hardware.detect())
        if here is None:
            raise ConfigurationError(
                Problem("--gpu", None, "has to say which GPU, as there is none here; add --gpu h100-80gb")
            )
        types = [here]
    return [on_network(gpu, job.cluster.network) for gpu in types]


def plan_on(
    job: Job,
    gpu: GpuType,
    num_gpus: int | None = None,
    offloading: Offloading = "where needed",
    profiles: Profiles = CACHED,
) -> tuple[Plan, Target]:
    """Return the job's plan on GPUs of one kind, and its device.

    num_gpus: a part of a node, or full nodes; without it the job's own number.
    """
    cluster, ranks = job.cluster, gpus_per_node(job)
    nodes = cluster.nodes
    if num_gpus is not None:
        ranks = min(ranks, num_gpus)
        nodes = num_gpus // ranks
    sizes = {"gpus_per_node": ranks, "ranks_per_node": "auto", "nodes": nodes}
    node = node_of(cluster, gpu, ranks)
    pinned = job.model_copy(update={"cluster": cluster.model_copy(update=sizes)})
    plan = plan_job(pinned, None, node, local=False, offloading=offloading, profiles=profiles)
    return plan, Target(gpu.memory_bytes, gpu, node.memory_bytes)


def row_of(gpu: GpuType, plan: Plan, target: Target, profiles: Profiles) -> PlanRow:
    """Return a plan on GPUs of one kind with its forecast."""
    foreseen = forecast_of(plan, target, profiles)
    if isinstance(foreseen, Unknown):
        return PlanRow(gpu.key, plan, None, why_unknown=foreseen.reason)
    return PlanRow(gpu.key, plan, foreseen)


def gpus_per_node(job: Job) -> int:
    """Return the GPUs per node: the job's number, or the usual one."""
    requested = job.cluster.gpus_per_node
    return GPUS_PER_NODE if requested in ("auto", 0) else int(requested)


def compare(job: Job, names: str | None, profiles: Profiles = CACHED) -> list[PlanRow]:
    """Return the job's plan on each of several kinds of GPU; for their names see `gpu_types`."""
    return [row_of(gpu, *plan_on(job, gpu, profiles=profiles), profiles) for gpu in gpu_types(job, names)]


def scale(
    job: Job, span: str, name: str | None, profiles: Profiles = CACHED
) -> tuple[list[PlanRow], tuple[Refused, ...]]:
    """Return the job's plans on numbers of GPUs in a span (`8..1024`), doubled each time, and those left out.

    Raises ConfigurationError with the nearest possible numbers if none in the span is possible.
    """
    first, _, last = span.partition("..")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigurationError(Problem("--scale", span, "is no span of numbers of GPUs; write 8..1024"))
    numbers = [
        number for power in range(int(last).bit_length()) if (number := int(first) << power) <= int(last)
    ]
    gpu, *others = gpu_types(job, name)
    if others:
        raise ConfigurationError(Problem("--gpu", name, f"--scale is of one kind of GPU; write {gpu.key}"))
    rows: list[PlanRow] = []
    reasons: dict[tuple[Why, str], list[int]] = {}
    for number in numbers:
        reason = impossible(job, number)
        if reason is None:
            try:
                rows.append(row_of(gpu, *plan_on(job, gpu, number, profiles=profiles), profiles))
                continue
            except ConfigurationError as error:
                reason = f"{error.problems[0].key}: {error.problems[0].reason}"
        reasons.setdefault(("not possible", reason), []).append(number)
    refused = refused_numbers(reasons, "GPU")
    if not rows:
        raise _nothing_in_span(job, gpu, span, numbers[0], refused)
    return rows, refused


def impossible(job: Job, num_gpus: int) -> str | None:
    """Return the reason why a job cannot run on a number of GPUs; None if there is none."""
    size, whole = job.batch.global_batch_size, gpus_per_node(job)
    if num_gpus > whole and num_gpus % whole:
        return f"no whole number of nodes of {whole} GPUs"
    return f"batch.global_batch_size {size} cannot be cut over so many" if size % num_gpus else None


def _nothing_in_span(
    job: Job, gpu: GpuType, span: str, first: int, refused: Iterable[Refused]
) -> ConfigurationError:
    """Return an error for a span without a possible number, with the nearest that work or the reason why none
    does."""
    possible = [number for number in divisors(job.batch.global_batch_size) if impossible(job, number) is None]
    below = [number for number in reversed(possible) if number <= first]
    working: list[int] = []
    error: ConfigurationError | None = None
    for numbers in (below, [number for number in possible if number > first]):
        for number in numbers:
            try:
                plan_on(job, gpu, number)
            except ConfigurationError as caught:
                error = error or ConfigurationError(caught.problems[0])
            else:
                working.append(number)
                break
    if not working and error is not None:
        return error
    reasons = "; ".join(f"{each.what}: {each.reason}" for each in refused)
    return ConfigurationError(
        Problem("--scale", span, f"{reasons}; the nearest that work: {nearest(first, working)}")
    )


def with_prices(rows: list[PlanRow], texts: Iterable[str]) -> list[PlanRow]:
    """Return the rows with their GPUs' prices, from texts like `h100-80gb=2.5` and from LAUNCHER_PRICE.

    Raises ConfigurationError for a text that is no price, and for a GPU that is in none of the rows.
    """
    of_options = prices(texts, "--price")
    there = list(dict.fromkeys(row.gpu for row in rows))
    for name in of_options.keys() - set(there):
        raise ConfigurationError(
            Problem("--price", name, f"is of a GPU that is not planned for; there are {', '.join(there)}")
        )
    known = known_prices() | of_options
    return [replace(row, price=known.get(row.gpu)) for row in rows]
