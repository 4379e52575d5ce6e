"""Find the fewest nodes, or GPUs, that are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.job import profile
from launcher.job.schema import Job, node_range
from launcher.planning.alternatives import Offloading
from launcher.planning.fitting import known
from launcher.planning.forecast import Forecast, Trace, forecast, why_not
from launcher.planning.gpus import on_network
from launcher.planning.hardware import Hardware
from launcher.planning.measured import rates_for
from launcher.planning.plan import Decision, Plan, Refused, Why
from launcher.runs import words

_NAMED = 8
"""Numbers that are written out of those that are refused for one reason."""


@dataclass(frozen=True)
class Attempt:
    """A plan for so many, and what is to be expected of it."""

    plan: Plan
    forecast: Forecast | None


@dataclass
class Fewest:
    """What was looked at until one would do."""

    taken: tuple[int, Attempt] | None = None
    offloads: bool = False
    fitting: list[tuple[int, Attempt]] = field(default_factory=list)
    """Those that fit, whatever else was wrong with them."""
    unknown: Plan | None = None
    """One of which there is no forecast."""
    error: ConfigurationError | None = None
    """What was wrong with the first that is not possible."""
    reasons: dict[tuple[Why, str], list[int]] = field(default_factory=dict)
    """Why the others would not do, and which."""

    def hopeless(self) -> ConfigurationError | None:
        """What is wrong with all of them, where it is not that they do not fit or end too late."""
        if self.unknown is not None:
            return ConfigurationError(Problem("model.name", self.unknown.model.name, why_not(self.unknown)))
        return self.error if self.reasons and all(why == "not possible" for why, _ in self.reasons) else None

    def refused(self, unit: str) -> tuple[Refused, ...]:
        """The others, by why."""
        taken = self.taken and self.taken[0]  # what did not fit without offloading may be taken with it
        others = {key: [number for number in numbers if number != taken] for key, numbers in self.reasons.items()}
        return tuple(Refused(what=_names(numbers, unit), why=why, reason=reason) for (why, reason), numbers in others.items() if numbers)


def _names(numbers: list[int], unit: str) -> str:
    shown = [str(number) for number in numbers]
    if len(shown) > _NAMED:
        shown = [*shown[: _NAMED - 1], "...", shown[-1]]
    return f"{', '.join(shown)} {unit}{'s' * (numbers != [1])}"


def fewest(
    counts: Iterable[int], attempt: Callable[[int, Offloading], Attempt], seconds: float | None, passes: Iterable[Offloading]
) -> Fewest:
    """The first of `counts`, from the fewest up, with a plan that fits and ends in `seconds`.

    attempt: makes the plan for so many. passes: what may be offloaded when all of them are looked at first, and when once more.
    """
    found, counts = Fewest(), sorted(counts)
    for offloading in passes:
        found.offloads = offloading == "only"
        for count in counts:
            try:
                tried = attempt(count, offloading)
            except ConfigurationError as error:
                found.error = found.error or error
                found.reasons.setdefault(("not possible", _clause(error)), []).append(count)
                continue
            if tried.forecast is None:
                found.unknown = tried.plan
                return found
            wrong = _wrong(tried.forecast, seconds)
            if wrong is None or wrong[0] == "too late":
                found.fitting.append((count, tried))
            if wrong is None:
                found.taken = (count, tried)
                return found
            if count not in (numbers := found.reasons.setdefault(wrong, [])):
                numbers.append(count)
        impossible = {count for (why, _), numbers in found.reasons.items() if why == "not possible" for count in numbers}
        counts = [count for count in counts if count not in impossible]
    return found


def _clause(error: ConfigurationError) -> str:
    problem = error.problems[0]
    return "the batch cannot be cut over so many ranks" if problem.key == "batch.global_batch_size" else f"{problem.key}: {problem.reason}"


def _wrong(made: Forecast, seconds: float | None) -> tuple[Why, str] | None:
    """Why a plan will not do; None where it will."""
    if not made.fits:
        return "does not fit", made.lack
    if seconds is None:
        return None
    needed = made.duration.total if made.duration else float("inf")
    return None if needed <= seconds else ("too late", words.duration(needed))


def passes(job: Job, offloading: Offloading = "where needed") -> tuple[Offloading, ...]:
    """Offloading comes when nothing else is left, as more of them may do without."""
    return ("never", "only") if job.memory.offload == "auto" and offloading == "where needed" else (offloading,)


def within(
    job: Job,
    hardware: Hardware,
    made_of: Callable[[Job, Offloading], Plan],
    offloading: Offloading = "where needed",
    trace: Trace | None = None,
) -> Plan:
    """The plan for the fewest nodes of the job's range that fit; for the most where that cannot be judged, or where none fits.

    Raises ConfigurationError where no number of nodes in it will do, and for what a site's profile refuses of the most.
    """
    low, high = node_range(job.cluster.nodes)
    counts = _that_divide(job, low, high)

    def attempt(count: int, moves: Offloading) -> Attempt:
        plan = made_of(_on(job, count), moves)
        memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
        return Attempt(plan, _forecast(job, plan, hardware, memory, None if known(plan) else trace) if memory else None)

    found = fewest(counts, attempt, None, passes(job, offloading))
    span = f"{low}-{high}"
    if found.taken is not None:
        offloaded = "; without offloading none of them does" if found.taken[1].plan.offload != "none" and found.offloads else ""
        return _settled(job, found.taken[1].plan, found, f"the fewest of {span} that fit{offloaded}")
    for count in reversed(counts):
        try:
            plan = made_of(_on(job, count), offloading)
        except ConfigurationError:
            continue
        why = "whether fewer hold it is not known" if found.unknown else "none of them fits"
        return _settled(job, plan, found, f"the most of {span} that the batch can be cut over: {why}")
    # None of them divides: what is wrong with the most of them is said.
    return made_of(_on(job, high), offloading)


def _forecast(job: Job, plan: Plan, hardware: Hardware, memory: int, trace: Trace | None) -> Forecast | None:
    rates = rates_for(plan, hardware)
    return forecast(plan, memory, rates and on_network(rates, job.cluster.network), trace=trace, host_memory_bytes=hardware.memory_bytes)


def _on(job: Job, count: int) -> Job:
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"nodes": count})})


def _that_divide(job: Job, low: int, high: int) -> list[int]:
    """The numbers of nodes over whose ranks the batch can be cut; all of them where a node's ranks are not known yet."""
    cluster, batch = job.cluster, job.batch
    asked = cluster.ranks_per_node if cluster.gpus_per_node in ("auto", 0) else cluster.gpus_per_node
    if asked == "auto":
        return list(range(low, high + 1))
    unit = int(asked) * (1 if batch.micro_batch_size == "auto" else batch.micro_batch_size)
    return [count for count in range(low, high + 1) if batch.global_batch_size % (count * unit) == 0]


def _settled(job: Job, plan: Plan, found: Fewest, reason: str) -> Plan:
    """The plan with the number of nodes as a decision, and the range from there on asked of Slurm."""
    cluster, (_, high) = job.cluster, node_range(job.cluster.nodes)
    if cluster.profile is not None:
        num_gpus = plan.mesh.ranks_per_node if plan.mesh.device == "cuda" else 0
        problems = profile.problems(cluster, high, num_gpus, profile.read(Path(cluster.profile))[0])
        if problems:
            raise ConfigurationError(problems)
    low = plan.mesh.nodes if found.taken is not None else node_range(cluster.nodes)[0]
    asked = plan.slurm.model_copy(update={"nodes": f"{low}-{high}" if low < high else None})
    decision = Decision(key="cluster.nodes", value=plan.mesh.nodes, reason=reason)
    return plan.model_copy(
        update={"slurm": asked, "decisions": (decision, *plan.decisions), "refused": (*found.refused("node"), *plan.refused)}
    )
