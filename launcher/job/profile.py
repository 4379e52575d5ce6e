"""A site profile: keys that all jobs of a cluster share, and the limits of its partitions.

    cluster: {partition: main, account: physics, gpus_per_node: 8, setup: [source /opt/env.sh]}
    limits:
      main: {max_nodes: 8, max_time: 2d, gpus_per_node: 8, cpus_per_node: 96}

`cluster` holds keys of a job file's `cluster`; what the job file says goes before it, and before every option
of Slurm that excludes it.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from launcher.errors import ConfigurationError, Problem
from launcher.job import job_file, slurm_options
from launcher.job.schema import Cluster
from launcher.values import Seconds, Section

_MERGED = ("environment", "sbatch")
"""Sections of which a job and a profile may each bring some keys."""


class Limits(Section):
    """Say what one partition has at most."""

    max_nodes: Annotated[int, Field(ge=1)] | None = None
    """Nodes of one job."""
    max_time: Seconds | None = None
    """Seconds (or 8h, 2d) of one job."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each node."""
    cpus_per_node: Annotated[int, Field(ge=1)] | None = None
    """Cores of each node."""


class Profile(Section):
    """One site."""

    cluster: Cluster = Cluster()
    limits: dict[str, Limits] = Field(default_factory=dict)
    """By partition."""


def directories() -> list[Path]:
    """Return where profiles are looked for by name: the user's own, then those of the folder that this is
    called in."""
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [configuration / "launcher" / "profiles", Path("slurm") / "profiles"]


def find(name: str, folder: Path) -> Path:
    """Return the file of a profile by its path, relative to `folder`, or by its name. Raises
    ConfigurationError with the nearest there is."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path.absolute()
        raise ConfigurationError(Problem("cluster.profile", name, f"no such file (looked in {path.parent})"))
    places = [*directories(), folder / "slurm" / "profiles"]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return (place / f"{name}.yaml").absolute()
    known = sorted({path.stem for place in places if place.is_dir() for path in place.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1)
    there = (
        f"the nearest is {near[0]}"
        if near
        else f"there are {', '.join(known)}"
        if known
        else "there is none; `launcher profile` writes one"
    )
    raise ConfigurationError(
        Problem("cluster.profile", name, f"no profile of that name in {places[0]} or slurm/profiles; {there}")
    )


def read(path: Path) -> tuple[Profile, dict[str, Any]]:
    """Return a profile, and its `cluster` as it is written. Raises ConfigurationError with what is wrong
    with it."""
    content = job_file.read(path)
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        problems = [
            Problem(".".join(map(str, item["loc"])), None, item["msg"])
            for item in error.errors(include_url=False)
        ]
        raise ConfigurationError(problems, str(path)) from None
    return profile, content.get("cluster") or {}


def apply(content: dict[str, Any], folder: Path) -> list[Problem]:
    """Put what the profile of a job file says under what the job file says; what is wrong with it comes back
    as problems."""
    cluster = content.get("cluster")
    if not isinstance(cluster, dict) or not isinstance(cluster.get("profile"), str):
        return []
    try:
        path = find(cluster["profile"], folder)
        _, requested = read(path)
    except ConfigurationError as error:
        del cluster["profile"]
        return error.problems
    named = slurm_options.named(cluster)
    requested = slurm_options.without(requested, slurm_options.rivals(named) | ({"exclusive"} & named))
    merged = {**requested, **cluster, "profile": str(path)}
    for key in _MERGED:
        if isinstance(requested.get(key), dict) and isinstance(cluster.get(key), dict):
            merged[key] = {**requested[key], **cluster[key]}
    content["cluster"] = merged
    return []


def problems(cluster: Cluster, num_nodes: int, num_gpus: int, profile: Profile) -> list[Problem]:
    """Return what a job asks for over the limits of the partitions it names; without one, nothing is
    known."""
    wrong: list[Problem] = []
    for partition in (cluster.partition or "").split(","):
        if partition and profile.limits and partition not in profile.limits:
            near = difflib.get_close_matches(partition, profile.limits, n=1) or sorted(profile.limits)
            wrong.append(
                Problem(
                    "cluster.partition",
                    partition,
                    f"the site has no such partition; it has {', '.join(near)}",
                )
            )
        elif partition:
            wrong += _over(cluster, partition, num_nodes, num_gpus, profile.limits.get(partition, Limits()))
    return wrong


def _over(cluster: Cluster, partition: str, num_nodes: int, num_gpus: int, limits: Limits) -> list[Problem]:
    requested = {
        "nodes": (num_nodes, limits.max_nodes),
        "time_limit": (cluster.time_limit, limits.max_time),
        "gpus_per_node": (num_gpus, limits.gpus_per_node),
        "cpus_per_node": (cluster.cpus_per_node, limits.cpus_per_node),
    }
    return [
        Problem(
            f"cluster.{key}",
            value,
            f"partition {partition} has at most {limit:g}{' s' if key == 'time_limit' else ''}",
        )
        for key, (value, limit) in requested.items()
        if value is not None and limit is not None and value > limit
    ]
