"""A sweep on disk: sweep.json, and an ordinary run for each point."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.launch import run_setup
from launcher.metrics import Better
from launcher.plain_files import read_json
from launcher.planner.memory.profiles import Profiles
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.successive_halving import SWEEP_FILE, better_of
from launcher.tasks.mixed import measured, not_measured


@dataclass(frozen=True)
class Sweep:
    """Say what is tried, and by what it is judged."""

    path: Path
    points: tuple[tuple[str, ...], ...]
    """The overrides of each."""
    metric: str
    nproc: int | None = None
    better: Better = "lower"
    """Which value of the metric is the better one."""

    @classmethod
    def create(
        cls,
        path: Path,
        job_file: Path,
        overrides: list[str],
        points: list[list[str]],
        metric: str,
        nproc: int | None,
        halving: tuple[int, int] | None = None,
    ) -> Sweep:
        """Write a new sweep of a job. Raises ConfigurationError where there is something at `path`, or the
        job is bad.

        halving: the steps before points are first compared, and how many of them one is kept of.
        """
        if path.exists() and any(path.iterdir()):
            reason = (
                "holds something already; go on with a sweep by naming its directory alone, or name "
                "another one with --out"
            )
            raise ConfigurationError(Problem("--out", str(path), reason))
        jobs = [run_setup.load_job(job_file, [*overrides, *point], None) for point in ([], *points)]
        job = jobs[0]
        # What no point can be, or measures, is said before any has begun.
        for point, one in zip(([], *points), jobs, strict=True):
            if (missing := not_measured(tasks.of_job(one), metric)) is not None:
                where = f"at {' '.join(point)}: " if point else ""
                raise ConfigurationError(Problem("--metric", metric, f"{where}{missing}"))
        if halving:
            _check_comparable(job, metric)
        better = measured(tasks.of_job(job))[metric]
        sweep = cls(path.absolute(), tuple(map(tuple, points)), metric, nproc, better)
        (path / "points").mkdir(parents=True, exist_ok=True)
        content = job.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True)
        write_atomically(path / "job.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        described: dict[str, Any] = {
            "format": 1,
            "points": points,
            "metric": metric,
            "better": better,
            "nproc": nproc,
        }
        if halving:
            described["halving"] = {"first": halving[0], "factor": halving[1]}
        write_atomically(path / SWEEP_FILE, json.dumps(described, indent=2) + "\n")
        return sweep

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep in a directory. Raises ConfigurationError where there is none."""
        try:
            content = read_json(path / SWEEP_FILE)
            points, metric, nproc = content["points"], content["metric"], content["nproc"]
            words = [word for point in points for word in point] if isinstance(points, list) else [None]
            if not all(isinstance(word, str) for word in [metric, *words]) or not isinstance(
                nproc, (int, type(None))
            ):
                raise ValueError("not as it was written")
            return cls(path.absolute(), tuple(map(tuple, points)), metric, nproc, better_of(content))
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigurationError(
                Problem("SWEEP", str(path), "no sweep there: it has no sweep.json that can be read")
            ) from None

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
        return run_setup.open_run(
            job,
            [*self.points[number], named],
            self.nproc,
            self.run(number).path,
            local=local,
            profiles=Profiles(starts=True),
        )


def _check_comparable(job: Job, metric: str) -> None:
    """Points can be compared only by what is measured on the way. Raises ConfigurationError, with every
    problem."""
    problems = []
    if find_spec("optuna") is None:
        problems.append(Problem("--halving", None, "needs optuna: pip install 'finetune-launcher[sweep]'"))
    if job.data.evaluation is None:
        problems.append(
            Problem(
                "data.evaluation", None, f"points are compared by their {metric} on held-out rows: name some"
            )
        )
    if job.training.evaluate_every is None:
        problems.append(
            Problem(
                "training.evaluate_every",
                None,
                "points are compared where they are evaluated: say how often, as 50 (steps)",
            )
        )
    if problems:
        raise ConfigurationError(problems)
