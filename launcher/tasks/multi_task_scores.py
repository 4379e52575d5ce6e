"""Scores of several tasks at once, each from its own evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.task import Evaluator, Output

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

BatchOf = Callable[[dict[str, Any], str], dict[str, Any] | None]
"""A function that returns one task's part of a batch, by name; None if the batch has no sample of it."""


class MultiTaskScores(Evaluator):
    """The metrics of each task as `TASK/metric`, and `loss`: the sum over the tasks of weight x loss."""

    def __init__(
        self, evaluators: Mapping[str, Evaluator], weights: Mapping[str, float], batch_of: BatchOf
    ) -> None:
        self._evaluators, self._weights, self._batch_of = dict(evaluators), weights, batch_of

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        assert output.parts is not None
        for name, one in self._evaluators.items():
            if (own := self._batch_of(batch, name)) is not None:
                one.update(output.parts[name], own)

    def state(self) -> list[np.ndarray]:
        """Return the number of arrays of each task, int64 [tasks], followed by the arrays."""
        states = [one.state() for one in self._evaluators.values()]
        return [np.array(list(map(len, states)), dtype=np.int64), *(array for own in states for array in own)]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        every = [_by_task(state) for state in states]
        metrics: dict[str, float] = {"loss": 0.0}
        for number, (name, one) in enumerate(self._evaluators.items()):
            own = one.compute([state[number] for state in every])
            metrics["loss"] += self._weights[name] * own["loss"]
            metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
        return metrics

    def details(self) -> dict[str, Any]:
        """Return the details of each task, by its name."""
        told = {name: one.details() for name, one in self._evaluators.items()}
        return {name: own for name, own in told.items() if own}

    def as_copy(self, state: Sequence[np.ndarray], copy: int) -> Sequence[np.ndarray]:
        parts = _by_task(state)
        own = [
            one.as_copy(part, copy)
            for one, part in zip(self._evaluators.values(), parts, strict=True)
        ]  # fmt: skip
        return [state[0], *(array for part in own for array in part)]


class OneTaskScores(Evaluator):
    """The metrics of one of several tasks, over some of its rows."""

    def __init__(self, name: str, evaluator: Evaluator, batch_of: BatchOf) -> None:
        self._name, self._evaluator, self._batch_of = name, evaluator, batch_of

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        assert output.parts is not None
        if (own := self._batch_of(batch, self._name)) is not None:
            self._evaluator.update(output.parts[self._name], own)

    def state(self) -> list[np.ndarray]:
        return self._evaluator.state()

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        return self._evaluator.compute(states)


def _by_task(state: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    ends = np.cumsum(state[0]).tolist()
    begins = [0, *ends[:-1]]
    return [state[1 + begin : 1 + end] for begin, end in zip(begins, ends, strict=True)]
