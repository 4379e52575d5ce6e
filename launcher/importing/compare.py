"""The comparison of two plans, jobs or engine configurations, key by key in the plan's vocabulary."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError
from launcher.importing import foreign_files
from launcher.importing.merge import merge
from launcher.importing.reading import Reading
from launcher.job.load import load
from launcher.planner.changes import changes
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.render import accelerate, deepspeed
from launcher.runs.layout import RunDirectory


@dataclass(frozen=True)
class Difference:
    """One differing key with both values; None if that side does not set it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    differences: list[Difference]
    notes: list[str]


def compare(a: Path, b: Path) -> Comparison:
    """Return the differences of two files or run directories. Two plans are compared in full, anything else only
    in the keys that an engine's file can have.

    Raises ConfigurationError if one cannot be read.
    """
    sides = [_side(path) for path in (a, b)]
    one, other = sides
    if isinstance(one, Plan) and isinstance(other, Plan):
        return Comparison(
            [Difference(change.key, change.before, change.after) for change in changes(one, other)], []
        )
    notes: list[str] = []
    kinds = {reading.rank for side in sides if isinstance(side, list) for reading in side}
    values = []
    for path, side in zip((a, b), sides, strict=True):
        readings = _rendered(side, kinds) if isinstance(side, Plan) else side
        merged = merge(readings)
        if merged.problems:
            raise ConfigurationError(merged.problems)
        values.append(merged.values())
        told = [remark for remark in merged.remarks if remark.kind in ("conflict", "cannot be said")]
        notes += [f"{path}: {remark.said} = {remark.value}: {remark.text}" for remark in told]
    return Comparison(differences(values[0], values[1]), notes)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Return the keys whose values are not equal, in order."""
    return [
        Difference(key, a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _side(path: Path) -> Plan | list[Reading]:
    if not path.exists():
        with contextlib.suppress(ConfigurationError):  # no run has that name either; the error names the path
            path = RunDirectory.find(path).path
    path = path / "plan.json" if path.is_dir() else path
    content = foreign_files.content_of(path)
    kind = foreign_files.kind_of(content)
    if kind == "plan":
        return Plan.read(path)
    if kind == "job":
        return plan_job(load(path), local=False)
    readings = [foreign_files.read_content(content, str(path))]
    foreign_files.follow(readings, {str(path): path.parent})
    return readings


def _rendered(plan: Plan, kinds: set[int]) -> list[Reading]:
    """Return a plan in the form of the files it is compared with: a DeepSpeed file alone, or Accelerate's and
    DeepSpeed's."""
    readings = []
    if plan.engine == "deepspeed":
        readings.append(foreign_files.read_content(deepspeed.config(plan), "(plan)"))
    if plan.engine != "deepspeed" or kinds != {foreign_files.RANKS["deepspeed"]}:
        readings.append(foreign_files.read_content(accelerate.config(plan), "(plan, accelerate.yaml)"))
    return readings
