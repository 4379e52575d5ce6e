"""Find a job's fastest plan that fits a device, and record why each other one was not taken."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.job.schema import ActivationCheckpointing, Job
from launcher.planner import candidates
from launcher.planner.candidates import ENGINE_NAMES, Cut, EngineOption, cut_words
from launcher.planner.dataset.dataset_size import DatasetSizes
from launcher.planner.forecast import Forecast, forecast
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.limits import recomputations, samples_per_pass
from launcher.planner.memory.program import Program
from launcher.planner.plan import Decision, Plan, Refused, Why
from launcher.planner.resolve.batch import divisors, with_batch
from launcher.planner.target import Target
from launcher.runs.wording import gib, in_phase

WORTH = 0.95
"""Another sharding is taken only below this share of the first one's step: the speed model errs by some
percent."""
NEARLY = 0.98
"""A smaller micro-batch is taken only below this share of a larger one's step. Kernels favour large ones."""


@dataclass(frozen=True)
class _Fit:
    """The best plan for an engine option."""

    option: EngineOption
    forecast: Forecast
    decisions: tuple[Decision, ...]
    """The reasons for another sharding than the one of least memory, if one was taken."""


class Search:
    """A search over one job's plans on one device; it records why plans are not taken."""

    def __init__(self, job: Job, first: Plan, target: Target, program: Program, sizes: DatasetSizes) -> None:
        """Begin with `first`, the plan of the job's default engine. program, sizes: its model and its data,
        for the forecasts."""
        self.job, self.first, self.target = job, first, target
        self.program, self.sizes = program, sizes
        self.default = EngineOption(first.engine, first.offload)
        self.fits: list[_Fit] = []
        self.refused: list[Refused] = []

    def refuse(self, what: str, why: Why, reason: str) -> None:
        """Record why a plan is not taken."""
        self.refused.append(Refused(what=what, why=why, reason=reason))

    def nothing_is_open(self) -> bool:
        """Return whether the job leaves nothing to search; its plan is then taken whether or not it fits."""
        job, first = self.job, self.first
        if "auto" in (job.memory.activation_checkpointing, job.batch.micro_batch_size):
            return False
        options = sum(map(len, candidates.engine_options(job, first)))
        return options == 1 and not list(candidates.other_cuts(job, first))

    def look_at(self, option: EngineOption, plan: Plan) -> None:
        """Keep the best plan of an engine option that fits. `plan` has its sharding of least memory."""
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
        """Return the shardings that may be faster than the one of least memory, or fit if it does not.

        first: that one's forecast, None if it does not fit. Others can save at most its exposed
        communication, and recomputation that they do not need, as ZeRO-3 has fewer modes.
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
        """Return a sharding's forecast with the fastest recomputation and micro-batch; None if none fits.

        Without the device's rates, the least recomputation that fits counts as the fastest.
        """
        usable, least = self.target.usable_bytes(plan.mesh.device), Estimator(plan, self.program).least()
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
        """Return the fastest micro-batch that fits (the largest of near equals), and the smallest tried that
        does not.

        Memory grows with the micro-batch, so bisection finds the largest that fits. The largest of all is
        tried first: if it is a rank's whole share, no gradients are accumulated, and it may need less memory
        than smaller ones.
        """
        sizes = self._micro_batches(plan)
        best: Forecast | None = None
        too_large: Forecast | None = None
        low, high, middle = 0, len(sizes) - 1, 0
        largest = 0
        while low <= high:
            judged = self._forecast(plan, sizes[middle], recompute)
            if judged.fits:
                best, largest, high = judged, middle, middle - 1
            else:
                too_large, low = judged, middle + 1
            middle = (low + high) // 2
        if best is not None and best.speed is not None:
            for size in sizes[largest + 1 :]:
                smaller = self._forecast(plan, size, recompute)
                if smaller.fits and smaller.step < NEARLY * best.step:
                    best = smaller
        return best, too_large

    def _recomputations(self, plan: Plan) -> tuple[ActivationCheckpointing, ...]:
        """Return the modes of recomputation that job and engine allow, the least first."""
        requested = self.job.memory.activation_checkpointing
        return recomputations(plan) if requested == "auto" else (requested,)

    def _micro_batches(self, plan: Plan) -> list[int]:
        """Return the micro-batches that the job allows, divisors of a rank's samples, the largest first."""
        if self.job.batch.micro_batch_size != "auto":
            return [self.job.batch.micro_batch_size]
        most = samples_per_pass(plan)
        sizes = divisors(plan.batch.micro_batch_size * plan.batch.accumulation_steps)
        return [size for size in reversed(sizes) if size <= most]

    def _forecast(self, plan: Plan, micro_batch_size: int, recompute: ActivationCheckpointing) -> Forecast:
        other = with_batch(plan, micro_batch_size, recompute)
        return forecast(other, self.target, self.program, self.sizes)

    def fastest(self) -> Plan:
        """Return the fastest plan that fits, with its decisions and with the plans not taken."""
        taken = min(self.fits, key=lambda fit: fit.forecast.step)
        engine, plan, step = self.first.engine, taken.forecast.plan, taken.forecast.step
        for fit in self.fits:
            if fit is not taken:
                reason = f"{fit.forecast.step / step:.2f}x the step" if step else "moves more"
                self.refuse(fit.option.words, "slower", reason)
        # If another engine is taken, the decision for the first engine no longer holds.
        default = [
            each for each in self.first.decisions if each.key == "parallel.engine" and plan.engine == engine
        ]
        chosen = (*default, *plan.decisions, *self._decisions(taken), *taken.decisions)
        decisions = {decision.key: decision for decision in chosen}
        return plan.model_copy(
            update={"decisions": tuple(decisions.values()), "refused": tuple(self.refused)}
        )

    def _decisions(self, taken: _Fit) -> list[Decision]:
        """Return the decisions of this search."""
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
            source = "its class's profile" if taken.forecast.traced else "the formulas"
            reason = (
                f"the peak, {in_phase(highest.name)}, is {gib(highest.total)} of the {gib(usable)} that a "
            )
            reason += f"rank may use, by {source} ({highest.where})"
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
        """Return a clause on why the next larger micro-batch is not taken."""
        plan, sizes = taken.plan, self._micro_batches(taken.plan)
        place = sizes.index(plan.batch.micro_batch_size)
        if place == 0:
            return f"more than {samples_per_pass(plan)} are no faster"
        larger = self._forecast(plan, sizes[place - 1], plan.activation_checkpointing)
        if larger.fits and larger.speed and taken.speed:
            return f"{sizes[place - 1]} take {larger.step / taken.step:.2f}x the step"
        return f"more would not fit into {gib(self.target.usable_bytes(plan.mesh.device))}"
