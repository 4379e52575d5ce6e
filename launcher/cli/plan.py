"""launcher plan: what will run, and why."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.job import JobFile, Overrides

if TYPE_CHECKING:
    from launcher.planning.plan import Plan

NumRanks = Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks on this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def plan(job: JobFile, nproc: NumRanks = None, as_json: AsJson = False, overrides: Overrides = []) -> None:  # noqa: B006
    """Show what will run: every decision with its reason."""
    from launcher.job.load import load
    from launcher.planning.decide import plan as decide

    decided = decide(load(job, overrides), nproc)
    typer.echo(decided.to_json() if as_json else table(decided), nl=not as_json)


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
    return "\n".join(lines)
