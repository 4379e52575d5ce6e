"""Warnings, once each, about a job that learns nothing, or soon will not."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable

import torch

from launcher.job.schema import Training
from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.engines.engine import Engine
from launcher.training.model import adapters
from launcher.training.model.loading import local_part
from launcher.training.schedule import Schedule

_STEPS = 30
"""The steps of the mean loss, and the updates after which parameters must have moved."""
_OF_CHANCE = 0.98
"""The share of the loss of guessing above which the model knows nothing of the answers. A language model
knows more after a few steps."""
_FALL = 0.005
"""The share of the earlier half's mean loss by which the later half is lower if anything is learned."""
_TIMES_MEDIAN = 10.0
"""The multiple of the gradient norm's running median above which it explodes, if that lasts."""
_IN_A_ROW = 5
_WINDOW = 64
_SMALLEST_MOVE = torch.finfo(torch.float32).eps
"""The mean relative change below which fp32 rounds most of an update away."""
_NUM_SAMPLED = 256
"""The number of elements of each tensor that are watched."""


class Symptoms:
    """One rank's watch over a run's numbers; `event` writes an event once for all ranks."""

    def __init__(
        self,
        training: Training,
        schedule: Schedule,
        chance: float | None,
        sampled: Sample,
        event: Callable[..., None],
        first_step: int = 0,
        said: list[str] | None = None,
    ) -> None:
        """Start the watch. `chance`: the loss of guessing, if known. `first_step`: the steps before this
        attempt; `said`: the warnings in them."""
        self._training, self._schedule, self._chance, self._event = training, schedule, chance, event
        self._sampled = sampled
        self._losses: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._num_exploded = self._num_zero = self._num_updates = 0
        self._judges_from = max(first_step, schedule.num_warmup_steps)
        self._looked = False
        self.said = [] if said is None else said
        """The kinds of warnings given in this run."""

    def note(self, step: int, loss: float, gradient_norm: float) -> None:
        """Add the numbers of `step`, counted from 1, whose update was applied."""
        if self._training.is_range_test:
            return  # it is meant to find where training fails
        self._guesses(step, loss)
        self._explodes(step, gradient_norm)
        self._vanishes(step, gradient_norm)
        self._stands_still(step)

    def _say(self, kind: str, step: int, text: str) -> None:
        if kind not in self.said:
            self.said.append(kind)
            self._event("symptom", kind=kind, step=step, text=text)

    @property
    def _rate(self) -> str:
        return f"training.learning_rate ({self._training.learning_rate:g})"

    def _guesses(self, step: int, loss: float) -> None:
        if self._chance is None or step <= self._judges_from:
            return
        self._losses.append(loss)
        losses, mean = list(self._losses), statistics.fmean(self._losses)
        if len(losses) == _STEPS and mean >= _OF_CHANCE * self._chance:
            earlier, later = statistics.fmean(losses[: _STEPS // 2]), statistics.fmean(losses[_STEPS // 2 :])
            if later < (1 - _FALL) * earlier:
                return  # a model trained from scratch learns, but later
            place = "is above" if mean > (2 - _OF_CHANCE) * self._chance else "stays at"
            text = (
                f"the loss {place} what guessing gives: {mean:.4g} over {_STEPS} steps, and guessing "
                f"{self._chance:.4g}"
            )
            self._say(
                "chance",
                step,
                f"{text}; lower {self._rate}, or look at the labels and at what of a row is learned",
            )

    def _explodes(self, step: int, norm: float) -> None:
        known = 2 * len(self._norms) >= _WINDOW
        median = statistics.median(self._norms) if known else math.inf
        if norm <= _TIMES_MEDIAN * median:
            self._num_exploded = 0
            self._norms.append(norm)
            return
        self._num_exploded += 1
        if self._num_exploded == _IN_A_ROW:
            times = f"{_IN_A_ROW} steps more than {_TIMES_MEDIAN:g} times its running median ({median:.4g})"
            text = f"the gradient norm is {norm:.4g}, for {times}"
            clip = "" if self._training.clip_norm > 0 else ", or clip it (training.clip_norm)"
            self._say("gradient", step, f"{text}; lower {self._rate}{clip}")
            self._norms.clear()

    def _vanishes(self, step: int, norm: float) -> None:
        self._num_zero = self._num_zero + 1 if norm == 0 else 0
        if self._num_zero == _IN_A_ROW:
            text = f"the gradient is 0, for {_IN_A_ROW} steps: nothing is learned any more"
            self._say("no gradient", step, f"{text}; lower {self._rate}, or look at what of a row is learned")

    def _stands_still(self, step: int) -> None:
        self._num_updates += 1
        if self._looked or self._num_updates < _STEPS or step <= self._schedule.num_warmup_steps:
            return
        self._looked = True
        if (move := self._sampled.move()) is not None and move < _SMALLEST_MOVE:
            text = (
                f"after {self._num_updates} updates what is trained has moved by {move:.1g} of its size, "
                "less than fp32 can tell"
            )
            self._say("no effect", step, f"{text}: raise {self._rate}")


class Sample:
    """Some elements of all trained tensors of this rank, at the start and now."""

    def __init__(self, engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
        """Copy some elements. `tensors`: the engine's, whose storage stays the same during training."""
        trained = (
            name for name, parameter in adapters.named_parameters(engine.model) if parameter.requires_grad
        )
        self._tensors = [tensors[f"model.{name}"] for name in trained if f"model.{name}" in tensors]
        self._before = self._now()

    def move(self) -> float | None:
        """Return the elements' mean change relative to their mean size; None if this rank has none, or all
        are 0."""
        size = float(self._before.abs().mean()) if len(self._before) else 0.0
        return float((self._now() - self._before).abs().mean()) / size if size else None

    def _now(self) -> torch.Tensor:
        return torch.cat([_some(tensor) for tensor in self._tensors] or [torch.empty(0)])


def _some(tensor: torch.Tensor) -> torch.Tensor:
    own = (tensor.values() if isinstance(tensor, FlatShard) else local_part(tensor)).detach().reshape(-1)
    return own[:: max(1, own.numel() // _NUM_SAMPLED)].float().cpu().clone()
