"""launcher checkpoint: list, inspect, verify, diff, prune, average, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.checkpoint_import import import_
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson
from launcher.cli.run import Run

if TYPE_CHECKING:
    from launcher.runs.checkpoints import Stored
    from launcher.runs.layout import RunDirectory

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Step = Annotated[
    int | None, typer.Option("--checkpoint", metavar="STEP", help="The step; the newest by default.")
]


def _find(run: str) -> RunDirectory:
    from launcher.runs.layout import RunDirectory

    return RunDirectory.find(run)


def _pick(run: RunDirectory, step: int | None) -> Stored:
    from launcher.errors import CheckpointError
    from launcher.runs.checkpoints import list_checkpoints

    listed = list_checkpoints(run)
    for stored in reversed(listed):
        if step is None or stored.step == step:
            return stored
    if not listed:
        raise CheckpointError(f"{run.path.name} has no checkpoint yet")
    raise CheckpointError(
        f"there is no checkpoint of step {step}; there is {', '.join(str(stored.step) for stored in listed)}"
    )


def _readable(stored: Stored) -> Path:
    """Return the directory of a checkpoint whose manifest and files look valid; its data is not read."""
    from launcher.errors import CheckpointError

    if stored.problems:
        raise CheckpointError(f"{stored.name}: {'; '.join(stored.problems)}")
    return stored.directory


def _summary(stored: Stored) -> dict[str, Any]:
    manifest = stored.manifest
    known = {} if manifest is None else manifest.model_dump(mode="json", exclude={"files", "format", "step"})
    num_bytes = 0 if manifest is None else manifest.total_bytes
    return {
        "step": stored.step,
        "path": str(stored.directory),
        "bytes": num_bytes,
        "problems": list(stored.problems),
        **known,
    }


@app.command("list")
def list_(run: Run, as_json: AsJson = False) -> None:
    """Show a run's checkpoints, without reading their data."""
    import datetime

    from launcher.runs.checkpoints import list_checkpoints
    from launcher.runs.wording import size

    listed = list_checkpoints(_find(run))
    if as_json:
        return print_json({"checkpoints": [_summary(stored) for stored in listed]})
    if not listed:
        typer.echo("no checkpoints yet")
        return None
    rows = []
    for stored in listed:
        manifest = stored.manifest
        if manifest is None:
            rows.append([str(stored.step), "", "", "", "", "; ".join(stored.problems)])
            continue
        created = datetime.datetime.fromtimestamp(manifest.created).isoformat(sep=" ", timespec="seconds")
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())
        rows.append(
            [
                str(stored.step),
                created,
                size(manifest.total_bytes),
                str(manifest.world_size),
                metrics,
                "; ".join(stored.problems),
            ]
        )
    return print_table(["step", "saved", "size", "ranks", "metrics", "problems"], rows)


@app.command()
def inspect(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Show what one checkpoint holds: its tensors, and where training was."""
    from dataclasses import asdict

    from launcher.runs.wording import size
    from launcher.training.checkpoint.inspect import describe_tensors

    stored = _pick(_find(run), step)
    tensors = describe_tensors(_readable(stored))
    if as_json:
        return print_json({**_summary(stored), "tensors": [asdict(tensor) for tensor in tensors]})
    manifest = stored.manifest
    assert manifest is not None
    typer.echo(
        f"step {stored.step}, written by {manifest.world_size} ranks of {manifest.engine} "
        f"(replicate {manifest.mesh.get('replicate', 1)}, shard {manifest.mesh.get('shard', 1)}), "
        f"{size(manifest.total_bytes)}"
    )
    typer.echo(f"{manifest.progress.samples:,} samples and {manifest.progress.tokens:,} tokens consumed")
    rows = [
        [t.name, " x ".join(map(str, t.shape)) or "scalar", t.dtype, size(t.num_bytes), str(t.num_pieces)]
        for t in tensors
    ]
    return print_table(["tensor", "shape", "dtype", "size", "pieces"], rows)


@app.command()
def verify(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Read and hash every byte of all checkpoints, or of one; leave with 6 where one is not whole."""
    from launcher.errors import CheckpointError
    from launcher.runs.checkpoints import list_checkpoints, verify

    directory = _find(run)
    chosen = list_checkpoints(directory) if step is None else [_pick(directory, step)]
    if not chosen:
        raise CheckpointError(f"{directory.path.name} has no checkpoint yet")
    problems = [(stored, verify(stored.directory, directory.run_id())) for stored in chosen]
    if as_json:
        print_json(
            {"checkpoints": [{**_summary(stored), "problems": reasons} for stored, reasons in problems]}
        )
    else:
        print_table(
            ["step", "verdict"],
            [[str(stored.step), "; ".join(reasons) or "whole"] for stored, reasons in problems],
        )
    if any(reasons for _, reasons in problems):
        raise typer.Exit(CheckpointError.exit_code)


@app.command()
def diff(
    run: Run,
    first: Annotated[int, typer.Argument(metavar="STEP", help="One step.")],
    second: Annotated[int, typer.Argument(metavar="STEP", help="Another step.")],
    other: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="The second step is of this run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor."""
    from dataclasses import asdict

    from launcher.training.checkpoint.inspect import differences

    left = _readable(_pick(_find(run), first))
    right = _readable(_pick(_find(other or run), second))
    differing = list(differences(left, right))
    if as_json:
        return print_json(
            {"first": str(left), "second": str(right), "tensors": [asdict(entry) for entry in differing]}
        )
    different = [entry for entry in differing if entry.status != "equal"]
    typer.echo(f"{len(differing) - len(different)} of {len(differing)} tensors are equal to the bit")
    if different:
        rows = [
            [entry.name, entry.status, f"{entry.max_absolute:.3g}", f"{entry.max_relative:.3g}"]
            for entry in different
        ]
        print_table(["tensor", "status", "max absolute", "max relative"], rows)
    return None


@app.command()
def prune(
    run: Run,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="The newest that stay; the job's own number by default.")
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(min=0, help="The best that stay as well; the job's own number by default.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What the best are ranked by; the job's own metric by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints and what dead attempts left; never the newest whole one."""
    from launcher import tasks
    from launcher.errors import ConfigurationError, Problem
    from launcher.planner.plan import Plan
    from launcher.runs import retention
    from launcher.tasks.mixed import measured, not_measured

    directory = _find(run)
    plan = Plan.read(directory.plan_file)
    kept, task = plan.checkpoint, tasks.unprepared(plan)
    metric = metric or kept.metric
    if (reason := not_measured(task, metric)) is not None:
        raise ConfigurationError(Problem("--metric", metric, reason))
    last, best = (
        kept.keep_last if keep_last is None else keep_last,
        kept.keep_best if keep_best is None else keep_best,
    )
    with directory.lock():
        leftovers = [] if dry_run else retention.remove_leftovers(directory)
        work = retention.to_prune if dry_run else retention.prune
        removed = work(directory, last, best, metric, measured(task)[metric])
    if as_json:
        return print_json(
            {"removed": [stored.step for stored in removed], "leftovers": leftovers, "dry_run": dry_run}
        )
    names = [stored.name for stored in removed] + leftovers
    typer.echo(f"{'would remove' if dry_run else 'removed'}: {', '.join(names) or 'nothing'}")
    return None


@app.command()
def average(
    run: Run,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new directory for the model.")],
    last: Annotated[int, typer.Option("--last", metavar="N", min=2, help="The newest whole ones.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Write the mean of a run's last checkpoints as Hugging Face safetensors."""
    from launcher.training.checkpoint.export import export

    done = export(_find(run), out, last=last)
    if as_json:
        return print_json({"out": str(done.directory), "step": done.step, "last": last})
    typer.echo(f"the mean of the last {last} checkpoints, up to step {done.step}, in {done.directory}")
    return None


app.command("import")(import_)
