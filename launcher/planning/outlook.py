"""Preview a job: here, on other kinds of GPUs, on more of them."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planning.batch import divisors, nearest
from launcher.planning.decide import elsewhere
from launcher.planning.decide import plan as decide
from launcher.planning.forecast import Forecast, Trace, forecast, forecast_here, why_not
from launcher.planning.gpus import GpuType
from launcher.planning.hardware import Hardware
from launcher.planning.nearest import PER_NODE
from launcher.planning.nodes import Fewest
from launcher.planning.plan import Plan, Refused
from launcher.planning.rows import Row, impossible, joined, kinds, on


@dataclass(frozen=True)
class Outlook:
    """A plan and what is to be expected of it."""

    plan: Plan
    forecast: Forecast | None
    why_not: str | None = None
    """Why there is no forecast."""
    traced: Forecast | None = None
    """By the model's real class, where that was asked for."""
    per_node: int = PER_NODE
    """GPUs that a node may have."""


def look(job: Job, nproc: int | None = None, gpu: str | None = None, network: str | None = None, trace: Trace | None = None) -> Outlook:
    """The plan of a job on this machine, or on GPUs of the table, and its forecast.

    Raises ConfigurationError for a GPU or a network that the table does not have, and for ranks of this machine beside such a GPU.
    """
    job = joined(job, network)
    if gpu is None and job.cluster.gpu is None:
        return _here(job, nproc, trace)
    if nproc is not None:
        raise ConfigurationError(_not_here(job, nproc, gpu))
    [kind] = kinds(job, gpu)
    row = on(job, kind, trace=trace)
    plan, found = row.plan, row.forecast
    host = elsewhere(job.cluster, kind, plan.mesh.ranks_per_node).memory_bytes
    traced = forecast(plan, kind.memory_bytes, kind, trace=trace, host_memory_bytes=host) if trace else None
    return Outlook(plan, found, None if found else why_not(plan), traced)


def _here(job: Job, nproc: int | None, trace: Trace | None) -> Outlook:
    hardware = Hardware.detect()
    plan = decide(job, nproc, hardware, trace=trace)
    found = forecast_here(plan, hardware, job.cluster.network)
    traced = forecast_here(plan, hardware, job.cluster.network, trace) if trace else None
    return Outlook(plan, found, None if found else why_not(plan), traced, len(hardware.gpus))


def _not_here(job: Job, nproc: int, gpu: str | None) -> Problem:
    if gpu is not None:
        reason = f"is of this machine, and --gpu {gpu} of others; leave one of them out, or write --set cluster.gpus_per_node={nproc}"
    else:
        reason = f"is of this machine, and cluster.gpu {job.cluster.gpu} of others; leave it out, or add --set cluster.gpu=null"
    return Problem("--nproc", nproc, reason)


def compare(job: Job, gpus: str | None, network: str | None = None) -> list[Row]:
    """The job on each of several kinds of GPU, by their names with commas; without names on the kind that the job has."""
    job = joined(job, network)
    return [on(job, kind) for kind in kinds(job, gpus)]


def scaled(job: Job, span: str, gpu: str | None, network: str | None = None, left_out: list[Refused] | None = None) -> list[Row]:
    """The job on more and more GPUs, each time twice as many, `8..1024`. Numbers that are not possible are written to `left_out`.

    Raises ConfigurationError where none of them is possible, with the nearest that are.
    """
    numbers, job = _doubled(span), joined(job, network)
    kind, *others = kinds(job, gpu)
    if others:
        raise ConfigurationError(Problem("--gpu", gpu, f"--scale is of one kind of GPU; write {kind.key}"))
    rows, tried = [], Fewest()
    for number in numbers:
        made = _tried(job, kind, number)
        if isinstance(made, Row):
            rows.append(made)
        else:
            tried.reasons.setdefault(("not possible", f"{made.key}: {made.reason}".removeprefix(": ")), []).append(number)
    if not rows:
        raise _none_of(job, kind, span, numbers[0], tried.refused("GPU"))
    if left_out is not None:
        left_out += tried.refused("GPU")
    return rows


def _doubled(span: str) -> list[int]:
    first, _, last = span.partition("..")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigurationError(Problem("--scale", span, "is no span of numbers of GPUs; write 8..1024"))
    return [number for power in range(int(last).bit_length()) if (number := int(first) << power) <= int(last)]


def _tried(job: Job, kind: GpuType, number: int) -> Row | Problem:
    """The job on so many GPUs, or what is wrong with that."""
    reason = impossible(job, number)
    if reason is not None:
        return Problem("", None, reason)
    try:
        return on(job, kind, number)
    except ConfigurationError as error:
        return error.problems[0]


def _none_of(job: Job, kind: GpuType, span: str, first: int, refused: tuple[Refused, ...]) -> ConfigurationError:
    """What is wrong with every number of a span, and the nearest that are possible; where none is, what is wrong with them."""
    possible = [number for number in divisors(job.batch.global_batch_size) if impossible(job, number) is None]
    found, wrong = [], []
    for around in ([number for number in reversed(possible) if number <= first], [number for number in possible if number > first]):
        for number in around:
            made = _tried(job, kind, number)
            if isinstance(made, Row):
                found.append(number)
                break
            wrong.append(made)
    if not found:
        return ConfigurationError(wrong[0])
    reasons = "; ".join(f"{one.what}: {one.reason}" for one in refused)
    return ConfigurationError(Problem("--scale", span, f"{reasons}; the nearest that work: {nearest(first, found)}"))
