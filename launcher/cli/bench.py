"""launcher bench: measure what this machine can do."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.planner.plan import Plan
    from launcher.runs.machine import Rates
    from launcher.training.bench import Bench

Ranks = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Ranks that send each other messages. [default: one a GPU, or 2]"),
]
Disk = Annotated[
    Path,
    typer.Option("--disk", metavar="DIR", help="Where files are written and read, as where runs are kept."),
]
_TRIES = 3
"""Of measuring what a message costs, where other work on the machine hides it."""
_WAYS = {"lean": "memory given back", "roomy": "memory kept"}


def bench(nproc: Ranks = None, disk: Disk = Path(), as_json: AsJson = False) -> None:
    """Measure this machine, so that plans count with its own figures."""
    from launcher.planner.hardware.detect import find_gpus
    from launcher.runs.machine import Machine, path
    from launcher.training.bench import bench as measure

    ranks = nproc or len(find_gpus()[0]) or 2
    figures = measure(ranks, disk.absolute(), lambda what: typer.echo(f"measuring {what} ...", err=True))
    Machine.read().with_rates(figures.rates).write()
    if figures.rates.device == "cpu" and ranks > 1:
        figures = replace(figures, rates=replace(figures.rates, engines=_engines(figures.rates)))
        # Runs may have written theirs meanwhile.
        Machine.read().with_rates(figures.rates).write()
    if as_json:
        print_json({**asdict(figures.rates), "messages": [asdict(message) for message in figures.messages]})
        return
    print_table(["what", "rate"], _rows(figures))
    typer.echo(f"kept in {path()}; `launcher plan` counts with it", err=True)


def _engines(rates: Rates) -> dict[str, dict[str, tuple[float, float]]]:
    """Return what each engine that is here takes for a message and for a byte, by what ranks do with the
    memory that they free."""
    from launcher.launch.malloc_env import LEAN, ROOMY

    here = ("fsdp", "deepspeed") if find_spec("deepspeed") else ("fsdp",)
    ways = {"lean": LEAN, "roomy": ROOMY}
    return {
        way: {name: costs for engine in here for name, costs in _costs(engine, way, ways[way], rates).items()}
        for way in ways
    }


def _costs(engine: str, way: str, allocator: dict[str, str], rates: Rates) -> dict[str, tuple[float, float]]:
    from launcher.planner.speed import comm_benchmark
    from launcher.render.deepspeed import config
    from launcher.training.bench_engines import extra_seconds

    typer.echo(f"measuring steps of {engine}, {_WAYS[way]} ...", err=True)
    plans = comm_benchmark.plans(rates.num_ranks, engine)
    steps = {
        name: tuple((plan, config(plan) if plan.zero else {}) for plan in both)
        for name, both in plans.items()
    }
    costs: dict[str, tuple[float, float]] = {}
    for _ in range(_TRIES):
        left = {name: both for name, both in steps.items() if name not in costs}
        taken = extra_seconds(
            engine, left, rates.num_ranks, allocator, lambda line: typer.echo(line, err=True)
        )
        for name, (small, large) in taken.items():
            if (learnt := _learnt(plans[name], (small, large), rates)) is not None:
                costs[name] = learnt
        if not taken or len(costs) == len(steps):
            return costs
    missed = ", ".join(name for name in steps if name not in costs)
    typer.echo(
        f"what a byte costs was less than what other work here took: {missed}; measure again on a "
        "quiet machine",
        err=True,
    )
    return costs


def _learnt(
    both: tuple[Plan, Plan], seconds: tuple[float, float], rates: Rates
) -> tuple[float, float] | None:
    from launcher.planner.hardware.calibration import rates_for
    from launcher.planner.hardware.detect import Hardware
    from launcher.planner.speed import comm_benchmark
    from launcher.runs.machine import Machine

    known = rates_for(both[0], Hardware(rates.num_ranks, 1 << 40), Machine((rates,)))
    assert known is not None  # of a CPU whose products were measured
    return comm_benchmark.costs(both, seconds, known)


def _rows(figures: Bench) -> list[list[str]]:
    rates = figures.rates
    rows = [
        [f"matrix products, {precision}, {rates.device}", f"{rate / 1e9:,.1f} GFLOP/s"]
        for precision, rate in rates.matrix.items()
    ]
    rows.append(["memory, read and written", _bytes(rates.bandwidth)])
    for message in figures.messages:
        rows.append(
            [
                f"{message.kind} of {message.num_bytes >> 10:,} KiB, {rates.num_ranks} ranks",
                _bytes(message.bytes_per_second),
            ]
        )
    rows += [
        [f"calling operators, step of a tiny model, recomputing {way}", f"{1e3 * s:.1f} ms"]
        for way, s in rates.reference.items()
    ]
    if rates.message is not None:
        rows.append(
            [f"FSDP, each message beside its bytes, {rates.num_ranks} ranks", f"{1e3 * rates.message:.2f} ms"]
        )
    for way, kinds in rates.engines.items():
        for name, (each, per_byte) in kinds.items():
            what = f"a message, and 1 MiB received: {name}, {rates.num_ranks} ranks, {_WAYS[way]}"
            rows.append([what, f"{1e3 * each:.2f} ms, {1e3 * 2**20 * per_byte:.2f} ms"])
    named = {
        "to the GPU": rates.to_device,
        "from the GPU": rates.to_host,
        "disk, written": rates.disk_write,
        "disk, read": rates.disk_read,
    }
    return rows + [[name, _bytes(rate)] for name, rate in named.items() if rate is not None]


def _bytes(rate: float) -> str:
    return f"{rate / 1e9:,.2f} GB/s"
