"""Find the fewest GPUs of each kind on which a job fits and ends in time."""

from __future__ import annotations

from dataclasses import replace

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.cluster import node_range
from launcher.job.schema import Job
from launcher.planner.comparison import PlanRow, gpu_types, gpus_per_node, impossible, plan_on, row_of
from launcher.planner.dataset.dataset_size import one_pass
from launcher.planner.forecast import Forecast
from launcher.planner.hardware.gpu_table import GpuType
from launcher.planner.memory.profiles import CACHED, Profiles
from launcher.planner.model.model_config import locate
from launcher.planner.plan import Decision
from launcher.planner.resolve.batch import divisors, multiples_around, nearest
from launcher.planner.smallest_cluster import Attempt, SmallestCluster, offload_modes
from launcher.planner.suggestions import least, nearest_that_fit
from launcher.runs.wording import duration
from launcher.values import parse_seconds

_NAMED = 3
"""Number of plans that do not fit and are listed in an error."""


def fewest_gpus(
    job: Job, deadline: str | None, most: int, names: str | None, profiles: Profiles = CACHED
) -> list[PlanRow]:
    """Return, for each kind of GPU, the plan on the fewest that fit and, given a deadline, end within it.

    At most `most` GPUs are tried, within the job's range of nodes if it has one. If no number of a kind will
    do, its row has the nearest plan, and why that fails. Raises ConfigurationError with the nearest of each
    kind if none will do.
    """
    seconds = None if deadline is None else _seconds(job, deadline)
    types, numbers = gpu_types(job, names), _numbers_of_gpus(job, most)
    rows = [_fewest_of_type(job, gpu, numbers, most, seconds, deadline, profiles) for gpu in types]
    if all(row.why_not for row in rows):
        problems = []
        for row in rows:
            fits = row.forecast is not None and row.forecast.fits
            key, value = ("--deadline", deadline) if fits else ("--max-gpus", most)
            problems.append(Problem(key, value, row.why_not or ""))
        raise ConfigurationError(problems)
    return rows


def _seconds(job: Job, deadline: str) -> float:
    """Return a deadline in seconds. Raises ConfigurationError, also if the number of steps is unknown."""
    seconds = parse_seconds(deadline)
    if not isinstance(seconds, float):
        raise ConfigurationError(Problem("--deadline", deadline, "is no time; write 90min, 24h or 2d"))
    model = locate(job.model.name, job.model.revision)
    train, epoch = job.data.train, job.training.max_steps is None
    virtual = tasks.virtual_tokens(job.model)
    if epoch and isinstance(unknown := one_pass(train, job.data, model, job.model.task, virtual), str):
        reason = f"needs training.max_steps, as how many steps an epoch has is not known: {unknown}"
        raise ConfigurationError(Problem("--deadline", deadline, reason))
    return seconds


def _numbers_of_gpus(job: Job, most: int) -> list[int]:
    """Return the possible numbers of GPUs: parts of a node and full nodes, within the job's range.

    Raises ConfigurationError if there is none.
    """
    whole, (low, high) = gpus_per_node(job), node_range(job.cluster.nodes)
    nodes = range(low, high + 1) if low < high else range(1, max(1, most // whole) + 1)
    parts = range(1, whole) if low == high else ()
    named = [number for number in (*parts, *(count * whole for count in nodes)) if number <= most]
    if not named:
        reason = f"cluster.nodes {job.cluster.nodes} begins with {low * whole} GPUs"
        reason += "; write so many or more, or a range that begins lower"
        raise ConfigurationError(Problem("--max-gpus", most, reason))
    numbers = [number for number in named if impossible(job, number) is None]
    if numbers:
        return numbers
    size = job.batch.global_batch_size
    working = [f"global_batch_size {multiples_around(size, named[0])}"]
    counts = [number // whole for number in divisors(size) if number % whole == 0]
    working += [f"cluster.nodes {nearest(low, counts)}"] if counts else []
    span = f"{named[0]} to {named[-1]} GPUs" if len(named) > 1 else f"{named[0]} GPUs"
    reason = f"cannot be cut over {span}, the nodes {job.cluster.nodes} of {whole}"
    reason += f"; what works: {', '.join(working)}"
    raise ConfigurationError(Problem("batch.global_batch_size", size, reason))


def _fewest_of_type(
    job: Job,
    gpu: GpuType,
    numbers: list[int],
    most: int,
    seconds: float | None,
    deadline: str | None,
    profiles: Profiles,
) -> PlanRow:
    """Return the plan on the fewest GPUs of a kind that will do, or the nearest plan and why it fails.

    Raises ConfigurationError if the reason is neither memory nor time, and so holds for every number.
    """
    smallest = SmallestCluster(numbers, offload_modes(job), seconds)
    for number, offloading in smallest.candidates():
        try:
            row = row_of(gpu, *plan_on(job, gpu, number, offloading, profiles), profiles)
        except ConfigurationError as error:
            smallest.reject(number, error)
        else:
            smallest.add(Attempt(number, row.plan, row.forecast, row.why_unknown or ""))
    if smallest.taken is None:
        if smallest.hopeless is not None:
            raise smallest.hopeless
        return _nearest_miss(job, gpu, smallest, most)
    row = PlanRow(gpu.key, smallest.taken.plan, smallest.taken.forecast)
    plan, number = row.plan, smallest.taken.count
    ends = "" if row.hours is None or deadline is None else f" and end within {deadline} ({row.hours:.2f} h)"
    offloaded = "; without offloading none does" if smallest.needs_offloading else ""
    reason = f"{number} GPU{'s' * (number > 1)}: the fewest that fit{ends}{offloaded}"
    decision = Decision(key="cluster.nodes", value=plan.mesh.nodes, reason=reason)
    decisions = (decision, *(other for other in plan.decisions if other.key != decision.key))
    refused = (*smallest.refused("GPU"), *plan.refused)
    return replace(row, plan=plan.model_copy(update={"decisions": decisions, "refused": refused}))


def _nearest_miss(job: Job, gpu: GpuType, smallest: SmallestCluster, most: int) -> PlanRow:
    """Return the plan that fits and ends first, though late; if none fits, the one that lacks the least."""
    if smallest.late:
        late = [PlanRow(gpu.key, each.plan, each.forecast) for each in smallest.late]
        best = min(late, key=lambda row: float("inf") if row.hours is None else row.hours)
        ends = "when it ends is not known"
        if best.hours is not None:
            ends = f"the nearest is {duration(3600 * best.hours)} on {best.gpus}"
        return replace(best, why_not=f"no plan on up to {most} GPUs ends in time; {ends}")
    forecasts = [each.forecast for each in smallest.attempts if each.forecast is not None]
    wanted = min(forecasts, key=lambda each: _shortage(least(each)))
    row = PlanRow(gpu.key, wanted.plan, wanted)
    lacks = [f"{each.what}: {each.reason}" for each in wanted.plan.refused if each.why == "does not fit"]
    reasons = "; ".join(lacks[:_NAMED]) or f"{least(wanted).lack} at the least"
    suggestions = nearest_that_fit(wanted, 1, gpus_per_node(job))
    then = f"the nearest that fits: {suggestions[0].text}" if suggestions else "nothing near it fits"
    why_not = f"no plan on up to {most} GPUs fits; nothing fits on so few: on {row.gpus} {reasons}; {then}"
    return replace(row, why_not=why_not)


def _shortage(wanted: Forecast) -> float:
    """Return the needed share of device memory or of host memory, whichever is larger."""
    target, host = wanted.target, 0.0
    device = wanted.footprint.highest.total / target.memory_bytes if target.memory_bytes else 0.0
    if target.host_memory_bytes and wanted.plan.offload != "none":
        host = wanted.host_bytes / target.host_memory_bytes
    return max(device, host)
