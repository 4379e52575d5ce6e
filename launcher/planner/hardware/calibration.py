"""Choose the rates for a plan's time forecast: this machine's measurements, else the GPU table."""

from __future__ import annotations

from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import HOST_BANDWIDTH, LINK_SHARE, PCIE_4, GpuType, seen
from launcher.planner.memory.decoders import Llama
from launcher.planner.memory.program import Batch, Setting
from launcher.planner.plan import Plan
from launcher.runs.machine import REFERENCE, REFERENCE_LENGTH, Machine, Rates

MEASURED = "measured"
"""Key of the rates measured by `launcher bench`."""
_MATRIX_SHARE, _MEMORY_SHARE = 0.85, 0.9
"""Shares of a GPU's rates in `launcher bench` that training reaches: its shares of the data sheet's rates
(0.6 and 0.8) over those of large products and copies, 70% and 90%. Assumed: no GPU was available."""
_CPU_MATRIX_SHARE, _CPU_MEMORY_SHARE, _CALLING, _WAITING = 0.95, 0.35, 1.8, 1.5
"""Factors on a CPU's rates in `launcher bench`: a layer's products reach nearly the full rate, operators a
third of a large copy's. Calls are slower if ranks do more between them, and ranks that communicate wait for
each other. Fitted to 171 plans of six jobs on two ranks (seed 7 of tests/benchmarks/bench_auto.py);
docs/benchmarks/auto.md is of another seed."""


def device_of(plan: Plan, hardware: Hardware) -> str:
    """Return the name under which the device's rates are stored."""
    return hardware.gpus[0].name if plan.mesh.device == "cuda" and hardware.gpus else "cpu"


def rates_for(plan: Plan, hardware: Hardware, machine: Machine | None = None) -> GpuType | None:
    """Return the rates of one rank of a plan on this machine: measured, else from the table of GPUs; None if
    neither has them."""
    known = (machine or Machine.read()).of(device_of(plan, hardware))
    table = seen(hardware) if plan.mesh.device == "cuda" else None
    if known is None or not known.matrix.get("fp32"):
        return table
    # Ranks on a CPU share its rates.
    share = plan.mesh.ranks_per_node if plan.mesh.device == "cpu" else 1
    link = known.link or (table.link if table else known.bandwidth / share)
    full = known.matrix["fp32"] / share
    ways = [rate for rate in (known.to_device, known.to_host) if rate]
    host = (machine or Machine.read()).of("cpu")
    return GpuType(
        key=MEASURED,
        name=known.device,
        memory_bytes=hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node),
        half_rate=known.matrix.get("fp16" if plan.precision == "fp16" else "bf16", known.matrix["fp32"])
        / share,
        full_rate=full,
        bandwidth=known.bandwidth / share,
        link=link,
        network=table.network if table else link,
        capability=table.capability if table else 0.0,
        source=f"launcher bench{' --quick' * known.quick}, {known.when}",
        **_shares(plan, known.link is not None),
        operator_seconds=operator_seconds(known),
        message_seconds=known.message and known.message * (_WAITING if plan.mesh.device == "cpu" else 1.0),
        host_link=min(ways) if ways else table.host_link if table else PCIE_4,
        host_bandwidth=host.bandwidth if host else HOST_BANDWIDTH,
    )


def _shares(plan: Plan, link_known: bool) -> dict[str, float]:
    """Return the shares of measured rates that a step reaches."""
    if plan.mesh.device == "cpu":
        return {
            "matrix_share": _CPU_MATRIX_SHARE,
            "memory_share": _CPU_MEMORY_SHARE,
            "link_share": LINK_SHARE / _WAITING,
        }
    return {
        "matrix_share": _MATRIX_SHARE,
        "memory_share": _MEMORY_SHARE,
        **({"link_share": 1.0} if link_known else {}),
    }


def operator_seconds(rates: Rates) -> dict[str, float]:
    """Return the seconds to call one operator: the reference model's step time, divided by the operators that
    the memory model counts in it."""
    program = Llama(REFERENCE)
    by_way = {}
    for way, seconds in rates.reference.items():
        setting = Setting(Batch((REFERENCE_LENGTH,)), 4, way, rates.device != "cpu")
        calling = _CALLING if rates.device == "cpu" else 1.0
        by_way[way] = calling * seconds / sum(segment.num_made for segment in program.blocks(setting))
    return by_way
