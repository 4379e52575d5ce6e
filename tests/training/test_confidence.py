"""Bootstrap intervals: those of scipy on the same draws, for any number of ranks, a row with all its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from launcher.tasks.answer_scores import AnswerScores
from launcher.tasks.task import Evaluator, Output
from launcher.training.confidence import Apart, interval


class Mean(Evaluator):
    """The mean of what a batch holds."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        self.seen += batch["values"]

    def state(self) -> list[np.ndarray]:
        return [np.array(self.seen)]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        return {"loss": float(np.concatenate([seen for (seen,) in states]).mean())}


def seen(values: Sequence[float], ids: Sequence[int], num_ranks: int) -> Apart:
    """What the first rank computes where the values are dealt to so many, the last of which have filler."""
    ranks = []
    for rank in range(num_ranks):
        one = Apart(Mean, ids[rank::num_ranks])
        for value in values[rank::num_ranks]:
            one.update(None, {"values": [value]})  # type: ignore[arg-type]
        if len(ids[rank::num_ranks]) < -(-len(ids) // num_ranks):
            one.update(None, {"values": []})  # type: ignore[arg-type]
        ranks.append(one)
    ranks[0].metrics = ranks[0].compute([one.state() for one in ranks])
    return ranks[0]


def test_they_are_those_of_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=50)
    found = interval(seen(values.tolist(), range(50), 1).drawn(2000, seed=5)["loss"])
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(5)
    )
    assert found == pytest.approx([theirs.confidence_interval.low, theirs.confidence_interval.high], rel=0.01)


def test_any_number_of_ranks_draws_the_same() -> None:
    values = np.random.default_rng(2).normal(size=11).tolist()
    one, three = seen(values, range(11), 1), seen(values, range(11), 3)
    assert three.metrics["loss"] == pytest.approx(np.mean(values))
    np.testing.assert_allclose(one.drawn(100, 3)["loss"], three.drawn(100, 3)["loss"], rtol=1e-12)
    assert not np.array_equal(one.drawn(100, 3)["loss"], one.drawn(100, 4)["loss"])


def test_a_row_is_drawn_with_all_its_samples() -> None:
    """Two windows of a row that cancel out leave nothing to vary."""
    values = [sign * number for number in range(1, 6) for sign in (1.0, -1.0)]
    ids = [number for number in range(5) for _ in range(2)]
    np.testing.assert_allclose(seen(values, ids, 2).drawn(50, 0)["loss"], 0, atol=1e-12)


def test_a_question_that_is_drawn_twice_counts_twice() -> None:
    """Its evaluator merges windows by their row: without telling copies apart, two would be one."""
    scores = AnswerScores(False, None, 10)
    texts = [b"so", json.dumps(["so"]).encode()]
    lengths, content = np.array([2, len(texts[1])]), np.frombuffer(b"".join(texts), dtype=np.uint8)
    state = [np.array([1.0, 1.0]), np.array([[7.0, 0.0, 3.0, -1.0, 9.0]]), lengths, content]
    other = [
        np.array([1.0, 1.0]),
        np.array([[8.0, 0.0, 3.0, -1.0, 9.0]]),
        lengths,
        np.frombuffer(b"no" + texts[1], dtype=np.uint8),
    ]
    drawn = [scores.as_copy(one, copy) for copy, one in enumerate((state, state, other))]
    found = scores.compute(drawn)
    assert scores.details()["num_questions"] == 3
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_a_metric_without_values_has_no_interval() -> None:
    assert np.isnan(interval(np.full(9, np.nan))).all()
    assert interval(np.array([np.nan, 1.0, 1.0])) == [1.0, 1.0]
