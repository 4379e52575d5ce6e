"""launcher doctor: check this machine, or a cluster's nodes, and say what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.output import print_json
from launcher.cli.plan import AsJson
from launcher.errors import ConfigurationError, Problem

if TYPE_CHECKING:
    from launcher.doctor.finding import Report

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_SHOWN = ("interface", "directory", "all-reduce")
"""Checks whose results are shown in the table of nodes."""
_WIDTH = 160
"""Width of output that does not go to a terminal."""
_ASKED = ("partition", "account", "qos", "reservation", "nodelist", "exclude")
OnNodes = Annotated[
    bool,
    typer.Option(
        "--slurm", help="Examine a cluster's nodes too, in a job of their own, or in the job it is called in."
    ),
]
NumNodes = Annotated[
    int | None,
    typer.Option("--nodes", min=1, help="With --slurm: how many; 2, or all of the job it is called in."),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--directory",
        "--run-dir",
        metavar="DIR",
        help="Where runs are, or will be: it has to be shared by all nodes. [default: $LAUNCHER_RUNS or runs]",
    ),
]


def _option(text: str) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(help=f"With --slurm: {text}")
    return info


def doctor(
    slurm: OnNodes = False,
    nodes: NumNodes = None,
    directory: Directory = None,
    partition: Annotated[str | None, _option("the partition.")] = None,
    account: Annotated[str | None, _option("who pays.")] = None,
    qos: Annotated[str | None, _option("the quality of service.")] = None,
    reservation: Annotated[str | None, _option("the reservation.")] = None,
    nodelist: Annotated[str | None, _option("nodes to take.")] = None,
    exclude: Annotated[str | None, _option("nodes to leave out.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="With --slurm: GPUs to ask for on each node.")
    ] = None,
    srun: Annotated[
        list[str], typer.Option("--srun", metavar="OPTION", help="With --slurm: any other option of srun.")
    ] = [],  # noqa: B006
    interface: Annotated[
        str | None, _option("the network interface between nodes, as cluster.interface.")
    ] = None,
    wait: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="With --slurm: how long to wait for nodes; 600."),
    ] = None,
    minutes: Annotated[
        int | None,
        typer.Option("--time", min=1, metavar="MINUTES", help="With --slurm: the job's time limit; 10."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine, or with a cluster's nodes.

    Every problem comes with what to do about it. The exit code is 1 where something failed, 0 otherwise,
    warnings or not.
    """
    from launcher.doctor import local
    from launcher.doctor.cluster import Examination, Request
    from launcher.runs.layout import runs_folder

    directory = directory or runs_folder()

    requested = dict(zip(_ASKED, (partition, account, qos, reservation, nodelist, exclude), strict=True))
    more = {
        "nodes": nodes,
        "gpus-per-node": gpus_per_node,
        "srun": srun or None,
        "interface": interface,
        "wait": wait,
        "time": minutes,
    }
    if not slurm:
        _refuse({**requested, **more})
    reports, job = [local.examine(directory, os.environ, slurm)], ""
    if slurm:
        options = (*(f"--{name}={value}" for name, value in requested.items() if value), *srun)
        number = nodes or int(os.environ.get("SLURM_JOB_NUM_NODES") or 2)
        request = Request(
            number, directory, options, gpus_per_node or 0, interface, float(wait or 600), minutes or 10
        )
        examination = Examination(request, lambda text: typer.echo(text, err=True))
        reports = examination.after(reports[0], os.environ)
        job = examination.job
    _tell(reports, job, as_json)


def _refuse(given: dict[str, object]) -> None:
    """Raise ConfigurationError for options that would have no effect."""
    problems = [
        Problem(f"--{name}", value, "is for the nodes of a cluster: add --slurm")
        for name, value in given.items()
        if value is not None
    ]
    if problems:
        raise ConfigurationError(problems)


def _tell(reports: Sequence[Report], job: str, as_json: bool) -> None:
    from launcher.doctor.finding import worst

    level = worst(report.level for report in reports)
    if as_json:
        print_json(
            {
                "verdict": level,
                **({"job": job} if job else {}),
                "nodes": [report.to_dict() for report in reports],
            }
        )
    else:
        _show(reports)
    if level == "failed":
        raise typer.Exit(1)


def _show(reports: Sequence[Report]) -> None:
    """Print the checks of this machine line by line, then the nodes, if any, one per line, then every
    problem with advice."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    own, *nodes = reports
    table = Table("check", "", "found", title=own.node, title_justify="left", box=None, pad_edge=False)
    for finding in own.findings:
        table.add_row(finding.check, _coloured(finding.level), escape(finding.found))
    console.print(table)
    if nodes:
        table = Table("node", "verdict", "not ok", *_SHOWN, box=None, pad_edge=False)
        for node in nodes:
            wrong = (
                ", ".join(dict.fromkeys(finding.check for finding in node.findings if finding.level != "ok"))
                or "-"
            )
            table.add_row(
                escape(node.node),
                _coloured(node.level),
                wrong,
                *(escape(node.found(check)) for check in _SHOWN),
            )
        console.print("", table, sep="\n")
    for report in reports:
        for finding in (finding for finding in report.findings if finding.level != "ok"):
            line, advice = escape(f"{report.node}: {finding.check}: {finding.found}"), escape(finding.advice)
            console.print(f"\n{_coloured(finding.level)} {line}\n  {advice}", soft_wrap=True)


def _coloured(level: str) -> str:
    colour = _COLOURS.get(level)
    return f"[{colour}]{level}[/]" if colour else level
