"""What follows an attempt: each class of end, and the bound on attempts that bring nothing."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.launch.slurm.policy import Attempt, Decision, decide
from launcher.runs.cut_off import MADE_ANEW


def attempt(end: str, before: int = 0, after: int = 0, **more: Any) -> Attempt:
    return Attempt(1, end, before, after, **more)


def failed(failure_class: str, cause: str = "x", before: int = 0, after: int = 0, **more: Any) -> Attempt:
    return attempt("failed", before, after, failure_class=failure_class, cause=cause, **more)


@pytest.mark.parametrize("end", ["finished", "cancelled"])
def test_what_is_over_is_left_alone(end: str) -> None:
    assert decide([attempt(end)], True, 3) == Decision(False, end)


@pytest.mark.parametrize(
    "failure_class", ["out-of-memory", "data", "configuration", "storage", "diverged", "checkpoint", "script"]
)
def test_what_would_fail_again_is_not_tried_again(failure_class: str) -> None:
    decision = decide([failed(failure_class, "no room", 0, 5)], True, 3)
    assert not decision.again and decision.reason.startswith(
        f"{failure_class}: it would fail again as it is; no room"
    )


@pytest.mark.parametrize("failure_class", ["rank-lost", "internal"])
def test_what_may_have_been_chance_is_tried_again(failure_class: str) -> None:
    assert decide([failed(failure_class)], True, 3) == Decision(True, f"{failure_class}: x")


@pytest.mark.parametrize(
    "cause",
    [
        "OSError: [Errno 5] Input/output error",
        "CUDA error: uncorrectable ECC error encountered",
        "Xid 79: GPU has fallen off the bus",
    ],
)
def test_a_broken_node_is_left_out(cause: str) -> None:
    assert decide([failed("storage", cause, host="n7")], True, 3) == Decision(
        True, f"storage: {cause}", ("n7",)
    )


def test_a_broken_gpu_is_left_out_by_its_class() -> None:
    cause = "CUDA error: an illegal memory access; the kernel's log: a GPU that is broken"
    assert decide([failed("gpu", cause, host="n7")], True, 3) == Decision(True, f"gpu: {cause}", ("n7",))


def test_a_cache_that_was_cut_off_is_mended_by_going_on() -> None:
    assert decide(
        [failed("data", f"killed: prepared data ({MADE_ANEW}) x.npy has 1 bytes of 2", host="n7")], True, 3
    ).again


def test_no_progress_ends_with_what_the_attempts_have_in_common() -> None:
    history = [
        failed("rank-lost", "killed", 0, 4, step=6),
        *[failed("rank-lost", "killed", 4, 4, step=6)] * 2,
    ]
    assert decide(history, True, 3).again
    decision = decide([*history, history[-1]], True, 3)
    assert (
        decision.reason
        == "no progress in 3 attempts in a row: ended (rank-lost) each time after step 6, saying: killed"
    )
    mixed = [failed("rank-lost", "a", step=6), failed("internal", "b", step=7)]
    assert decide(mixed, True, 2).reason.endswith(
        "ended (internal, rank-lost) after steps 6, 7; the last said: b"
    )


def test_progress_begins_the_count_anew() -> None:
    assert decide(
        [failed("rank-lost"), failed("rank-lost"), failed("rank-lost", before=0, after=2)], True, 2
    ).again


@pytest.mark.parametrize("end", ["preempted", "node lost", "requeued"])
def test_what_is_nobodys_fault_is_free(end: str) -> None:
    decision = decide([attempt(end)] * 9, True, 1)
    assert decision == Decision(True, end)
    assert decide([failed("rank-lost"), *[attempt(end)] * 5], True, 2).again


@pytest.mark.parametrize("end", ["node lost", "requeued"])
def test_what_takes_its_nodes_down_each_time_is_not_begun_for_ever(end: str) -> None:
    lost = [attempt(end)] * 10
    decision = decide(lost, True, 3)
    assert not decision.again and decision.reason.startswith("its nodes were lost 10 times in a row")
    assert decide([attempt("preempted"), *lost[1:]], True, 3).again
    assert decide([*lost[1:], attempt(end, 0, 5)], True, 3).again, "something was saved"
    assert decide(lost, True, 11).again, "cluster.attempts_without_progress says more"


def test_a_time_limit_in_which_nothing_is_saved_counts() -> None:
    assert decide([attempt("time limit", 5, 5)] * 9, True, 2).again
    decision = decide([attempt("time limit")] * 2, True, 2)
    assert not decision.again and "raise cluster.time_limit" in decision.reason


def test_a_launcher_that_was_killed_counts() -> None:
    assert decide([attempt("lost")], True, 2) == Decision(True, "its launcher was killed")
    assert not decide([attempt("lost")] * 2, True, 2).again


def test_who_does_not_want_it_is_not_requeued() -> None:
    assert decide([attempt("preempted")], False, 3) == Decision(
        False, "preempted, and cluster.requeue is false"
    )
