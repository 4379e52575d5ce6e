"""What is learnt of an engine from two steps that are little else than messages."""

from __future__ import annotations

import importlib.util

import pytest

from launcher.planner.hardware.calibration import rates_for
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.decoders import Llama
from launcher.planner.speed import comm_benchmark
from launcher.planner.speed.collectives import traffic
from launcher.planner.speed.step_time import optimizer_seconds
from launcher.runs.machine import Machine, Rates

CPU = Rates("cpu", "2026-11-24", {"fp32": 100e9}, 20e9)
KINDS = ("fsdp full", "fsdp gradients", "deepspeed optimizer", "deepspeed gradients", "deepspeed full")


@pytest.fixture(autouse=True)
def _deepspeed_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_there_is_a_step_of_each_engine_and_cut() -> None:
    found = comm_benchmark.plans(2, "fsdp") | comm_benchmark.plans(2, "deepspeed")
    assert tuple(found) == KINDS
    for name, both in found.items():
        for plan in both:
            assert f"{plan.engine} {plan.sharding}" == name
            assert (plan.mesh.world_size, plan.mesh.device, plan.batch.accumulation_steps) == (2, "cpu", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_costs_come_out_of_the_steps_that_they_make(kind: str) -> None:
    both = comm_benchmark.plans(2, kind.partition(" ")[0])[kind]
    rates = rates_for(both[0], Hardware(2, 1 << 40), Machine((CPU,)))
    assert rates is not None
    seconds = []
    for plan, sizes in zip(both, (comm_benchmark.SMALL, comm_benchmark.LARGE), strict=True):
        units = Llama(sizes).units()
        sent = traffic(plan, units)
        seconds.append(
            0.002 * sent.num_messages + 3e-9 * sent.received + optimizer_seconds(plan, units, rates)
        )
    made = comm_benchmark.costs(both, (seconds[0], seconds[1]), rates)
    assert made == (pytest.approx(0.002), pytest.approx(3e-9))
    assert comm_benchmark.costs(both, (seconds[1], seconds[0]), rates) is None, (
        "bytes are not free, whatever else was done meanwhile"
    )
