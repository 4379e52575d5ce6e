"""A sweep on disk: sweep.json, and an ordinary run directory for each point."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from launcher import tasks
from launcher.errors import ConfigurationError, LauncherError, Problem, RunInUseError
from launcher.job.schema import Job
from launcher.launch import run_setup
from launcher.metrics import Better
from launcher.plain_files import read_json
from launcher.planner.memory.profiles import Profiles
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.successive_halving import SWEEP_FILE, better_of
from launcher.sweep.line import Line
from launcher.sweep.search import Search
from launcher.sweep.space import written
from launcher.tasks.mixed import measured, not_measured


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, and the metric by which they are compared."""

    path: Path
    points: tuple[tuple[str, ...], ...]
    """The overrides of each point; for a search, of the points proposed so far."""
    metric: str
    nproc: int | None = None
    better: Better = "lower"
    """Whether lower or higher values of the metric are better."""
    search: Search | None = None
    """The search that proposes further points."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Failure classes by the numbers of points of a search that could not start."""

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
        search: Search | None = None,
    ) -> Sweep:
        """Write a new sweep of a job. Raises ConfigurationError if `path` exists, or if the job is invalid.

        halving: the step of the first comparison, and how many points one is kept of.
        search: proposes the points; `points` is then empty.
        """
        if path.exists() and any(path.iterdir()):
            reason = (
                "holds something already; go on with a sweep by naming its directory alone, or name "
                "another one with --out"
            )
            raise ConfigurationError(Problem("--out", str(path), reason))
        corners = [written(one) for one in search.corners()] if search else []
        job, *_ = [_load(job_file, overrides, point, metric) for point in ([], *points, *corners)]
        if search:
            search = search.with_whole(
                [
                    key
                    for key, one in search.between().items()
                    if not _can_be(job_file, [*overrides, *written(one)])
                ]
            )
        if halving or search:
            _check_comparable(job, metric, "--halving" if halving else "--search", halving is not None)
        better = measured(tasks.of_job(job))[metric]
        sweep = cls(path.absolute(), tuple(map(tuple, points)), metric, nproc, better, search)
        (path / "points").mkdir(parents=True, exist_ok=True)
        write_atomically(path / "job.yaml", as_yaml(job))
        described: dict[str, Any] = {
            "format": 1,
            "points": points,
            "metric": metric,
            "better": better,
            "nproc": nproc,
        }
        if halving:
            described["halving"] = {"first": halving[0], "factor": halving[1]}
        if search:
            described["search"] = search.to_dict()
        write_atomically(path / SWEEP_FILE, json.dumps(described, indent=2) + "\n")
        return sweep

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Return the sweep in a directory. Raises ConfigurationError if there is none."""
        try:
            content = read_json(path / SWEEP_FILE)
            points, metric, nproc = content["points"], content["metric"], content["nproc"]
            words = [word for point in points for word in point] if isinstance(points, list) else [None]
            if not all(isinstance(word, str) for word in [metric, *words]) or not isinstance(
                nproc, (int, type(None))
            ):
                raise ValueError("not as it was written")
            search = Search.of(content["search"]) if "search" in content else None
            refused = {int(number): _class_of(why) for number, why in content.get("refused", {}).items()}
            tried = tuple(map(tuple, points))
            return cls(path.absolute(), tried, metric, nproc, better_of(content), search, refused)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigurationError(
                Problem("SWEEP", str(path), "no sweep there: it has no sweep.json that can be read")
            ) from None

    def run(self, number: int) -> RunDirectory:
        return RunDirectory(self.path / "points" / f"{number:03d}")

    @property
    def runs(self) -> list[RunDirectory]:
        return [self.run(number) for number in range(len(self.points))]

    @property
    def num_points(self) -> int:
        """Return the total number of points, including those that a search has not proposed yet."""
        return self.search.num_points if self.search else len(self.points)

    def left(self) -> list[int]:
        """Return the existing points that are not finished; for a search, without those that could not
        start."""
        return [
            number for number, run in enumerate(self.runs) if not run.finished and number not in self.refused
        ]

    def proposed(self, lines: Sequence[Line]) -> Sweep:
        """Record the next point of a search, and return the sweep with it; `lines` are all existing
        points. Raises RunInUseError if another launcher recorded points meanwhile."""
        assert self.search
        point = written(self.search.propose(lines, self.better))
        described = read_json(self.path / SWEEP_FILE)
        if len(described["points"]) != len(self.points):
            raise RunInUseError(f"another launcher works in {self.path}: it proposed points meanwhile")
        described["points"].append(point)
        write_atomically(self.path / SWEEP_FILE, json.dumps(described, indent=2) + "\n")
        return dataclasses.replace(self, points=(*self.points, tuple(point)))

    def without(self, number: int, error: LauncherError) -> Sweep:
        """Record why a point of a search cannot start, and return the sweep in which it counts as failed."""
        described = read_json(self.path / SWEEP_FILE)
        why = {"failure_class": error.failure_class, "reason": str(error)}
        described.setdefault("refused", {})[str(number)] = why
        write_atomically(self.path / SWEEP_FILE, json.dumps(described, indent=2) + "\n")
        return dataclasses.replace(self, refused={**self.refused, number: error.failure_class})

    def open(self, number: int, local: bool) -> tuple[RunDirectory, Plan]:
        """Create a point's run, or open the existing one to resume it."""
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


def _load(job_file: Path, overrides: list[str], point: list[str], metric: str) -> Job:
    """Return the job of a point. Raises ConfigurationError, before any point starts, if the job is invalid
    or does not compute the metric."""
    job = run_setup.load_job(job_file, [*overrides, *point], None)
    if (missing := not_measured(tasks.of_job(job), metric)) is not None:
        where = f"at {' '.join(point)}: " if point else ""
        raise ConfigurationError(Problem("--metric", metric, f"{where}{missing}"))
    return job


def _can_be(job_file: Path, overrides: list[str]) -> bool:
    try:
        run_setup.load_job(job_file, overrides, None)
    except ConfigurationError:
        return False
    return True


def _class_of(why: Any) -> str:
    """Return a refused point's failure class from sweep.json; old entries have only the reason."""
    return ConfigurationError.failure_class if isinstance(why, str) else str(why["failure_class"])


def as_yaml(job: Job) -> str:
    """Return a job as the text of a job file: the keys that were set, with absolute paths."""
    content = job.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _check_comparable(job: Job, metric: str, option: str, on_the_way: bool) -> None:
    """Raise ConfigurationError, with every problem, unless points can be compared: by an evaluation, which
    with halving must also happen during training."""
    problems = []
    if find_spec("optuna") is None:
        problems.append(Problem(option, None, "needs optuna: pip install 'finetune-launcher[sweep]'"))
    if job.data.evaluation is None:
        problems.append(
            Problem(
                "data.evaluation", None, f"points are compared by their {metric} on held-out rows: name some"
            )
        )
    if on_the_way and job.training.evaluate_every is None:
        problems.append(
            Problem(
                "training.evaluate_every",
                None,
                "points are compared where they are evaluated: say how often, as 50 (steps)",
            )
        )
    if problems:
        raise ConfigurationError(problems)
