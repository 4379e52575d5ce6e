"""Find the fewest nodes or GPUs that will do: the next number to try, and why the others will not do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planner.forecast import Forecast
from launcher.planner.plan import Plan, Refused, Why
from launcher.runs import wording

Offloading = Literal["never", "where needed", "only"]
"""Whether to offload if the job leaves it open; `where needed` means only if nothing fits without."""
_NAMED = 8
"""How many of the numbers refused for one reason are listed."""


@dataclass(frozen=True)
class Attempt:
    """The plan for a number of nodes or GPUs, and its forecast, if there is one."""

    count: int
    plan: Plan
    forecast: Forecast | None
    why_unknown: str = ""
    """Why there is no forecast."""


class SmallestCluster:
    """A search for the smallest number whose plan fits and ends in time, driven by its caller.

    Each number that `candidates` yields is either added with its plan or rejected with an error.
    """

    def __init__(
        self, counts: Iterable[int], modes: Iterable[Offloading], seconds: float | None = None
    ) -> None:
        """Begin with the numbers to try, the offloading of each round, and a deadline in seconds."""
        self.counts, self.modes, self.seconds = sorted(counts), tuple(modes), seconds
        self.taken: Attempt | None = None
        self.attempts: list[Attempt] = []
        self.late: list[Attempt] = []
        """Plans that fit and end too late."""
        self.unknown: Attempt | None = None
        """A plan without a forecast, at which the search ends."""
        self.error: ConfigurationError | None = None
        """The error of the first number that is not possible."""
        self.reasons: dict[tuple[Why, str], list[int]] = {}
        """The numbers that will not do, by reason."""
        self._mode: Offloading = "where needed"

    def candidates(self) -> Iterator[tuple[int, Offloading]]:
        """Yield the next number and its offloading, the smallest first, until one will do."""
        for mode in self.modes:
            self._mode = mode
            for count in self.counts:
                if any(
                    why == "not possible" and count in numbers for (why, _), numbers in self.reasons.items()
                ):
                    continue
                yield count, mode
                if self.taken is not None or self.unknown is not None:
                    return

    def add(self, attempt: Attempt) -> None:
        """Take the plan for a number, or record why it will not do."""
        self.attempts.append(attempt)
        forecast = attempt.forecast
        if forecast is None:
            self.unknown = attempt
            return
        needed = forecast.duration.total if forecast.duration else float("inf")
        if not forecast.fits:
            self._refuse("does not fit", forecast.lack, attempt.count)
        elif self.seconds is not None and needed > self.seconds:
            self.late.append(attempt)
            self._refuse("too late", wording.duration(needed), attempt.count)
        else:
            self.taken = attempt

    def reject(self, count: int, error: ConfigurationError) -> None:
        """Record that no plan is possible for a number."""
        self.error = self.error or error
        problem = error.problems[0]
        reason = f"{problem.key}: {problem.reason}"
        if problem.key == "batch.global_batch_size":
            reason = "the batch cannot be cut over so many ranks"
        self._refuse("not possible", reason, count)

    def _refuse(self, why: Why, reason: str, count: int) -> None:
        numbers = self.reasons.setdefault((why, reason), [])
        if count not in numbers:  # with offloading it may lack as much as without
            numbers.append(count)

    @property
    def needs_offloading(self) -> bool:
        """Return whether the taken plan offloads something, and no number would do without."""
        return self._mode == "only" and self.taken is not None and self.taken.plan.offload != "none"

    @property
    def hopeless(self) -> ConfigurationError | None:
        """Return the error of all numbers, if they fail for another reason than memory or time."""
        if self.unknown is not None:
            return ConfigurationError(
                Problem("model.name", self.unknown.plan.model.name, self.unknown.why_unknown)
            )
        return self.error if self.reasons and all(why == "not possible" for why, _ in self.reasons) else None

    def refused(self, unit: str) -> tuple[Refused, ...]:
        """Return why the numbers that were not taken will not do."""
        taken = self.taken and self.taken.count  # what did not fit without offloading may be taken with it
        others = {
            key: [number for number in numbers if number != taken] for key, numbers in self.reasons.items()
        }
        return refused_numbers(others, unit)


def refused_numbers(reasons: Mapping[tuple[Why, str], list[int]], unit: str) -> tuple[Refused, ...]:
    """Return the numbers that will not do, grouped by reason: `2, 3, 4 nodes`."""
    refused = []
    for (why, reason), numbers in reasons.items():
        shown = [str(number) for number in numbers]
        if len(shown) > _NAMED:
            shown = [*shown[: _NAMED - 1], "...", shown[-1]]
        if numbers:
            what = f"{', '.join(shown)} {unit}{'s' * (numbers != [1])}"
            refused.append(Refused(what=what, why=why, reason=reason))
    return tuple(refused)


def offload_modes(job: Job, offloading: Offloading = "where needed") -> tuple[Offloading, ...]:
    """Return the offloading of each round: none at first, as a larger cluster may do without."""
    return (
        ("never", "only") if job.memory.offload == "auto" and offloading == "where needed" else (offloading,)
    )
