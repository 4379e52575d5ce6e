"""Plans as text: one with its decisions and the rejected alternatives, or several next to each other."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.cli.output import line_plot, print_table

if TYPE_CHECKING:
    from launcher.job.schema import Job
    from launcher.planner.comparison import PlanRow
    from launcher.planner.dataset.dataset_size import Items
    from launcher.planner.plan import Decision, Plan, Refused
    from launcher.values import Interval

SEARCHED = ("parallel.", "memory.", "cluster.nodes")
"""Prefixes of keys whose values were chosen among alternatives."""
_SHOWN = 5
"""The most rejected plans that are shown for each reason."""
_LAYOUTS = {
    "packed": "end to end without padding",
    "padded": "padded to the longest of a pass",
    "single": "one a pass",
}
_HEADER = ["gpu", "GPUs", "memory", "of", "fits", "step s", "tokens/s", "MFU", "hours", "cost", "plan"]


def model_shown(name: str) -> str:
    """Return a model's name on the hub or of its package, or its directory as people would type it."""
    from launcher.runs.wording import shown
    from launcher.training.demo.models import name_of

    return name_of(name) or shown(Path(name)) if Path(name).is_absolute() else name


def _length(plan: Plan, items: Items | None) -> str:
    """Return the length of training (in steps, if rows are known), and how often it saves and evaluates."""
    from launcher.planner.speed.duration import steps_of
    from launcher.runs.wording import duration, several

    def often(every: Interval) -> str:
        if every.unit == "seconds":
            return duration(every.value).removesuffix(" 0 s")
        return every.unit.removesuffix("s") if every.value == 1 else str(every)

    text = _plain_length(plan)
    if items is not None and plan.length.unit == "epochs" and (steps := steps_of(plan, items)) is not None:
        about = "" if len(items.lengths) == items.num_items and not items.packed else "about "
        size, kind = plan.batch.global_batch_size, "packs" if items.packed else "rows"
        text += f" = {about}{several(steps, 'step')} of {size} {kind}"
    if plan.script or plan.training.is_range_test:
        return text
    text += f"; saved every {often(plan.checkpoint.every)}"
    if plan.data.evaluation is not None:
        every = plan.evaluate_every
        text += f", measured every {often(every)}" if every else ", measured before and after"
    return text


def _plain_length(plan: Plan) -> str:
    unit = plan.length.unit.removesuffix("s") if plan.length.value == 1 else plan.length.unit
    return f"{plan.length.value:g} {unit}"


def summary(plan: Plan, length: str | None = None) -> str:
    """Return a summary of a plan, one fact per line. `length`: the length of training in more words."""
    mesh, batch = plan.mesh, plan.batch
    cut = f"{mesh.dp_replicate} x {mesh.dp_shard} (copies x shards)"
    ranks = f"{mesh.world_size} rank{'s' * (mesh.world_size > 1)} on {mesh.device}, {cut}"
    per_rank = f"{batch.micro_batch_size} x {batch.accumulation_steps}"
    sizes = f"{batch.global_batch_size} = {per_rank} x {batch.data_parallel_size}"
    facts = {
        "run": f"{plan.name}: {plan.task} with {model_shown(plan.model.name)}",
        "length": length or _plain_length(plan),
        "ranks": f"{ranks}, {mesh.threads_per_rank} thread{'s' * (mesh.threads_per_rank != 1)} each",
        "batch": f"{sizes} (micro-batch x accumulation x ranks)",
        "samples": f"{_LAYOUTS[plan.layout]}, {plan.attention} attention",
        "compute": f"{plan.precision}, activation checkpointing {plan.activation_checkpointing}",
    }
    if (adapter := plan.model.adapter) is not None:
        on = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        whole = f"; whole beside it: {', '.join(adapter.train_also)}" if adapter.train_also else ""
        facts["adapter"] = adapter.title + ("" if adapter.is_prompt else f", on {on}{whole}")
    if plan.data.evaluation is None:
        facts["measured"] = (
            "nothing: there are no held-out rows (data.evaluation); `launcher data split` makes some"
        )
    if plan.script:
        known = {"run": plan.name, "script": shlex.join(plan.script), "ranks": facts["ranks"]}
        facts = {
            **known,
            "engine": f"{plan.engine}, sharding {plan.sharding}, offload {plan.offload}, {plan.precision}",
        }
    return "\n".join(f"{name:9}{text}" for name, text in facts.items())


def table(plan: Plan, items: Items | None = None, whole: bool = False) -> str:
    """Return the plan for people: a summary, then each decision with its reason. `items`: the items of an
    epoch. `whole`: include decisions that had no alternative."""
    lines = [summary(plan, _length(plan, items))]
    listed = [each for each in plan.decisions if whole or _was_open(plan, each)]
    keys = max((len(decision.key) for decision in listed), default=0)
    values = max((len(str(decision.value)) for decision in listed), default=0)
    lines += ["", "Decided here, because the job leaves it open:"] if listed else []
    lines += [f"  {each.key:{keys}}  {each.value!s:{values}}  {each.reason}" for each in listed]
    if left := len(plan.decisions) - len(listed):
        lines.append(f"  and {left} without a choice on {_devices(plan)}, which --all shows")
    return "\n".join(lines + not_taken(plan))


def _devices(plan: Plan) -> str:
    ranks, device = plan.mesh.world_size, "CPU" if plan.mesh.device == "cpu" else "GPU"
    return f"one {device} rank" if ranks == 1 else f"{device} ranks"


def _was_open(plan: Plan, decision: Decision) -> bool:
    """Return whether a decision had an alternative on the plan's devices."""
    from launcher.planner.resolve.mesh import BY_NPROC

    on_cpu = plan.mesh.device == "cpu"
    settled = {"cluster.gpus_per_node", "memory.offload"} if on_cpu else set()
    if plan.mesh.world_size == 1:
        settled |= {"cluster.threads_per_rank", "parallel.shard"} | ({"parallel.engine"} if on_cpu else set())
    return decision.key not in settled and decision.reason != BY_NPROC


def not_taken(plan: Plan) -> list[str]:
    """Return the rejected alternatives, grouped by the kind of reason; of each group the first few."""
    lines = ["", "Looked at and not taken:"] if plan.refused else []
    for why in dict.fromkeys(refused.why for refused in plan.refused):
        alike = [refused for refused in plan.refused if refused.why == why]
        for number, refused in enumerate(alike[:_SHOWN]):
            lines.append(f"  {why if number == 0 else '':13} {refused.what}: {refused.reason}")
        lines += (
            [f"  {'':13} and {len(alike) - _SHOWN} more, which --json lists"] if len(alike) > _SHOWN else []
        )
    return lines


def explained(plan: Plan, key: str, job: Job | None = None) -> str:
    """Return why a key of the plan, or of its job, has its value.

    Raises ConfigurationError with the nearest keys if neither has the key.
    """
    decision = decision_of(plan, key, job)
    lines = [f"{decision.key} = {decision.value}: {decision.reason}"]
    return "\n".join(lines + (not_taken(plan) if key.startswith(SEARCHED) else []))


def decision_of(plan: Plan, key: str, job: Job | None = None) -> Decision:
    """Return the decision about a key; if the plan did not decide it, the job's value or its default.
    Raises ConfigurationError as `explained` does."""
    import difflib

    from launcher.errors import ConfigurationError, Problem
    from launcher.job.describe import value_of
    from launcher.planner.plan import Decision

    decisions = {decision.key: decision for decision in plan.decisions}
    if key not in decisions and job is not None and (settled := value_of(job, key)) is not None:
        value, reason = (
            settled[0],
            "the job sets it" if settled[1] else "the default, as the job does not set it",
        )
        plain = value if isinstance(value, (str, int, float, bool)) else str(value)
        return Decision(key=key, value=plain, reason=reason)
    if key not in decisions:
        near = difflib.get_close_matches(key, decisions, 3, 0.3) or list(decisions)[:3]
        reason = f"there is no such key; try {', '.join(near)}"
        raise ConfigurationError(Problem("--explain", key, reason))
    return decisions[key]


def print_rows(rows: Sequence[PlanRow], fewest: bool, left_out: Sequence[Refused] | None) -> None:
    """Print plans next to each other.

    fewest: each plan uses the fewest GPUs, and says why. left_out: the numbers of GPUs that are not possible.
    """
    print_table(_HEADER, [cells(row) for row in rows])
    if fewest:
        for row in rows:
            typer.echo(f"\n{row.gpu}: {row.why_not or explained(row.plan, 'cluster.nodes')}")
    if left_out:
        typer.echo("\n".join(["", "Left out:", *(f"  {each.what}: {each.reason}" for each in left_out)]))
    if left_out is not None:
        typer.echo(scaling_plots(rows))


def cells(row: PlanRow) -> list[str]:
    """Return a plan as a row of the table."""
    from launcher.runs.wording import gib

    plan, forecast = row.plan, row.forecast
    passes = f"{plan.batch.micro_batch_size} x {plan.batch.accumulation_steps}"
    words = f"{plan.engine} {plan.sharding}, {passes}, recompute {plan.activation_checkpointing}"
    words += f", {plan.offload} offloaded" if plan.offload != "none" else ""
    memory, rates = ["?"] * 3, ["?"] * 3
    if forecast is not None:
        fits = "yes" if forecast.fits and row.why_not is None else "no"
        memory = [gib(forecast.footprint.highest.total), gib(forecast.target.memory_bytes), fits]
        if speed := forecast.speed:
            rates = [f"{speed.step:.2f}", f"{speed.tokens_per_second:,.0f}", f"{speed.utilisation:.0%}"]
    hours = "?" if row.hours is None else f"{row.hours:.2f}"
    cost = "?" if row.cost is None else f"{row.cost:,.0f}"
    return [row.gpu, str(plan.mesh.world_size), *memory, *rates, hours, cost, words]


def scaling_plots(rows: Sequence[PlanRow]) -> str:
    """Return plots of speed and memory over the number of GPUs; empty if a line would have only one point."""
    known = [(float(row.plan.mesh.world_size), row.forecast) for row in rows if row.forecast is not None]
    speeds = [(ranks, forecast.speed.tokens_per_second) for ranks, forecast in known if forecast.speed]
    memory = [(ranks, forecast.footprint.highest.total / 2**30) for ranks, forecast in known]
    width = min(shutil.get_terminal_size().columns, 90)
    drawn = [(speeds, "tokens/s over GPUs"), (memory, "GiB of a GPU over GPUs")]
    plots = [
        line_plot(points, width, 13, logarithmic=True, ylabel=name)
        for points, name in drawn
        if len(points) > 1
    ]
    return "\n".join(plots)
