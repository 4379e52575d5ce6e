"""launcher plan: what will run, and why."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.job import JobFile, Overrides

if TYPE_CHECKING:
    from launcher.planning.forecast import Trace
    from launcher.planning.outlook import Row
    from launcher.planning.plan import Plan

NumRanks = Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks on this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


_MOST = 1024
"""GPUs that are looked at where the command does not say."""
_SHOWN = 5
"""Plans of a kind that are shown of those that were not taken."""
_SEARCHED = ("parallel.", "memory.", "cluster.nodes")
"""How keys begin whose values were chosen beside others."""

Deadline = Annotated[str | None, typer.Option("--deadline", metavar="TIME", help="The fewest GPUs that end in time, as 24h.")]
MostGpus = Annotated[int | None, typer.Option("--max-gpus", min=1, help="The fewest GPUs that fit, at most so many (1024).")]
Prices = Annotated[
    list[str], typer.Option("--price", metavar="NAME=AMOUNT", help="Of one GPU and hour, as h100-80gb=2.5; may be repeated.")
]
Explain = Annotated[str | None, typer.Option("--explain", metavar="KEY", help="Say why a key has the value it has.")]
GpuName = Annotated[
    str | None, typer.Option("--gpu", metavar="NAMES", help="Plan for GPUs that are not here, as h100-80gb; several with commas.")
]
Network = Annotated[str | None, typer.Option("--network", metavar="NAME", help="What joins the nodes, as ib400 or ethernet100.")]
Scale = Annotated[str | None, typer.Option("--scale", metavar="FROM..TO", help="How memory and speed change with the number of GPUs.")]
Traced = Annotated[bool, typer.Option("--trace", help="Go by the model's real class (imports torch), and compare with the formulas.")]
Picture = Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Write the memory by phase as an SVG.")]


def plan(
    job: JobFile,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
    gpu: GpuName = None,
    network: Network = None,
    scale: Scale = None,
    deadline: Deadline = None,
    max_gpus: MostGpus = None,
    price: Prices = [],  # noqa: B006
    explain: Explain = None,
    picture: Picture = None,
    trace: Traced = False,
) -> None:
    """Show what will run: every decision with its reason."""
    from launcher.cli.output import print_json
    from launcher.job.load import load
    from launcher.planning import outlook

    wanted = load(job, overrides)
    sought = deadline is not None or max_gpus is not None
    if sought or scale is not None or (gpu is not None and ("," in gpu or price)):
        _alone(trace)
        if sought and scale is not None:
            _one_question(scale)
        if sought:
            rows = outlook.in_time(wanted, deadline, max_gpus or _MOST, gpu, network)
        elif scale is not None:
            rows = outlook.scaled(wanted, scale, gpu, network)
        else:
            rows = outlook.compare(wanted, gpu or "", network)
        rows = outlook.priced(rows, price)
        if as_json:
            print_json({"plans": [row.to_dict() for row in rows]})
        else:
            _compared(rows)
            typer.echo("\n".join(_why_so_many(rows)) if sought else "", nl=sought)
            if scale is not None:
                typer.echo(scaling_plots(rows))
        return
    seen = outlook.look(wanted, nproc, gpu, network, tracing() if trace else None)
    if explain is not None:
        typer.echo(explained(seen.plan, explain))
        return
    made = seen.traced or seen.forecast
    if picture is not None and made is not None:
        from launcher.cli.forecast import picture as drawn

        picture.write_text(drawn(made), encoding="utf-8")
    if as_json:
        forecasts = {"forecast": seen.forecast, "traced": seen.traced} if trace else {"forecast": seen.forecast}
        content = {name: one.to_dict() if one else None for name, one in forecasts.items()}
        print_json(json.loads(seen.plan.to_json()) | content | {"no_forecast": seen.why_not})
        return
    typer.echo(table(seen.plan))
    if made is None:
        typer.echo(f"\nNo forecast of memory: {seen.why_not}. `launcher plan --trace` goes by the model's own class.")
        return
    from launcher.cli.forecast import advice, bars, compared, speed_lines

    parts = [bars(made), compared(made, seen.forecast, seen.why_not) if trace else "", speed_lines(made), advice(made)]
    typer.echo("\n".join(filter(None, parts)))


def _one_question(scale: str) -> None:
    """Raises ConfigurationError, as it was asked for the fewest GPUs and for every number of them."""
    from launcher.errors import ConfigurationError, Problem

    reason = "shows every number of GPUs, and --deadline and --max-gpus look for the fewest; leave one of them out"
    raise ConfigurationError(Problem("--scale", scale, reason))


def _alone(trace: bool) -> None:
    """Raises ConfigurationError for a trace of several plans at once."""
    from launcher.errors import ConfigurationError, Problem

    if trace:
        reason = "traces one plan; leave out --scale, --deadline, --price and all but one GPU, or leave out --trace"
        raise ConfigurationError(Problem("--trace", None, reason))


def tracing() -> Trace:
    """The trainer's side of a trace; importing it takes seconds, which a line on a terminal explains."""
    import gc

    from rich.console import Console

    gc.disable()  # a fifth of the import's time
    with Console(stderr=True).status("importing the model's class ..."):
        from launcher.training.tracing.plan import trace
    gc.freeze()
    gc.enable()
    return trace


def explained(plan: Plan, key: str) -> str:
    """Why a key of the plan has its value. Raises ConfigurationError with the nearest keys for one that was not decided here."""
    import difflib

    from launcher.errors import ConfigurationError, Problem

    found = next((decision for decision in plan.decisions if decision.key == key), None)
    if found is None:
        keys = [decision.key for decision in plan.decisions]
        near = difflib.get_close_matches(key, keys, 3, 0.3) or keys[:3]
        raise ConfigurationError(
            Problem("--explain", key, f"was not decided here (the job sets it, or there is no such key); try {', '.join(near)}")
        )
    lines = [f"{found.key} = {found.value}: {found.reason}"]
    return "\n".join(lines + (not_taken(plan) if key.startswith(_SEARCHED) else []))


def _compared(rows: list[Row]) -> None:
    from launcher.cli.output import print_table

    header = ["gpu", "GPUs", "memory", "of", "fits", "step s", "tokens/s", "MFU", "hours", "cost", "plan"]
    print_table(header, [row.cells() for row in rows])


def _why_so_many(rows: list[Row]) -> list[str]:
    """Of each kind of GPU why it is that number of them."""
    lines = []
    for row in rows:
        lines += ["", f"{row.gpu}: {explained(row.plan, 'cluster.nodes')}"]
    return lines


def scaling_plots(rows: list[Row]) -> str:
    """Speed and memory over the number of GPUs, one above the other; empty where there is nothing to join by a line."""
    import shutil

    from launcher.cli.output import line_plot

    known = [(row.plan.mesh.world_size, row.forecast) for row in rows if row.forecast is not None]
    speeds = [(float(ranks), made.speed.tokens_per_second) for ranks, made in known if made.speed]
    memory = [(float(ranks), made.footprint.highest.total / 2**30) for ranks, made in known]
    width = min(shutil.get_terminal_size().columns, 90)
    drawn = [(speeds, "tokens/s over GPUs"), (memory, "GiB of a GPU over GPUs")]
    return "\n".join(line_plot(points, width, 13, logarithmic=True, ylabel=name) for points, name in drawn if len(points) > 1)


def table(plan: Plan) -> str:
    """The plan for people: what it comes to, then each decision with its reason."""
    mesh, batch = plan.mesh, plan.batch
    ranks = f"{mesh.world_size} rank{'s' * (mesh.world_size > 1)} on {mesh.device}, {mesh.replicate} x {mesh.shard} (copies x shards)"
    cut = f"{batch.global_batch_size} = {batch.micro_batch_size} x {batch.accumulation_steps} x {batch.data_parallel_size}"
    facts = {
        "run": f"{plan.name}: {plan.task} with {plan.model.name}",
        "length": f"{plan.length.value:g} {plan.length.unit}",
        "ranks": f"{ranks}, {mesh.threads_per_rank} threads each",
        "batch": f"{cut} (micro-batch x accumulation x ranks)",
        "compute": f"{plan.precision}, {plan.attention} attention, activation checkpointing {plan.activation_checkpointing}",
    }
    if plan.script:
        known = {"run": plan.name, "script": shlex.join(plan.script), "ranks": facts["ranks"]}
        facts = {**known, "engine": f"{plan.engine}, sharding {plan.sharding}, offload {plan.offload}, {plan.precision}"}
    lines = [f"{name:9}{text}" for name, text in facts.items()]
    keys = max((len(decision.key) for decision in plan.decisions), default=0)
    values = max((len(str(decision.value)) for decision in plan.decisions), default=0)
    lines += ["", "Decided here, because the job leaves it open:"] if plan.decisions else []
    lines += [f"  {d.key:{keys}}  {d.value!s:{values}}  {d.reason}" for d in plan.decisions]
    return "\n".join(lines + not_taken(plan))


def not_taken(plan: Plan) -> list[str]:
    """What was looked at beside, by why it was not taken; of each kind the first few."""
    lines = ["", "Looked at and not taken:"] if plan.refused else []
    for why in dict.fromkeys(refused.why for refused in plan.refused):
        alike = [refused for refused in plan.refused if refused.why == why]
        lines += [f"  {why if number == 0 else '':13} {one.what}: {one.reason}" for number, one in enumerate(alike[:_SHOWN])]
        lines += [f"  {'':13} and {len(alike) - _SHOWN} more, which --json lists"] if len(alike) > _SHOWN else []
    return lines
