"""Hangs in every phase, on both engines and 2 to 4 ranks, and how many of them are named rightly.

    python tests/benchmarks/bench_hangs.py --results hangs.jsonl [--only 0:20] [--seconds 5]

Each case is a run of the real trainer under the real launcher in which one rank stops itself (SIGSTOP) or
sleeps at a place. It is named rightly where the first suspicion names that rank, and where it is. What is in
the results already is not run again, so that it can be done in pieces. It ends by printing the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

BEFORE_STEPS = ("starting", "preparing", "loading", "checking the loss", "restoring")
IN_STEPS = (
    "data",
    "forward",
    "backward",
    "exchange",
    "optimizer",
    "recording",
    "evaluating",
    "measuring",
    "staging",
)
ENGINES: dict[str, int | None] = {"fsdp": None, "zero3": 3, "zero2": 2}
PATIENCE_SECONDS = 400


@dataclass(frozen=True)
class Case:
    """One hang."""

    engine: str
    place: str
    kind: str
    world_size: int

    @property
    def name(self) -> str:
        return f"{self.engine} {self.place} {self.kind} {self.world_size}"

    @property
    def fault(self) -> dict[str, Any]:
        """As tests/distributed/hanging.py reads it. Rows are prepared by whoever comes first, metrics written
        by rank 0."""
        fault: dict[str, Any] = {"place": self.place, "kind": self.kind}
        if self.place == "saving":
            fault |= {"seconds": 40}
        if self.place in IN_STEPS:
            fault["step"] = 6 if self.place in ("evaluating", "measuring") else 7
        if self.place != "preparing":
            fault["rank"] = 0 if self.place == "recording" else self.world_size - 1 - (len(self.place) % 2)
        return fault


def cases() -> list[Case]:
    """Sixty of them."""
    found = []
    for place in (*BEFORE_STEPS, *IN_STEPS):
        for kind in ("stop", "sleep"):
            for engine in ("fsdp", "zero3"):
                found.append(Case(engine, place, kind, 2 + len(found) % 3))
    found += [Case("zero2", place, kind, 2) for place, kind in (("forward", "stop"), ("data", "sleep"))]
    return [*found, Case("fsdp", "saving", "sleep", 2), Case("zero2", "saving", "sleep", 3)]


def inject(case: Case, model: Path, data: dict[str, Any], scratch: Path, seconds: float) -> dict[str, Any]:
    """Run a case, and judge what was said."""
    from launcher.runs.events import read
    from tests.training.plans import deepspeed
    from tests.training.runs import new_run, plan_for

    stage = ENGINES[case.engine]
    engine = deepspeed(stage) if stage else {}
    steps = 400 if case.place == "saving" else 12
    more = {
        "hang_after": seconds,
        "evaluate_every": {"value": 6, "unit": "steps"},
        "checkpoint": {"every": 8},
    }
    run = new_run(scratch / "run", plan_for(model, data, case.world_size, steps, **engine, **more))
    (run.path / "fault.json").write_text(json.dumps(case.fault), encoding="utf-8")
    folder = ROOT / "tests" / "distributed"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(scratch),
    }
    command = [sys.executable, str(folder / "local_runner.py"), str(run.path), "--entry", "hanging"]
    began = time.time()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
    struck = (
        json.loads(path.read_text(encoding="utf-8"))
        if (path := run.path / "struck.json").exists()
        else {"rank": -1, "time": began}
    )
    wanted = "save_stalled" if case.place == "saving" else "suspected"
    said = next((record for record in read(run.events_file) if record["event"] == wanted), None)
    line = said["line"] if said else ""
    return {
        "case": case.name,
        "rank": struck["rank"],
        "line": line or errors[-400:],
        "named": bool(said) and said["rank"] == struck["rank"] and _tells_where(case, struck["rank"], line),
        "seconds": round(said["time"] - struck["time"], 1) if said else None,
        "exit_code": process.returncode,
    }


def _tells_where(case: Case, rank: int, line: str) -> bool:
    culprit = line.partition(f"rank {rank} on ")[2].partition(";")[0]
    if case.kind == "stop":
        return "is stopped (SIGSTOP)" in culprit
    return {"data": "is in the loader", "saving": "is writing __"}.get(
        case.place, f"is in {case.place}"
    ) in culprit


def table(results: list[dict[str, Any]]) -> str:
    """By case, and in all."""
    lines = [
        "| case (engine, place, kind, ranks) | named rightly | after s | exit code |",
        "|---|---|---|---|",
    ]
    for one in results:
        lines.append(
            f"| {one['case']} | {'yes' if one['named'] else 'NO: ' + one['line'][:200]} | "
            f"{one['seconds']} | {one['exit_code']} |"
        )
    named, missed = sum(one["named"] for one in results), sum(one["seconds"] is None for one in results)
    return "\n".join([*lines, f"{named} of {len(results)} named rightly, {missed} missed"])


def main() -> None:
    from tests.training.runs import causal_data, model_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines; what is in it is not run again"
    )
    parser.add_argument("--only", default="0:60", help="which cases, as FIRST:END")
    parser.add_argument("--seconds", type=float, default=5.0, help="cluster.hang_after")
    options = parser.parse_args()
    first, end = (int(number) for number in options.only.split(":"))
    done = (
        [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
        if options.results.exists()
        else []
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("XDG_STATE_HOME", scratch)
        model, data = (
            model_directory(Path(scratch) / "model"),
            causal_data(Path(scratch) / "data", packing=False),
        )
        for number, case in enumerate(cases()[first:end]):
            if case.name in {one["case"] for one in done}:
                continue
            done.append(inject(case, model, data, Path(scratch) / str(number), options.seconds))
            print(json.dumps(done[-1]), flush=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print(table(done))


if __name__ == "__main__":
    main()
