"""Choose what a job leaves open: forecast the candidates, take the fastest that fits, say why no other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigurationError
from launcher.job import profile
from launcher.job.cluster import node_range
from launcher.job.schema import ActivationCheckpointing, Job
from launcher.job.script_job import OWN
from launcher.planner import candidates
from launcher.planner.candidates import ENGINE_NAMES, Cut, EngineOption, cut_words
from launcher.planner.decide import candidate
from launcher.planner.forecast import Forecast, forecast, least_bytes
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.formulas import Formulas
from launcher.planner.memory.limits import TOKENS_PER_PASS, gib, recomputations, samples_per_pass
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import Decision, Plan, Refused, Why
from launcher.planner.resolve.batch import divisors, largest_divisor, with_batch
from launcher.planner.resolve.sample_layout import one_a_pass
from launcher.planner.smallest_cluster import Attempt, Offloading, SmallestCluster, offload_modes
from launcher.planner.target import Target, hardware_of, target_here, target_of

WORTH = 0.95
"""What another cut or engine may take of the first one's step: the speed model is off by some percent."""
NEARLY = 0.98
"""The most that a smaller micro-batch may take of a larger one's step. Kernels like large ones."""


@dataclass(frozen=True)
class _Request:
    """A job to be planned, and where."""

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
    """Return the plan of a job: everything that it leaves open is decided, each with its reason.

    nproc: ranks of a node, where they are given. local: it runs on this machine; a plan for other machines
    is not refused for what this one lacks. profiles: where the model's program comes from.

    Raises ConfigurationError with every problem: GPUs that are not there, ranks and batches that do not
    divide, packages that are missing.
    """
    job = one_a_pass(job)
    hardware = hardware or hardware_of(job, local)
    request = _Request(job, nproc, hardware, local, offloading, profiles)
    low, high = node_range(job.cluster.nodes)
    return _plan_fewest_nodes(request) if low < high and not local else _best_plan(request)


def _plan_fewest_nodes(request: _Request) -> Plan:
    """Return the plan for the fewest nodes of a range that fit, else for the most that the batch allows.

    Raises ConfigurationError where no number of nodes will do, and for what a site's profile refuses of the
    most.
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
        judged = forecast(plan, target, request.profiles) if target.memory_bytes else None
        smallest.add(Attempt(count, plan, judged, request.profiles.why_not(plan)))
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
    """Return the numbers of nodes that the batch can be cut over; all where a node's ranks are open."""
    cluster, batch = job.cluster, job.batch
    ranks = cluster.ranks_per_node if cluster.gpus_per_node in ("auto", 0) else cluster.gpus_per_node
    counts = list(range(low, high + 1))
    if ranks == "auto":
        return counts
    unit = int(ranks) * (1 if batch.micro_batch_size == "auto" else batch.micro_batch_size)
    return [count for count in counts if batch.global_batch_size % (count * unit) == 0]


def _with_node_range(job: Job, plan: Plan, smallest: SmallestCluster, reason: str) -> Plan:
    """Return the plan with its nodes as a decision; Slurm is asked for so many up to the job's most."""
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
    """Return the plan of a job on as many nodes as it says.

    Where nothing is known of the model or of the device's memory, and where nothing fits, it is what the job
    begins with, which needs the least.
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
    search = _Search(job, first, target, program)
    if not target.memory_bytes:
        return _with_unknown_memory(job, first)
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
    """Return the plan with what is open as it needs the least memory, which is as a candidate begins. why: in
    a clause."""
    decisions = (
        [] if job.memory.offload != "auto" or plan.mesh.device == "cpu" else [_nothing_offloaded(plan)]
    )
    if job.memory.activation_checkpointing == "auto":
        reason = f"needs the least; {why}"
        value = plan.activation_checkpointing
        decisions.append(Decision(key="memory.activation_checkpointing", value=value, reason=reason))
    if job.batch.micro_batch_size == "auto":
        reason = f"needs the least; {why}"
        decisions.append(
            Decision(key="batch.micro_batch_size", value=plan.batch.micro_batch_size, reason=reason)
        )
    return plan.model_copy(update={"decisions": (*plan.decisions, *decisions)})


def _with_unknown_memory(job: Job, plan: Plan) -> Plan:
    """Return the plan for a device whose memory is not known: all computed again, and as many samples as are
    any faster."""
    plan = _with_the_least(job, plan, "the memory of the GPUs that it will run on is not known here")
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


def _nothing_offloaded(plan: Plan) -> Decision:
    reason = "nothing has to leave the GPUs, as far as is known"
    return Decision(key="memory.offload", value=plan.offload, reason=reason)


@dataclass(frozen=True)
class _Fit:
    """The best plan of an engine option."""

    option: EngineOption
    forecast: Forecast
    decisions: tuple[Decision, ...]
    """Why another cut was taken than the one of least memory, where one was."""


class _Search:
    """The plans of one job that are looked at on one device; of those not taken it is kept why."""

    def __init__(self, job: Job, first: Plan, target: Target, program: Program) -> None:
        """Begin with `first`, the plan of the job's default engine. program: what its model is at the level
        of sizes."""
        self.job, self.first, self.target, self.program = job, first, target, program
        self.default = EngineOption(first.engine, first.offload)
        self.fits: list[_Fit] = []
        self.refused: list[Refused] = []

    def refuse(self, what: str, why: Why, reason: str) -> None:
        """Keep why a plan is not taken."""
        self.refused.append(Refused(what=what, why=why, reason=reason))

    def nothing_is_open(self) -> bool:
        """Return whether the job says all that is searched; its plan is then taken as it is, fit or not."""
        job, first = self.job, self.first
        if "auto" in (job.memory.activation_checkpointing, job.batch.micro_batch_size):
            return False
        options = sum(map(len, candidates.engine_options(job, first)))
        return options == 1 and not list(candidates.other_cuts(job, first))

    def look_at(self, option: EngineOption, plan: Plan) -> None:
        """Keep the best plan of an engine option that fits. `plan` is its cut of least memory."""
        best = first = self._fastest_pass(plan)
        taken: Cut | None = None
        slower: list[Forecast] = []
        limit = WORTH * first.step if first and first.speed else float("inf")
        for cut in self._cuts_worth_a_look(plan, first):
            other = self._fastest_pass(cut.plan)
            if other is not None and other.step < limit:
                best, limit, taken = other, other.step, cut
            elif other is not None and first is not None:
                slower.append(other)
        if best is None:
            return
        for other in slower:
            little = ", not worth its memory" if other.step < best.step else ""
            self.refuse(cut_words(other.plan), "slower", f"{other.step / best.step:.2f}x the step{little}")
        decisions: tuple[Decision, ...] = ()
        if taken is not None:
            gain = "what cuts more does not fit"
            if first is not None:
                gain = f"{first.step / best.step:.2f}x as fast by the speed model, and it fits"
            reason = f"{taken.words}: {gain}"
            decisions = tuple(
                Decision(key=key, value=value, reason=reason) for key, value in taken.changed.items()
            )
        self.fits.append(_Fit(option, best, decisions))

    def _cuts_worth_a_look(self, plan: Plan, first: Forecast | None) -> list[Cut]:
        """Return the cuts that may be faster than the one of least memory, or fit where it does not.

        first: the forecast of that one, None where it does not fit. Others gain at most what it waits for,
        and what it computes again where they need not, as ZeRO-3 can keep less.
        """
        cuts = list(candidates.other_cuts(self.job, plan))
        if first is None:
            return cuts
        if first.speed is None:
            return []  # nothing is known of times
        if first.speed.exposed >= (1 - WORTH) * first.step:
            return cuts
        if first.plan.activation_checkpointing != "full":
            return []
        own = set(self._recomputations(plan))
        return [cut for cut in cuts if set(self._recomputations(cut.plan)) - own]

    def _fastest_pass(self, plan: Plan) -> Forecast | None:
        """Return the forecast of the fastest recomputation and micro-batch of a cut; None where none fits.

        Without rates the least recomputation that fits is taken for the fastest.
        """
        usable, least = self.target.usable_bytes(plan.mesh.device), least_bytes(plan, self.program)
        if least > usable:
            self.refuse(
                cut_words(plan),
                "does not fit",
                f"{gib(least)} of the {gib(usable)} of a rank whatever a pass takes",
            )
            return None
        fitting: list[Forecast] = []
        too_large: list[Forecast] = []
        for recompute in self._recomputations(plan):
            best, smallest = self._fastest_micro_batch(plan, recompute)
            if best is not None:
                fitting.append(best)
                if best.speed is None:
                    break
            elif smallest is not None:
                too_large.append(smallest)
        if too_large:
            names = " or ".join(each.plan.activation_checkpointing for each in too_large)
            nearest = min(too_large, key=lambda each: each.footprint.highest.total)
            self.refuse(
                f"{cut_words(plan)}, recompute {names}", "does not fit", f"{nearest.lack} at the least"
            )
        fastest = min(fitting, key=lambda each: each.step, default=None)
        for other in fitting:
            if fastest is not None and other is not fastest and other.speed:
                recompute, micro = other.plan.activation_checkpointing, other.plan.batch.micro_batch_size
                what = f"{cut_words(plan)}, recompute {recompute}, {micro} a pass"
                self.refuse(what, "slower", f"{other.step / fastest.step:.2f}x the step")
        return fastest

    def _fastest_micro_batch(
        self, plan: Plan, recompute: ActivationCheckpointing
    ) -> tuple[Forecast | None, Forecast | None]:
        """Return the fastest micro-batch that fits, of near equals the largest, and the least seen not to.

        Memory grows with the micro-batch, so that halving finds the largest that fits. The largest of all is
        looked at first: where it is all that a rank has, no gradients wait for another pass, and it may need
        less than smaller ones.
        """
        sizes = self._micro_batches(plan)
        best: Forecast | None = None
        too_large: Forecast | None = None
        low, high, middle = 0, len(sizes) - 1, 0
        largest = 0
        while low <= high:
            judged = self._forecast(plan, sizes[middle], recompute)
            if judged is not None and judged.fits:
                best, largest, high = judged, middle, middle - 1
            else:
                too_large, low = judged, middle + 1
            middle = (low + high) // 2
        if best is not None and best.speed is not None:
            for size in sizes[largest + 1 :]:
                smaller = self._forecast(plan, size, recompute)
                if smaller is not None and smaller.fits and smaller.step < NEARLY * best.step:
                    best = smaller
        return best, too_large

    def _recomputations(self, plan: Plan) -> tuple[ActivationCheckpointing, ...]:
        """Return what the job leaves open and the plan's engine can do, the least recomputation first."""
        asked = self.job.memory.activation_checkpointing
        return recomputations(plan) if asked == "auto" else (asked,)

    def _micro_batches(self, plan: Plan) -> list[int]:
        """Return what the job leaves open, divisors of a rank's samples, the largest first."""
        if self.job.batch.micro_batch_size != "auto":
            return [self.job.batch.micro_batch_size]
        most = samples_per_pass(plan)
        sizes = divisors(plan.batch.micro_batch_size * plan.batch.accumulation_steps)
        return [size for size in reversed(sizes) if size <= most]

    def _forecast(
        self, plan: Plan, micro_batch_size: int, recompute: ActivationCheckpointing
    ) -> Forecast | None:
        return forecast(with_batch(plan, micro_batch_size, recompute), self.target, program=self.program)

    def fastest(self) -> Plan:
        """Return the fastest of the plans that fit, with its decisions and with what was not taken."""
        taken = min(self.fits, key=lambda fit: fit.forecast.step)
        plan, step = taken.forecast.plan, taken.forecast.step
        for fit in self.fits:
            if fit is not taken:
                reason = f"{fit.forecast.step / step:.2f}x the step" if step else "moves more"
                self.refuse(fit.option.words, "slower", reason)
        # Of another engine, what the first had to decide about its own no longer holds.
        default = [
            each
            for each in self.first.decisions
            if each.key == "parallel.engine" and plan.engine == self.first.engine
        ]
        chosen = (*default, *plan.decisions, *self._decisions(taken), *taken.decisions)
        decisions = {decision.key: decision for decision in chosen}
        return plan.model_copy(
            update={"decisions": tuple(decisions.values()), "refused": tuple(self.refused)}
        )

    def _decisions(self, taken: _Fit) -> list[Decision]:
        """Return what was decided here."""
        job, first, plan = self.job, self.first, taken.forecast.plan
        decisions = []
        if plan.engine != first.engine:
            name = ENGINE_NAMES[first.engine]
            moved = "" if plan.offload == first.offload else " even with offloading"
            reason = f"no plan of {name} fits{moved}; this does"
            decisions.append(Decision(key="parallel.engine", value=plan.engine, reason=reason))
        if job.memory.offload == "auto" and plan.mesh.device == "cuda":
            reason = "all of it fits the GPUs"
            if plan.offload != "none":
                needed = f"{gib(taken.forecast.host_bytes)} of each node's own memory"
                reason = (
                    f"nothing fits the GPUs without; takes {needed}, and the way there and back every step"
                )
            decisions.append(Decision(key="memory.offload", value=plan.offload, reason=reason))
        if job.memory.activation_checkpointing == "auto":
            highest, usable = taken.forecast.footprint.highest, self.target.usable_bytes(plan.mesh.device)
            source = "the formulas" if isinstance(self.program, Formulas) else "its class's profile"
            reason = f"{gib(highest.total)} of the {gib(usable)} that can be used of a rank"
            reason += f", by {source} ({highest.name}: {highest.where})"
            value = plan.activation_checkpointing
            decisions.append(Decision(key="memory.activation_checkpointing", value=value, reason=reason))
        if job.batch.micro_batch_size == "auto":
            samples = plan.batch.micro_batch_size * plan.batch.accumulation_steps
            reason = f"divides the {samples} samples of a rank exactly; {self._why_no_larger(taken.forecast)}"
            decisions.append(
                Decision(key="batch.micro_batch_size", value=plan.batch.micro_batch_size, reason=reason)
            )
        return decisions

    def _why_no_larger(self, taken: Forecast) -> str:
        """Return why the next larger micro-batch is not taken, in a clause."""
        plan, sizes = taken.plan, self._micro_batches(taken.plan)
        place = sizes.index(plan.batch.micro_batch_size)
        if place == 0:
            return f"more than {samples_per_pass(plan)} are no faster"
        larger = self._forecast(plan, sizes[place - 1], plan.activation_checkpointing)
        if larger is not None and larger.fits and larger.speed and taken.speed:
            return f"{sizes[place - 1]} take {larger.step / taken.step:.2f}x the step"
        return f"more would not fit into {gib(self.target.usable_bytes(plan.mesh.device))}"
