"""Choose what a job leaves open: forecast the candidates, take the fastest that fits, refuse the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigurationError
from launcher.job import profile
from launcher.job.cluster import node_range
from launcher.job.schema import Job
from launcher.job.script_job import OWN
from launcher.planner import candidates
from launcher.planner.decide import candidate
from launcher.planner.fastest import Search
from launcher.planner.forecast import Forecast, forecast_of, sizes_for
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.limits import TOKENS_PER_PASS, samples_per_pass
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.plan import UNKNOWN_MEMORY, Decision, Plan
from launcher.planner.resolve.batch import largest_divisor, with_batch
from launcher.planner.resolve.sample_layout import one_a_pass
from launcher.planner.smallest_cluster import Attempt, Offloading, SmallestCluster, offload_modes
from launcher.planner.target import hardware_of, target_here, target_of


@dataclass(frozen=True)
class _Request:
    """A job to plan, and the machine for it."""

    job: Job
    nproc: int | None
    hardware: Hardware
    local: bool
    offloading: Offloading
    profiles: Profiles

    def candidate(self, job: Job) -> Plan:
        return candidate(job, self.nproc, self.hardware, self.local)


def plan_job(
    job: Job,
    nproc: int | None = None,
    hardware: Hardware | None = None,
    local: bool = True,
    offloading: Offloading = "where needed",
    profiles: Profiles = CACHED,
) -> Plan:
    """Return the plan of a job, with everything decided that it leaves open, each with its reason.

    nproc: ranks per node, if given. local: whether it runs on this machine; a plan for other machines is not
    refused because this one lacks something. profiles: the source of the model's program.

    Raises ConfigurationError with every problem: missing GPUs, ranks and batches that do not divide, missing
    packages.
    """
    job = one_a_pass(job)
    hardware = hardware or hardware_of(job, local)
    request = _Request(job, nproc, hardware, local, offloading, profiles)
    low, high = node_range(job.cluster.nodes)
    return _plan_fewest_nodes(request) if low < high and not local else _best_plan(request)


def _plan_fewest_nodes(request: _Request) -> Plan:
    """Return the plan for the fewest nodes of a range that fit, else for the most that the batch allows.

    Raises ConfigurationError if no number of nodes will do, or if a site's profile refuses the largest.
    """
    job, cluster = request.job, request.job.cluster
    low, high = node_range(cluster.nodes)
    counts = _counts_that_divide(job, low, high)

    def on(count: int, offloading: Offloading) -> Plan:
        pinned = job.model_copy(update={"cluster": cluster.model_copy(update={"nodes": count})})
        return _best_plan(replace(request, job=pinned, offloading=offloading))

    smallest = SmallestCluster(counts, offload_modes(job, request.offloading))
    for count, offloading in smallest.candidates():
        try:
            plan = on(count, offloading)
        except ConfigurationError as error:
            smallest.reject(count, error)
            continue
        target = target_of(plan, request.hardware, cluster.network)
        judged = forecast_of(plan, target, request.profiles) if target.memory_bytes else None
        smallest.add(Attempt(count, plan, judged if isinstance(judged, Forecast) else None))
    if smallest.taken is not None:
        reason = f"the fewest of {low}-{high} that fit"
        reason += "; without offloading none of them does" if smallest.needs_offloading else ""
        return _with_node_range(job, smallest.taken.plan, smallest, reason)
    reason = "whether fewer hold it is not known" if smallest.unknown else "none of them fits"
    for count in reversed(counts):
        try:
            plan = on(count, request.offloading)
        except ConfigurationError:
            continue
        reason = f"the most of {low}-{high} that the batch can be cut over: {reason}"
        return _with_node_range(job, plan, smallest, reason)
    return on(high, request.offloading)  # raises what is wrong with the most of them


def _counts_that_divide(job: Job, low: int, high: int) -> list[int]:
    """Return the numbers of nodes that divide the batch; all if the ranks per node are open."""
    cluster, batch = job.cluster, job.batch
    ranks = cluster.ranks_per_node if cluster.gpus_per_node in ("auto", 0) else cluster.gpus_per_node
    counts = list(range(low, high + 1))
    if ranks == "auto":
        return counts
    unit = int(ranks) * (1 if batch.micro_batch_size == "auto" else batch.micro_batch_size)
    return [count for count in counts if batch.global_batch_size % (count * unit) == 0]


def _with_node_range(job: Job, plan: Plan, smallest: SmallestCluster, reason: str) -> Plan:
    """Return the plan with its nodes as a decision; Slurm is asked for that many up to the job's maximum."""
    cluster, (low, high) = job.cluster, node_range(job.cluster.nodes)
    if cluster.profile is not None:
        num_gpus = plan.mesh.ranks_per_node if plan.mesh.device == "cuda" else 0
        problems = profile.problems(cluster, high, num_gpus, profile.read(Path(cluster.profile))[0])
        if problems:
            raise ConfigurationError(problems)
    low = low if smallest.taken is None else plan.mesh.nodes
    decision = Decision(key="cluster.nodes", value=plan.mesh.nodes, reason=reason)
    changes = {
        "slurm": plan.slurm.model_copy(update={"nodes": f"{low}-{high}" if low < high else None}),
        "decisions": (decision, *plan.decisions),
        "refused": (*smallest.refused("node"), *plan.refused),
    }
    return plan.model_copy(update=changes)


def _best_plan(request: _Request) -> Plan:
    """Return the plan of a job on its number of nodes.

    If the model or the device's memory is unknown, or if nothing fits, it is the first candidate, which needs
    the least memory.
    """
    job = request.job
    first = request.candidate(job)
    target = (target_here if request.local else target_of)(first, request.hardware, job.cluster.network)
    if job.model.name == OWN:  # a script's own model; what is decided here stands for nothing
        return _with_the_least(job, first, "only the script knows its model")
    try:
        program = request.profiles.find(first)
    except ConfigurationError as error:  # whoever forecasts the plan is told, and most commands need none
        return _with_the_least(job, first, error.problems[0].reason)
    if isinstance(program, Unknown):
        return _with_the_least(job, first, f"what a pass needs is not known: {program.reason}")
    if not target.memory_bytes:
        return _with_unknown_memory(job, first)
    search = Search(job, first, target, program, sizes_for(first, target))
    if search.nothing_is_open():
        return _with_the_least(job, first, "nothing else is open")
    for group in candidates.engine_options(job, first):
        offloads = group[0].offload != first.offload
        if request.offloading == ("never" if offloads else "only"):
            continue
        for option in group:
            try:
                plan = first if option == search.default else request.candidate(option.pinned(job))
            except ConfigurationError as error:
                problem = error.problems[0]
                search.refuse(option.words, "not possible", f"{problem.key}: {problem.reason}")
            else:
                search.look_at(option, plan)
        if search.fits:
            return search.fastest()
    plan = _with_the_least(job, first, "nothing fits")
    return plan.model_copy(update={"refused": tuple(search.refused)})


def _with_the_least(job: Job, plan: Plan, why: str) -> Plan:
    """Return the plan with open keys at their values of least memory, as the candidate has them. why: the
    reason, as a clause."""
    values: dict[str, tuple[str | int, str]] = {}
    if job.memory.offload == "auto" and plan.mesh.device != "cpu":
        values["memory.offload"] = plan.offload, "nothing has to leave the GPUs, as far as is known"
    if job.memory.activation_checkpointing == "auto":
        reason = f"needs the least; {why}"
        values["memory.activation_checkpointing"] = plan.activation_checkpointing, reason
    if job.batch.micro_batch_size == "auto":
        values["batch.micro_batch_size"] = plan.batch.micro_batch_size, f"needs the least; {why}"
    decisions = (Decision(key=key, value=value, reason=reason) for key, (value, reason) in values.items())
    return plan.model_copy(update={"decisions": (*plan.decisions, *decisions)})


def _with_unknown_memory(job: Job, plan: Plan) -> Plan:
    """Return the plan for a device of unknown memory: full recomputation, and the largest micro-batch that is
    still faster."""
    plan = _with_the_least(job, plan, UNKNOWN_MEMORY)
    if job.batch.micro_batch_size != "auto":
        return plan
    samples = plan.batch.micro_batch_size * plan.batch.accumulation_steps
    micro = largest_divisor(samples, samples_per_pass(plan))
    enough = f"more than {TOKENS_PER_PASS[plan.mesh.device]} tokens of a pass are no faster"
    reason = f"divides the {samples} samples of a rank exactly; {enough}"
    decisions = {decision.key: decision for decision in plan.decisions}
    decisions["batch.micro_batch_size"] = Decision(key="batch.micro_batch_size", value=micro, reason=reason)
    larger = with_batch(plan, micro, plan.activation_checkpointing)
    return larger.model_copy(update={"decisions": tuple(decisions.values())})
