"""How fast each rank works when it does not wait for the others, and which one is slow.

The time of a rank's own work rides in the exchange that each step has anyway, one number a rank, every tenth step or so. All ranks thus
know all of them; the slow one finds out why it is slow, as what can be seen of it is seen on its node.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.runs.places import here
from launcher.training.slowness import Evidence, reason
from launcher.training.whereabouts import waited

STEPS_BETWEEN = 10
SLOW_FACTOR, OVER_FACTOR = 1.5, 1.2
SLOW_SECONDS = 30.0
SLOW_MARGIN_SECONDS = 0.02
"""Below this difference a step's own work is noise, whatever the factor."""
_FEWEST_RIDES = 3
_LONG_STEP_SECONDS = 1.0
"""Where a step takes longer than this, the numbers ride in every one, so that a slow rank is known within a minute."""


@dataclass
class _Slow:
    """One rank, slow since then."""

    since: float
    rides: int = 0
    said: bool = False
    evidence: Evidence | None = None


class Own:
    """The seconds of a rank's own work in a step.

    On a CPU: those from the beginning of the step to the exchange, without those in which it waited. On a GPU, where waiting is invisible
    from Python: what the loader takes, and what the repeated layers take forward by CUDA's events, which begin after their parameters came.
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
        """A step begins; on a GPU only some are measured."""
        self._began, self._waited, self._measures = time.perf_counter(), waited.seconds, measures
        if measures:
            self._loader = 0.0
            self._events.clear()

    def loaded(self, seconds: float) -> None:
        """The loader took so long."""
        if self._measures:
            self._loader += seconds

    def end(self) -> float | None:
        """What the step's own work took. On a GPU of the last measured one whose events are over; None where there is none."""
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
    """Who is slow. Every rank has one, and all come to the same."""

    def __init__(self, rank: int, world_size: int, say: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        """`say(**fields)` is called once, on a rank that is slow, in a thread of its own: with rank, factor, seconds, median and reason."""
        self._rank, self._world_size, self._say, self._clock = rank, world_size, say, clock
        self._own: list[float] = []
        self._last_own = 0.0
        self._steps = 0
        self._every = STEPS_BETWEEN
        self._slow: dict[int, _Slow] = {}

    def worked(self, seconds: float | None) -> None:
        """What this rank's own work of the step took."""
        self._steps += 1
        if seconds is not None:
            self._own.append(seconds)
            here.own_work(seconds)

    @property
    def measures(self) -> bool:
        """Whether the numbers go along with the step that begins now."""
        return self._world_size > 1 and (self._steps + 1) % self._every == 0

    @property
    def rides(self) -> bool:
        """Whether the numbers go along with this step's exchange; the same on all ranks."""
        return self._world_size > 1 and self._steps % self._every == 0

    def share(self) -> list[float]:
        """What this rank adds to the exchange: nothing, or a number for each rank, of which its own is not 0."""
        if not self.rides:
            return []
        self._last_own = statistics.fmean(self._own) if self._own else self._last_own
        self._own.clear()
        return [self._last_own if rank == self._rank else 0.0 for rank in range(self._world_size)]

    def take(self, own: list[float]) -> None:
        """The sum of all shares, the same on all ranks."""
        if not own or min(own) <= 0:
            return
        now = self._clock()
        self._every = 1 if max(own) > _LONG_STEP_SECONDS else STEPS_BETWEEN
        for rank, seconds in enumerate(own):
            others = statistics.median(own[:rank] + own[rank + 1 :])
            self._judge(now, rank, seconds, others)

    def _judge(self, now: float, rank: int, seconds: float, others: float) -> None:
        is_slow = seconds > SLOW_FACTOR * others and seconds - others > SLOW_MARGIN_SECONDS
        slow = self._slow.get(rank)
        if slow is None:
            if is_slow:
                self._slow[rank] = _Slow(now, 1, evidence=Evidence.now() if rank == self._rank else None)
            return
        if not is_slow:
            if not slow.said or seconds < OVER_FACTOR * others:
                del self._slow[rank]
                if rank == self._rank:
                    here.slow(0.0)
            return
        slow.rides += 1
        if slow.said and rank == self._rank:
            here.slow(seconds / others)
        if not slow.said and now - slow.since >= SLOW_SECONDS and slow.rides >= _FEWEST_RIDES:
            slow.said = True
            if rank == self._rank:
                here.slow(seconds / others)
                threading.Thread(target=self._explain, args=(slow, now - slow.since, seconds, others), daemon=True).start()

    def _explain(self, slow: _Slow, lasted: float, seconds: float, others: float) -> None:
        """Find out why, which may take a second, and say it."""
        assert slow.evidence is not None
        self._say(
            rank=self._rank,
            factor=round(seconds / others, 2),
            seconds=round(lasted, 1),
            own_seconds=round(seconds, 4),
            median_seconds=round(others, 4),
            reason=reason(slow.evidence, Evidence.now()),
        )
