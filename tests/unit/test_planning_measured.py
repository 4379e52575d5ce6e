"""What was measured of a machine, and what the next plan makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log2
from pathlib import Path

import pytest

from launcher.cli.progress import notice
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.calibration import _CALLING, _WAITING, rates_for
from launcher.planner.hardware.detect import Gpu, Hardware
from launcher.planner.hardware.gpu_table import gpu_type
from launcher.planner.speed.collectives import LATENCY
from launcher.planner.target import Target, target_here
from launcher.runs.machine import Machine, Rates, path
from tests.unit.test_planning_footprint import plan_for

CPU = Rates(
    "cpu",
    "2026-11-23",
    {"fp32": 100e9, "bf16": 10e9, "fp16": 1e9},
    20e9,
    link=2e9,
    disk_write=0.5e9,
    disk_read=3e9,
)
HERE = Hardware(4, 256 << 30)


@pytest.fixture(autouse=True)
def _no_machine_yet() -> None:
    path().unlink(missing_ok=True)


def test_what_was_measured_is_kept_and_read_again() -> None:
    assert Machine.read() == Machine() and Machine().disk_rate() is None
    Machine().with_rates(CPU).write()
    found = Machine.read()
    assert found == Machine((CPU,)) and found.of("cpu") == CPU and found.of("H100") is None
    newer = Rates("cpu", "2026-11-24", {"fp32": 1.0}, 1.0)
    assert found.with_rates(newer).rates == (newer,)
    assert found.disk_rate() == 0.5e9
    for broken in ("{", '{"rates": [{"device": "cpu"}]}', '{"rates": [[]]}'):
        path().write_text(broken)
        assert Machine.read() == Machine()


def test_a_state_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    Machine().with_rates(CPU).write()
    assert Machine.read() == Machine()


def test_files_of_earlier_versions_are_read() -> None:
    Machine((CPU,)).write()
    content = json.loads(path().read_text())
    content |= {"ratios": {"cpu fsdp full fp32 none": [1.2]}, "slacks": {"cpu": [0.1]}}
    content["rates"][0]["engines"] = {"lean": {"fsdp full": [0.002, 4e-9]}}
    path().write_text(json.dumps(content))
    assert Machine.read() == Machine((CPU,))


def test_ranks_on_a_cpu_share_what_was_measured(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, mesh__device="cpu", mesh__ranks_per_node=4, precision="bf16")
    assert rates_for(plan, HERE) is None
    found = rates_for(plan, HERE, Machine((CPU,)))
    assert found is not None and (found.full_rate, found.half_rate, found.bandwidth, found.link) == (
        25e9,
        2.5e9,
        5e9,
        2e9,
    )


def test_the_calling_of_operators_and_of_messages_counts_where_it_was_measured(tmp_path: Path) -> None:
    """On a CPU beside the computing; what is recomputed is called again, under selective checkpointing at a
    price of its own."""
    known = replace(CPU, reference={"none": 0.004, "selective": 0.024, "full": 0.006}, message=0.002)
    plan = plan_for(
        tmp_path, mesh__device="cpu", mesh__ranks_per_node=2, precision="fp32", batch__micro_batch_size=1
    )
    steps = {}
    for rates in (CPU, known):
        Machine((rates,)).write()
        for way in ("none", "selective", "full"):
            made = forecast_of(
                plan.model_copy(update={"activation_checkpointing": way}), target_here(plan, HERE)
            )
            assert made is not None and made.speed is not None
            steps[rates is known, way] = made.speed
    more = {
        way: steps[True, way].compute - steps[False, way].compute for way in ("none", "selective", "full")
    }
    assert 0 < more["none"] < more["full"] < more["selective"]
    # 32 layers in place of the reference model's four, and the same stem and head.
    assert 6 * 0.004 < more["none"] / _CALLING < 8 * 0.004
    messages = 32 * 3 + 2  # what stands outside of the layers stays whole
    bare = messages * (_WAITING * 0.002 - LATENCY * log2(plan.mesh.world_size))
    assert steps[True, "none"].communication - steps[False, "none"].communication == pytest.approx(bare)


def test_a_gpu_computes_while_operators_are_called(tmp_path: Path) -> None:
    gpu, plan = gpu_type("h100-80gb"), plan_for(tmp_path, batch__micro_batch_size=1)
    fast, slow = (
        forecast_of(plan, Target(0, replace(gpu, operator_seconds={"none": seconds})))
        for seconds in (1e-9, 1e-2)
    )
    assert fast is not None and slow is not None and fast.speed is not None and slow.speed is not None
    plain = forecast_of(plan, Target(0, gpu))
    assert plain is not None and plain.speed is not None and fast.speed.compute == plain.speed.compute
    assert slow.speed.compute > 10 * plain.speed.compute


def test_a_gpu_that_was_measured_goes_before_the_table(tmp_path: Path) -> None:
    name = "NVIDIA H100 80GB HBM3"
    hardware = Hardware(16, 1 << 38, gpus=(Gpu(name, 80 << 30, 9.0),))
    plan = plan_for(tmp_path, mesh__device="cuda", precision="bf16")
    assert rates_for(plan, hardware, Machine()).key == "h100-80gb"  # type: ignore[union-attr]
    own = Rates(name, "2026-11-23", {"fp32": 50e12, "bf16": 700e12}, 3e12)
    found = rates_for(plan, hardware, Machine((own,)))
    assert found is not None and (found.half_rate, found.bandwidth, found.link, found.capability) == (
        700e12,
        3e12,
        450e9,
        9.0,
    )


def test_the_way_to_the_host_is_the_slower_of_both_where_it_was_measured(tmp_path: Path) -> None:
    plan, here = plan_for(tmp_path), Hardware(8, 1 << 40, gpus=(Gpu("NVIDIA H100 80GB HBM3", 80 << 30, 9.0),))
    bare = Rates("NVIDIA H100 80GB HBM3", "2026-11-23", {"fp32": 50e12, "bf16": 700e12}, 3e12)
    table = gpu_type("h100-80gb")
    unknown = rates_for(plan, here, Machine((bare,)))
    assert unknown is not None and (unknown.host_link, unknown.host_bandwidth) == (
        table.host_link,
        table.host_bandwidth,
    )
    found = rates_for(plan, here, Machine((replace(bare, to_device=55e9, to_host=40e9), CPU)))
    assert found is not None and (found.host_link, found.host_bandwidth) == (40e9, CPU.bandwidth)


def test_measured_rates_have_shares_of_their_own(tmp_path: Path) -> None:
    """What is measured of a GPU is what products reach already, of a data sheet's figure no product ever
    does."""
    here = Hardware(8, 1 << 40, gpus=(Gpu("NVIDIA A100-SXM4-80GB", 80 << 30, 8.0),))
    own = Rates("NVIDIA A100-SXM4-80GB", "2026-11-26", {"fp32": 19e12, "bf16": 250e12}, 1.8e12)
    found, table = rates_for(plan_for(tmp_path), here, Machine((own,))), gpu_type("a100-80gb")
    assert found is not None
    assert found.half_rate * found.matrix_share == pytest.approx(
        table.half_rate * table.matrix_share, rel=0.05
    )
    assert found.bandwidth * found.memory_share == pytest.approx(
        table.bandwidth * table.memory_share, rel=0.05
    )
    assert found.link_share == table.link_share, "the table's link"
    linked = rates_for(plan_for(tmp_path), here, Machine((replace(own, link=200e9),)))
    assert linked is not None and linked.link * linked.link_share == 200e9


def test_a_forecast_of_speed_on_a_cpu_comes_with_its_rates(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, mesh__device="cpu", precision="fp32", batch__micro_batch_size=1)
    bare = forecast_of(plan, target_here(plan, HERE))
    assert bare is not None and bare.speed is None
    Machine((CPU,)).write()
    second = forecast_of(plan, target_here(plan, HERE))
    assert second is not None and second.speed is not None and second.speed.step > 0


def test_measured_beside_expected_for_people() -> None:
    measured = {
        "tokens_per_second": 900.0,
        "memory_bytes": 3e9,
        "phases": {"loading": 2e9, "evaluating": 3e9},
    }
    expected = {
        "tokens_per_second": 1000.0,
        "memory_bytes": 1e9,
        "phases": {"loading": 1e9, "evaluating": 1e9},
    }
    event = {"event": "compared", "measured": measured, "expected": expected}
    assert notice(event) == (
        "900 tokens/s measured, 1,000 planned; memory of a rank: its peak is 2.8 GiB of tensors, "
        "954 MiB planned while evaluating"
    )
    assert notice({**event, "expected": {}}) is None
