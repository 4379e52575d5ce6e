"""The time of each rank's own work, without waiting, to find slow ranks.

About every tenth step these times are part of the step's usual collective, one number per rank. So all ranks
know all times. The slow rank finds the reason itself, because it can only be seen on its node.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.runs.places import here
from launcher.training.reporting.journal import Journal
from launcher.training.reporting.slowness import Evidence, reason
from launcher.training.reporting.whereabouts import waited

STEPS_BETWEEN = 10
SLOW_FACTOR, OVER_FACTOR = 1.5, 1.2
SLOW_SECONDS = 30.0
SLOW_MARGIN_SECONDS = 0.02
"""Below this difference a step's own work is noise, whatever the factor."""
STOPPED_SHARE = 0.3
"""The share of the supervisor's samples from which a stopped rank counts as slow, even if it mostly was
waiting."""
_FEWEST_RIDES, _FEWEST_LOOKS = 3, 20
_LONG_STEP_SECONDS = 1.0
"""Above this duration every step has the numbers, so that a slow rank is found within a minute."""
_SECONDS_BETWEEN_EVIDENCE, _SECONDS_BETWEEN_JUDGEMENTS = 5.0, 1.0


@dataclass
class _Ride:
    """One comparison: this rank's own time of a step, and the median of the others'."""

    time: float
    mine: float
    others: float


class Own:
    """The seconds of a rank's own work in a step.

    On a CPU: from the beginning of the step to the collective, without waiting. On a GPU, where Python cannot
    see waiting: the loader's time, and the forward time of the repeated layers by CUDA events, which begin
    after the gather of their parameters.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = self._waited = self._loader = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._measures = False
        for layer in layers if self._on_gpu else ():
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after)

    def begin(self, measures: bool) -> None:
        """Begin a step; on a GPU only some steps are measured."""
        self._began, self._waited, self._measures = time.perf_counter(), waited.seconds, measures
        if measures:
            self._loader = 0.0
            self._events.clear()

    def loaded(self, seconds: float) -> None:
        """Record the time of the loader."""
        if self._measures:
            self._loader += seconds

    def end(self) -> float | None:
        """Return the duration of the step's own work. On a GPU it is the last measured step with completed
        events; None without one."""
        if not self._on_gpu:
            return time.perf_counter() - self._began - (waited.seconds - self._waited)
        if not self._events or not self._events[-1][1].query():
            return None
        seconds = sum(before.elapsed_time(after) for before, after in self._events) / 1000
        self._events.clear()
        return float(seconds) + self._loader

    def _before(self, *_: Any) -> None:
        if self._measures and torch.is_grad_enabled():
            self._events.append((self._mark(), None))

    def _after(self, *_: Any) -> None:
        if self._measures and self._events and self._events[-1][1] is None:
            self._events[-1] = (self._events[-1][0], self._mark())

    @staticmethod
    def _mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Pace:
    """The search for slow ranks. Every rank has one, and all come to the same result."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        say: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty. `say(**fields)` is called once, on a slow rank, in a separate thread: with rank,
        factor, seconds, median and reason."""
        self._rank, self._world_size, self._say, self._clock = rank, world_size, say, clock
        self._own: list[float] = []
        self._last_own = 0.0
        self._steps = 0
        self._every = STEPS_BETWEEN
        self._rides: deque[_Ride] = deque()
        self._evidence: deque[tuple[float, Evidence]] = deque()
        self._judged_at = 0.0
        self._is_said = False

    def worked(self, seconds: float | None) -> None:
        """Record the seconds of this rank's own work in the step."""
        self._steps += 1
        if seconds is not None:
            if self._world_size > 1:  # else they are not needed
                self._own.append(seconds)
            here.own_work(seconds)

    @property
    def measures(self) -> bool:
        """Return whether the step that begins now has the numbers."""
        return self._world_size > 1 and (self._steps + 1) % self._every == 0

    @property
    def rides(self) -> bool:
        """Return whether this step's collective has the numbers; the same on all ranks."""
        return self._world_size > 1 and self._steps % self._every == 0

    def share(self) -> list[float]:
        """Return this rank's contribution to the collective: a number for each rank, all 0 but its own, which
        is set in some steps.

        The length is the same in every step: rounding of a sum may depend on its length, and a resumed run
        has other steps with numbers.
        """
        if self._world_size == 1:
            return []
        if not self.rides:
            return [0.0] * self._world_size
        self._last_own = statistics.fmean(self._own) if self._own else self._last_own
        self._own.clear()
        return [self._last_own if rank == self._rank else 0.0 for rank in range(self._world_size)]

    def take(self, own: list[float]) -> None:
        """Take the sum of all shares, the same on all ranks."""
        if not own or min(own) <= 0:
            return
        now = self._clock()
        self._every = 1 if max(own) > _LONG_STEP_SECONDS else STEPS_BETWEEN
        self._note(now, own)
        if now - self._judged_at < _SECONDS_BETWEEN_JUDGEMENTS:
            return
        self._judged_at = now
        factor, seconds, others = self._slowness()
        if self._is_said:
            self._is_said = factor >= OVER_FACTOR
            here.slow(factor if self._is_said else 0.0)
        elif factor and now - self._rides[0].time >= SLOW_SECONDS and len(self._rides) >= _FEWEST_RIDES:
            self._is_said = True
            here.slow(factor)
            lasted = now - self._rides[0].time
            threading.Thread(
                target=self._explain,
                args=(self._evidence[0][1], lasted, factor, seconds, others),
                daemon=True,
            ).start()

    def _note(self, now: float, own: list[float]) -> None:
        """Keep the numbers of the last half minute, and a little more."""
        self._rides.append(
            _Ride(now, own[self._rank], statistics.median(own[: self._rank] + own[self._rank + 1 :]))
        )
        while len(self._rides) > _FEWEST_RIDES and now - self._rides[1].time >= SLOW_SECONDS:
            self._rides.popleft()
        if not self._evidence or now - self._evidence[-1][0] >= _SECONDS_BETWEEN_EVIDENCE:
            self._evidence.append((now, Evidence.now()))
        while len(self._evidence) > 1 and now - self._evidence[1][0] >= SLOW_SECONDS:
            self._evidence.popleft()

    def _slowness(self) -> tuple[float, float, float]:
        """Return how many times slower than the others this rank was since then (0 if it is not slow), its
        own seconds, and theirs.

        It is slow if it was slow in most comparisons: one long pause makes no slow rank.
        """
        seconds, usual = (
            statistics.fmean(getattr(ride, name) for ride in self._rides) for name in ("mine", "others")
        )
        often = sum(ride.mine > SLOW_FACTOR * ride.others for ride in self._rides) > len(self._rides) / 2
        if self._is_said or (
            often and seconds > SLOW_FACTOR * usual and seconds - usual > SLOW_MARGIN_SECONDS
        ):
            return seconds / usual, seconds, usual
        looks, stopped = (
            after - before
            for before, after in zip(self._evidence[0][1].looks[:2], here.looks()[:2], strict=True)
        )
        if looks >= _FEWEST_LOOKS and stopped >= STOPPED_SHARE * looks:
            return looks / max(1, looks - stopped), seconds, usual
        return 0.0, seconds, usual

    def _explain(self, began: Evidence, lasted: float, factor: float, seconds: float, others: float) -> None:
        """Find the reason, which may take a second, and report it."""
        why = reason(began, Evidence.now())
        own = {"own_seconds": round(seconds, 4), "median_seconds": round(others, 4)}
        self._say(rank=self._rank, factor=round(factor, 2), seconds=round(lasted, 1), reason=why, **own)


def straggler(journal: Journal, events_file: Path, **fields: Any) -> None:
    """Write the event of a slow rank with a line for people. The rank itself does it, because only it sees
    the reason."""
    host = os.uname().nodename
    slow = f"rank {fields['rank']} on {host} is {fields['factor']:.1f} times slower than the others"
    own, others = fields["own_seconds"], fields["median_seconds"]
    # A rank that is stopped repeatedly may be stopped while it waits; then its own work does not show it.
    numbers = f" ({own:.2f} s a step of its own, median {others:.2f} s)" if own > SLOW_FACTOR * others else ""
    line = f"{slow} for {fields['seconds']:.0f} s{numbers}: {fields['reason']}"
    journal.event(events_file, "straggler", host=host, line=line, **fields)
