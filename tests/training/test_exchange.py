"""What ranks tell each other arrives as it was, and nothing that arrives is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from launcher.errors import CheckpointError, ConfigurationError, LauncherError
from launcher.runs.error_class import classify
from launcher.training import exchange
from launcher.training.checkpoint import messages
from launcher.training.checkpoint.group import Ranks
from launcher.training.checkpoint.storage import TensorPlanner, global_plan
from tests.training.ranks import on_ranks

VALUES = [None, {"a": [1, 2.5, float("inf"), "é", True]}]
ERRORS = [
    CheckpointError("no"),
    ConfigurationError("bad"),
    OSError(28, "No space left on device", "/x/y"),
    ZeroDivisionError("by 0"),
]


class Payload:
    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def _arrays(rank: int) -> list[np.ndarray]:
    """Ragged: as many and as long as the rank."""
    whole = [
        np.arange(rank * 6, dtype=np.float32).reshape(-1, 3),
        np.array([True, False]),
        np.zeros((0, 2), dtype=np.int64),
    ]
    return [whole, [], [np.float16(1.5) * np.ones((2, 2), dtype=np.float16)]][rank]


def _talk(flag: str) -> dict[str, Any]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    said: dict[str, Any] = {
        "all": exchange.all_gather(VALUES[rank % 2]),
        "first": exchange.from_first({"rank": rank}),
        "arrays": exchange.all_gather_arrays(_arrays(rank)),
    }
    ranks = Ranks(rank, size)

    def fail(error: Exception) -> None:
        raise error

    said["errors"] = []
    for error in ERRORS:
        try:
            ranks.from_first(lambda error=error: fail(error))  # type: ignore[misc]
        except Exception as caught:
            said["errors"].append((classify(caught)[0].failure_class, str(caught)))
    exchange.refuse_pickles()
    plain: list[Any] = [None] * size
    distributed.all_gather_object(plain, {"rank": rank, "of": [1, "a", (2.0, None)]})
    said["plain"] = plain
    objects = [Payload(flag) if rank == 0 else None]
    if rank == 0:
        distributed.broadcast_object_list(objects, src=0)
        said["refused"] = ""
    else:
        with pytest.raises(pickle.UnpicklingError, match="nothing that runs") as refused:
            distributed.broadcast_object_list(objects, src=0)
        said["refused"] = str(refused.value)
    return said


def test_ranks_understand_each_other_and_run_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    said = on_ranks(3, _talk, str(flag))
    for one in said:
        assert one["all"] == [VALUES[0], VALUES[1], VALUES[0]]
        assert one["first"] == {"rank": 0}
        assert one["plain"] == [{"rank": rank, "of": [1, "a", (2.0, None)]} for rank in range(3)]
        for rank, arrays in enumerate(one["arrays"]):
            expected = _arrays(rank)
            assert [(a.dtype, a.shape) for a in arrays] == [(a.dtype, a.shape) for a in expected]
            assert all(np.array_equal(a, b) for a, b in zip(arrays, expected, strict=True))
        kinds = [classify(error)[0].failure_class for error in ERRORS]
        assert [kind for kind, _ in one["errors"]] == kinds
        assert all(
            "by 0" in text or text == str(error)
            for (_, text), error in zip(one["errors"], ERRORS, strict=True)
        )
    assert "system" in said[1]["refused"] and not flag.exists()


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="numbers"):
        exchange._arrays([("|O", [1])], b"\0" * 8)
    with pytest.raises(TypeError, match="numbers"):
        exchange._number_type("<U3")


def test_a_plan_is_the_same_after_it_was_told() -> None:
    tensors = {
        "a.weight": torch.zeros(3, 4),
        "a.scale": torch.tensor(1.0),
        "b": torch.zeros(5, dtype=torch.bfloat16, requires_grad=True),
    }
    planner = TensorPlanner()
    local = planner.local_plan(tensors, is_coordinator=True)
    assert messages.plan(messages.of_plan(local)) == local
    plans, metadata = global_plan(planner, [messages.plan(messages.of_plan(local))])
    assert global_plan(planner, [local]) == (plans, metadata)
    assert [messages.plan(messages.of_plan(plan)) for plan in plans] == plans


def test_a_dtype_that_is_none_is_refused() -> None:
    content = messages.of_plan(TensorPlanner().local_plan({"a": torch.zeros(2)}, is_coordinator=True))
    content["items"][0][2][0] = "load"
    with pytest.raises(TypeError, match="no type of a tensor"):
        messages.plan(content)


def test_the_classes_of_errors_are_found_again() -> None:
    from launcher.training.checkpoint.group import _error, _kind_and_arguments

    for error in (LauncherError("a"), *ERRORS[:3]):
        again = _error(*_kind_and_arguments(error))
        assert type(again) is type(error) and str(again) == str(error)
