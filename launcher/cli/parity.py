"""launcher parity: check that the engines agree on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.job import JobFile, Overrides
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.launch.parity import Outcome


def parity(
    job: JobFile,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Ranks of every case but the first.")] = 2,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of each case.")] = 20,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train a few steps under every engine and compare losses and gradient norms."""
    from launcher.job.load import load
    from launcher.launch.parity import TOLERANCE, outcomes
    from launcher.launch.screen import Watcher
    from launcher.planner.search import plan_job

    tolerance = TOLERANCE[plan_job(load(job, overrides), nproc).precision]
    results: list[Outcome] = []
    for outcome in outcomes(job, nproc, steps, overrides, Watcher()):
        results.append(outcome)
        typer.echo(f"{outcome.name}: {outcome.problem or f'{len(outcome.losses)} steps'}", err=True)
    reference = results[0]
    rows = [_row(outcome, reference, tolerance) for outcome in results]
    if as_json:
        print_json({"tolerance": tolerance, "cases": rows})
    else:
        shown = [
            [
                str(row["case"]),
                _number(row["loss_off_by"]),
                _number(row["grad_norm_off_by"]),
                str(row["verdict"]),
            ]
            for row in rows
        ]
        print_table(["case", "loss off by", "gradient norm off by", "verdict"], shown)
    if any(row["verdict"] == "differs" for row in rows):
        raise typer.Exit(1)


def _row(outcome: Outcome, reference: Outcome, tolerance: float) -> dict[str, object]:
    if outcome.problem or reference.problem:
        reason = outcome.problem or "nothing to compare with"
        return {
            "case": outcome.name,
            "loss_off_by": None,
            "grad_norm_off_by": None,
            "verdict": f"not run: {reason}",
        }
    loss, norm = outcome.off_by(reference)
    verdict = "agrees" if max(loss, norm) <= tolerance else "differs"
    row = {"case": outcome.name, "loss_off_by": loss, "grad_norm_off_by": norm, "verdict": verdict}
    return row | {"losses": outcome.losses, "grad_norms": outcome.gradient_norms}


def _number(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else ""
