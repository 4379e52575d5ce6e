"""A sweep on disk: SWEEP/sweep.json says what is tried, SWEEP/points/000 and so on are ordinary runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.errors import ConfigurationError, Problem
from launcher.planning.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.scheduling import opening

_FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """What is tried, and by what it is judged."""

    path: Path
    points: tuple[tuple[str, ...], ...]
    """The overrides of each."""
    metric: str
    nproc: int | None = None

    @classmethod
    def create(cls, path: Path, job_file: Path, overrides: list[str], points: list[list[str]], metric: str, nproc: int | None) -> Sweep:
        """Write a new sweep of a job. Raises ConfigurationError where there is something at `path`, or the job is bad."""
        if path.exists() and any(path.iterdir()):
            reason = "holds something already; go on with a sweep by naming its directory alone, or name another one with --out"
            raise ConfigurationError(Problem("--out", str(path), reason))
        job = opening.load_job(job_file, overrides, None)
        for point in points:
            opening.load_job(job_file, [*overrides, *point], None)  # what no point can be is said before any has begun
        sweep = cls(path.absolute(), tuple(map(tuple, points)), metric, nproc)
        (path / "points").mkdir(parents=True, exist_ok=True)
        content = job.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True)
        write_atomically(path / "job.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        write_atomically(path / _FILE, json.dumps({"format": 1, "points": points, "metric": metric, "nproc": nproc}, indent=2) + "\n")
        return sweep

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep in a directory. Raises ConfigurationError where there is none."""
        try:
            content = json.loads((path / _FILE).read_text(encoding="utf-8"))
            return cls(path.absolute(), tuple(map(tuple, content["points"])), content["metric"], content["nproc"])
        except (OSError, ValueError, KeyError):
            raise ConfigurationError(Problem("SWEEP", str(path), "no sweep there: it has no sweep.json that can be read")) from None

    def run(self, number: int) -> RunDirectory:
        return RunDirectory(self.path / "points" / f"{number:03d}")

    @property
    def runs(self) -> list[RunDirectory]:
        return [self.run(number) for number in range(len(self.points))]

    def left(self) -> list[int]:
        """The points that are not finished."""
        return [number for number, run in enumerate(self.runs) if not run.finished]

    def open(self, number: int, local: bool) -> tuple[RunDirectory, Plan]:
        """Make a point's run, or go on with it."""
        named = f"name={self.path.name}-{number:03d}"
        job = self.path / "job.yaml"
        return opening.open_run(job, [*self.points[number], named], self.nproc, self.run(number).path, local=local)
