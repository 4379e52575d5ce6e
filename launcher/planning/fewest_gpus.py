"""Find the fewest GPUs with which a job fits and ends in time."""

from __future__ import annotations

from dataclasses import replace

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job, node_range
from launcher.planning.alternatives import Offloading
from launcher.planning.batch import divisors, multiples_around, nearest
from launcher.planning.epochs import why_no_epoch
from launcher.planning.forecast import Forecast
from launcher.planning.gpus import GpuType
from launcher.planning.model_config import locate
from launcher.planning.nearest import least, nearest_that_fit
from launcher.planning.nodes import Attempt, Fewest, fewest, passes
from launcher.planning.plan import Decision
from launcher.planning.rows import Row, impossible, joined, kinds, on, per_node
from launcher.runs.words import duration
from launcher.values import parse_seconds

_NAMED = 3
"""Plans that do not fit and are named in an error."""


def in_time(job: Job, deadline: str | None, most: int, gpus: str | None, network: str | None = None) -> list[Row]:
    """Of each kind of GPU the fewest that fit and, where there is a deadline, end within it: at most so many, and within the range of
    nodes that the job may name. A kind of which no number will do has the nearest, and why it will not.

    Raises ConfigurationError where no kind does, with the nearest of each.
    """
    seconds = None if deadline is None else _seconds(job, deadline)
    job = joined(job, network)
    named, numbers = kinds(job, gpus), _numbers(job, most)
    rows = [_fewest(job, kind, numbers, most, seconds, deadline) for kind in named]
    if all(row.why_not for row in rows):
        raise ConfigurationError([_refusal(row, most, deadline) for row in rows])
    return rows


def _seconds(job: Job, deadline: str) -> float:
    seconds = parse_seconds(deadline)
    if not isinstance(seconds, float):
        raise ConfigurationError(Problem("--deadline", deadline, "is no time; write 90min, 24h or 2d"))
    model = locate(job.model.name, job.model.revision)
    unknown = job.training.max_steps is None and why_no_epoch(job.data.train, job.data, model, job.model.task)
    if unknown:
        reason = f"needs training.max_steps, as how many steps an epoch has is not known: {unknown}"
        raise ConfigurationError(Problem("--deadline", deadline, reason))
    return seconds


def _numbers(job: Job, most: int) -> list[int]:
    """The numbers of GPUs that may be taken: parts of a node, then whole nodes; of a range of nodes only those in it.

    Raises ConfigurationError where there is none.
    """
    whole, (low, high) = per_node(job), node_range(job.cluster.nodes)
    nodes = range(low, high + 1) if low < high else range(1, max(1, most // whole) + 1)
    parts = range(1, whole) if low == high else ()
    named = [number for number in (*parts, *(count * whole for count in nodes)) if number <= most]
    found = [number for number in named if impossible(job, number) is None]
    if not named:
        reason = f"cluster.nodes {job.cluster.nodes} begins with {low * whole} GPUs; write so many or more, or a range that begins lower"
        raise ConfigurationError(Problem("--max-gpus", most, reason))
    if not found:
        raise ConfigurationError(_that_divide(job, low, whole, named))
    return found


def _that_divide(job: Job, low: int, whole: int, named: list[int]) -> Problem:
    size = job.batch.global_batch_size
    ways = [f"global_batch_size {multiples_around(size, named[0])}"]
    counts = [number // whole for number in divisors(size) if number % whole == 0]
    ways += [f"cluster.nodes {nearest(low, counts)}"] if counts else []
    span = f"{named[0]} to {named[-1]} GPUs" if len(named) > 1 else f"{named[0]} GPUs"
    reason = f"cannot be cut over {span}, the nodes {job.cluster.nodes} of {whole}; what works: {', '.join(ways)}"
    return Problem("batch.global_batch_size", size, reason)


def _fewest(job: Job, gpu: GpuType, numbers: list[int], most: int, seconds: float | None, deadline: str | None) -> Row:
    """The row of the fewest GPUs that will do, or of the nearest with why it will not."""
    rows: list[Row] = []

    def attempt(number: int, offloading: Offloading) -> Attempt:
        rows.append(on(job, gpu, number, offloading))
        return Attempt(rows[-1].plan, rows[-1].forecast)

    tried = fewest(numbers, attempt, seconds, passes(job))
    if tried.taken is None:
        if (error := tried.hopeless()) is not None:
            raise error
        return _missed(job, rows, [Row(gpu.key, one.plan, one.forecast) for _, one in tried.fitting], most)
    row = Row(gpu.key, tried.taken[1].plan, tried.taken[1].forecast)
    return _settled(row, tried, deadline)


def _settled(row: Row, tried: Fewest, deadline: str | None) -> Row:
    """With the number of GPUs as a decision, and the others as refused."""
    plan, number = row.plan, row.plan.mesh.world_size
    ends = "" if row.hours is None or deadline is None else f" and end within {deadline} ({row.hours:.2f} h)"
    offloaded = "; without offloading none does" if plan.offload != "none" and tried.offloads else ""
    reason = f"{number} GPU{'s' * (number > 1)}: the fewest that fit{ends}{offloaded}"
    decision = Decision(key="cluster.nodes", value=plan.mesh.nodes, reason=reason)
    decisions = (decision, *(other for other in plan.decisions if other.key != decision.key))
    return replace(row, plan=plan.model_copy(update={"decisions": decisions, "refused": (*tried.refused("GPU"), *plan.refused)}))


def _missed(job: Job, rows: list[Row], late: list[Row], most: int) -> Row:
    """The row that is nearest to what was asked for: of those that fit the one that ends first, else the one that lacks least."""
    if late:
        best = min(late, key=lambda row: float("inf") if row.hours is None else row.hours)
        ends = "when it ends is not known" if best.hours is None else f"the nearest is {duration(3600 * best.hours)} on {best.gpus}"
        return replace(best, why_not=f"no plan on up to {most} GPUs ends in time; {ends}")
    best, made = min(((row, row.forecast) for row in rows if row.forecast), key=lambda pair: _shortage(least(pair[1])))
    lacks = [f"{one.what}: {one.reason}" for one in best.plan.refused if one.why == "does not fit"]
    reasons = "; ".join(lacks[:_NAMED]) or f"{least(made).lack} at the least"
    near = nearest_that_fit(made, 1, per_node(job))
    then = f"the nearest that fits: {near[0][0]}" if near else "nothing near it fits"
    return replace(best, why_not=f"no plan on up to {most} GPUs fits; nothing fits on so few: on {best.gpus} {reasons}; {then}")


def _shortage(made: Forecast) -> float:
    """What is needed of what there is, where that is the most."""
    device = made.footprint.highest.total / made.memory_bytes if made.memory_bytes else 0.0
    host = made.host_bytes / made.host_memory_bytes if made.host_memory_bytes and made.plan.offload != "none" else 0.0
    return max(device, host)


def _refusal(row: Row, most: int, deadline: str | None) -> Problem:
    fits = row.forecast is not None and row.forecast.fits
    return Problem("--deadline", deadline, row.why_not or "") if fits else Problem("--max-gpus", most, row.why_not or "")
