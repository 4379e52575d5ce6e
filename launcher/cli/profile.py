"""launcher profile: write a site profile from what Slurm says of the site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson
from launcher.errors import ConfigurationError, Problem

if TYPE_CHECKING:
    from launcher.launch.slurm.site import Partition, Site

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Where to write it; by default where profiles are looked for by the cluster's name.",
    ),
]
Chosen = Annotated[
    str | None,
    typer.Option(
        "--partition", metavar="P", help="The partition of jobs that name none; the site's default."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a profile that is there.")]


def profile(out: Out = None, partition: Chosen = None, force: Force = False, as_json: AsJson = False) -> None:
    """Write a site profile by asking Slurm: partitions, GPUs, limits, account."""
    from launcher.job.profile import directories
    from launcher.launch.slurm import site as sites
    from launcher.launch.slurm.site_profile import text
    from launcher.runs.layout import write_atomically

    site = sites.ask()
    chosen = site.partition(partition) if partition else site.default
    path = (out or directories()[0] / f"{site.name}.yaml").absolute()
    if path.exists() and not force:
        raise ConfigurationError(
            Problem("--out", str(path), "is there already; replace it with --force, or name another file")
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text(site, chosen))
    name = path.stem if path.parent == directories()[0] else str(path)
    if as_json:
        return print_json({"path": str(path), "profile": name, **site.to_dict()})
    _show(site)
    typer.echo(f"\nwrote {path}; a job takes it with cluster: {{profile: {name}}}")
    if chosen is None:
        typer.echo(
            "the site has no default partition: name one in the profile, or with --partition", err=True
        )
    return None


def _show(site: Site) -> None:
    account = site.account or "none by default"
    typer.echo(
        f"cluster {site.name}, account {account}, "
        f"{'GPUs by gres' if site.takes_gres else 'no GPUs in Slurm'}\n"
    )
    header = ["partition", "nodes", "at most", "time", "GPUs", "called", "cpus", "memory"]
    print_table(header, [_row(partition) for partition in site.partitions])


def _row(partition: Partition) -> list[str]:
    from launcher.launch.slurm.site_profile import duration

    known = lambda value: "-" if value is None else str(value)  # noqa: E731
    return [
        partition.name + ("*" if partition.is_default else "") + ("" if partition.is_up else " (not up)"),
        str(partition.num_nodes),
        known(partition.max_nodes),
        duration(partition.max_time) or "no limit",
        str(partition.gpus_per_node),
        ",".join(partition.gpu_types) or "-",
        known(partition.cpus_per_node),
        "-" if partition.memory_per_node is None else f"{partition.memory_per_node / 1024:.0f} GiB",
    ]
