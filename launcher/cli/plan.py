"""launcher plan: show what will run, and why."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.job import JobFile, Overrides

if TYPE_CHECKING:
    from launcher.job.schema import Job
    from launcher.planning.forecast import Trace
    from launcher.planning.outlook import Outlook
    from launcher.planning.plan import Decision, Plan, Refused
    from launcher.planning.rows import Row

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
    from launcher.job.load import load
    from launcher.planning.outlook import look
    from launcher.planning.rows import priced

    wanted = load(job, overrides)
    sought = (deadline, max_gpus or _MOST) if deadline is not None or max_gpus is not None else None
    if sought or scale is not None or price or (gpu is not None and "," in gpu):
        drawn = None if picture is None else str(picture)
        _refuse_of_one_plan({"--nproc": nproc, "--explain": explain, "--picture": drawn}, trace)
        rows, left_out = _several(wanted, gpu, network, scale, sought)
        _show(priced(rows, price), left_out, sought is not None, as_json)
        return
    seen = look(wanted, nproc, gpu, network, tracing() if trace else None)
    if picture is not None:
        _draw(picture, seen)
    if explain is not None:
        _explain(seen.plan, explain, as_json)
    elif as_json:
        _print_as_json(seen, trace)
    else:
        _print(seen, trace)


def _several(
    job: Job, gpu: str | None, network: str | None, scale: str | None, sought: tuple[str | None, int] | None
) -> tuple[list[Row], list[Refused] | None]:
    """Plans beside each other, and the numbers of a scale that are left out; `sought` are a deadline and the most GPUs."""
    from launcher.planning import fewest_gpus, outlook

    if sought is not None and scale is not None:
        _one_question(scale)
    if sought is not None:
        return fewest_gpus.in_time(job, *sought, gpu, network), None
    if scale is None:
        return outlook.compare(job, gpu, network), None
    left_out: list[Refused] = []
    return outlook.scaled(job, scale, gpu, network, left_out), left_out


def _show(rows: list[Row], left_out: list[Refused] | None, sought: bool, as_json: bool) -> None:
    from launcher.cli.comparing import show
    from launcher.cli.output import print_json

    if not as_json:
        show(rows, sought, left_out)
        return
    beside = {} if left_out is None else {"left_out": [one.model_dump(mode="json") for one in left_out]}
    print_json({"plans": [row.to_dict() for row in rows]} | beside)


def _print(seen: Outlook, trace: bool) -> None:
    from launcher.cli.forecast import advice, bars, compared, speed_lines

    made = seen.traced or seen.forecast
    typer.echo(table(seen.plan))
    if made is None:
        typer.echo(f"\nNo forecast of memory: {seen.why_not}. `launcher plan --trace` goes by the model's own class.")
        return
    traced = compared(made, seen.forecast, seen.why_not) if trace else ""
    typer.echo("\n".join(filter(None, [bars(made), traced, speed_lines(made), advice(made, seen.per_node)])))


def _print_as_json(seen: Outlook, trace: bool) -> None:
    from launcher.cli.output import print_json
    from launcher.planning.epochs import why_no_items

    forecasts = {"forecast": seen.forecast, "traced": seen.traced} if trace else {"forecast": seen.forecast}
    content = {name: one.to_dict() if one else None for name, one in forecasts.items()}
    print_json(json.loads(seen.plan.to_json()) | content | {"no_forecast": seen.why_not, "no_epoch": why_no_items(seen.plan)})


def _draw(file: Path, seen: Outlook) -> None:
    """Raises ConfigurationError where there is no forecast to draw."""
    from launcher.cli.forecast import picture
    from launcher.errors import ConfigurationError, Problem

    made = seen.traced or seen.forecast
    if made is None:
        reason = f"there is no forecast to draw, as {seen.why_not}; `launcher plan --trace` goes by the model's own class"
        raise ConfigurationError(Problem("--picture", str(file), reason))
    file.write_text(picture(made), encoding="utf-8")


def _one_question(scale: str) -> None:
    """Raises ConfigurationError, as it was asked for the fewest GPUs and for every number of them."""
    from launcher.errors import ConfigurationError, Problem

    reason = "shows every number of GPUs, and --deadline and --max-gpus look for the fewest; leave one of them out"
    raise ConfigurationError(Problem("--scale", scale, reason))


def _refuse_of_one_plan(options: dict[str, int | str | None], trace: bool) -> None:
    """Raises ConfigurationError for options that are of one plan, where several are asked for."""
    from launcher.errors import ConfigurationError, Problem

    reason = "is of one plan; leave out --scale, --deadline, --max-gpus, --price and all but one GPU, or leave it out"
    found = [Problem(key, value, reason) for key, value in options.items() if value is not None]
    found += [Problem("--trace", None, reason)] if trace else []
    if found:
        raise ConfigurationError(found)


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


def _explain(plan: Plan, key: str, as_json: bool) -> None:
    from launcher.cli.output import print_json

    if not as_json:
        typer.echo(explained(plan, key))
        return
    refused = plan.refused if key.startswith(_SEARCHED) else ()
    print_json(_decision(plan, key).model_dump(mode="json") | {"refused": [one.model_dump(mode="json") for one in refused]})


def explained(plan: Plan, key: str) -> str:
    """Why a key of the plan has its value. Raises ConfigurationError with the nearest keys for one that was not decided here."""
    found = _decision(plan, key)
    lines = [f"{found.key} = {found.value}: {found.reason}"]
    return "\n".join(lines + (not_taken(plan) if key.startswith(_SEARCHED) else []))


def _decision(plan: Plan, key: str) -> Decision:
    import difflib

    from launcher.errors import ConfigurationError, Problem

    found = next((decision for decision in plan.decisions if decision.key == key), None)
    if found is None:
        keys = [decision.key for decision in plan.decisions]
        near = difflib.get_close_matches(key, keys, 3, 0.3) or keys[:3]
        reason = f"was not decided here (the job sets it, or there is no such key); try {', '.join(near)}"
        raise ConfigurationError(Problem("--explain", key, reason))
    return found


_LAYOUTS = {"packed": "end to end without padding", "padded": "padded to the longest of a pass", "single": "one a pass"}


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
        "samples": f"{_LAYOUTS[plan.layout]}, {plan.attention} attention",
        "compute": f"{plan.precision}, activation checkpointing {plan.activation_checkpointing}",
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
