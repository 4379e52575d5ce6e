"""What the benchmarks of tuning share: launcher's commands, and rows that are kept so that a script may go on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.training.demo.models import model_directory
from tests.benchmarks._report import ROOT, parser

NUM_RANKS = 2
PREFACE = """# Ways to tune

Real data, small models and short runs: each section says how short. All runs are launcher's own commands, on 2 ranks. `+-` is the
standard deviation over the seeds. Every script takes the folder with the data, keeps its runs in `--work`, and goes on there if it was
stopped. With `--minutes` it begins nothing after that time. Other work ran on the machine on 2026-12-01, so seconds say little.
"""


class Session:
    """A folder of runs and rows that are made once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data: Path = options.data.resolve()
        self.work: Path = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self._end = time.monotonic() + 60 * options.minutes

    def launcher(self, *arguments: str, log: str, may_fail: bool = False) -> str:
        """Return the standard output of a command of launcher; its log goes to `log` in the folder."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(ROOT)
        with open(self.work / f"{log}.log", "w", encoding="utf-8") as errors:
            done = subprocess.run(
                [sys.executable, "-m", "launcher.cli.main", *arguments],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT, check=False,
            )  # fmt: skip
        if done.returncode and not may_fail:
            said = (self.work / f"{log}.log").read_text(encoding="utf-8")[-2000:]
            sys.exit(
                f"launcher {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{said}"
            )
        return done.stdout

    def run(self, name: str, job: dict[str, Any]) -> RunDirectory:
        """Return the finished run of a job, trained now if it is not there."""
        run = RunDirectory(self.work / name)
        if not run.finished:
            file = self.work / f"{name}.yaml"
            # JSON is YAML.
            file.write_text(json.dumps({"name": name} | job, indent=1), encoding="utf-8")
            self.launcher("run", str(file), "--run-dir", str(run.path), log=name)
        return run

    def exported(self, run: RunDirectory) -> str:
        """Return the directory of a run's model, exported once."""
        target = run.path.with_name(f"{run.path.name}-model")
        if not target.exists():
            self.launcher("export", str(run.path), "--out", str(target), log=target.name)
        return str(target)

    def row(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return the row `name`, made now if it is not there; None if the time is over."""
        file = self.work / f"row-{name}.json"
        if not file.exists():
            if time.monotonic() > self._end:
                return None
            begun = time.monotonic()
            result = make() | {"seconds": round(time.monotonic() - begun)}
            file.write_text(json.dumps(result), encoding="utf-8")
            print(name, result, flush=True)
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def rows_of(self, name: str, rows: list[dict[str, Any]]) -> str:
        """Return the path of a JSON lines file with these rows."""
        file = self.work / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return the parser that all of them share."""
    arguments = parser(description)
    arguments.add_argument(
        "--data", type=Path, required=True, help="the folder with sst2, banking77, sick ..."
    )
    arguments.add_argument("--work", type=Path, required=True, help="where the runs are kept")
    arguments.add_argument("--minutes", type=float, default=1e6, help="begin no row after so many")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    arguments.add_argument("--scale", type=float, default=1.0, help="times the steps: to try the script out")
    return arguments


def minilm() -> str:
    return str(model_directory("minilm-l6"))


def common(batch: int, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Return the sections of a job that all runs share: nothing is saved before the end."""
    return {
        "batch": {"global_batch_size": batch},
        "training": {
            "max_steps": steps, "learning_rate": rate, "schedule": "linear", "warmup": 0.1,
            "weight_decay": 0.01, "seed": seed,
        },
        "precision": "bf16",
        "checkpoint": {"every": "1d"},
        "parallel": {"engine": "fsdp"},
        "cluster": {"gpus_per_node": 0, "ranks_per_node": NUM_RANKS},
    }  # fmt: skip


def sst2(session: Session, split: str) -> list[dict[str, str]]:
    """Return the rows of a split of SST-2, with classes by name."""
    lines = (session.data / "sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t", 1) for line in lines if line]
    return [{"text": text, "label": ("negative", "positive")[int(label)]} for label, text in pairs]


def evaluations(run: RunDirectory) -> list[dict[str, float]]:
    """Return the metrics of a run's evaluations, the first before training."""
    return [record["metrics"] for record in read(run.events_file) if record["event"] == "evaluated"]


def spread(values: list[float], digits: int = 3) -> str:
    """Return the mean of values, with their standard deviation if there are several."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} +- {stdev(values):.{digits}f}"
