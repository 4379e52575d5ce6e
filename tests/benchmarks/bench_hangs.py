"""Hangs in every phase, on both engines and 2 to 4 ranks, and how many of them are named rightly.

    python tests/benchmarks/bench_hangs.py --results hangs.jsonl [--only 0:20] [--seconds 5] [--nodes]

Each case is a run of the real trainer under the real launcher in which one rank stops itself (SIGSTOP) or
sleeps at a place. It is named rightly where the first suspicion names that rank with its node, and where it
is. What is in the results already is not run again, so that it can be done in pieces. It ends by printing the
table.

With --nodes each case runs on two nodes of a Slurm cluster of network namespaces (or on three, with a rank on
each), under `launcher submit`. That needs root and Slurm's programs.
"""

from __future__ import annotations

import argparse
import contextlib
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
    nodes: int = 1

    @property
    def name(self) -> str:
        where = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.engine} {self.place} {self.kind} {self.world_size}{where}"

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
        if self.kind == "agent":
            fault |= {"rank": self.world_size - 1, "step": 2}
        if self.place == "importing":
            fault = {"place": self.place, "kind": self.kind, "host": f"n{self.nodes}"}
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


def cases_on_nodes() -> list[Case]:
    """Thirty of them: each place once under each engine, by turns stopped and asleep; and agents, stopped under
    ranks that go on and before they have one."""
    found = []
    for number, place in enumerate((*BEFORE_STEPS, *IN_STEPS)):
        for engine in ("fsdp", "zero3"):
            kind = ("stop", "sleep")[(number + len(found)) % 2]
            world_size = (2, 4, 3)[len(found) % 3]
            found.append(Case(engine, place, kind, world_size, 3 if world_size == 3 else 2))
    return [*found, Case("fsdp", "forward", "agent", 4, 2), Case("zero3", "importing", "agent", 2, 2)]


def inject(case: Case, model: Path, data: dict[str, Any], scratch: Path, seconds: float) -> dict[str, Any]:
    """Run a case on this machine, and give what was struck and what was said of it."""
    from launcher.runs.events import read
    from tests.distributed.judging import STRUCK
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
    path = run.attempt(1) / STRUCK
    struck = {"rank": -1, "host": "", "time": began}
    struck |= json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = "save_stalled" if case.place == "saving" else "suspected"
    said = next((record for record in read(run.events_file) if record["event"] == wanted), None)
    return {"struck": struck, "said": said, "exit_code": process.returncode, "errors": errors}


def judged(case: Case, seen: dict[str, Any]) -> dict[str, Any]:
    """Judge what was said of a case."""
    struck, said = seen["struck"], seen["said"]
    line = said["line"] if said else ""
    return {
        "case": case.name,
        "rank": struck["rank"],
        "host": struck["host"],
        "line": line or seen["errors"][-400:],
        "named": bool(said) and said["rank"] == struck["rank"] and _tells_where(case, struck, line),
        "seconds": round(said["time"] - struck["time"], 1) if said else None,
        "exit_code": seen["exit_code"],
    }


def _tells_where(case: Case, struck: dict[str, Any], line: str) -> bool:
    if case.kind == "agent":
        then = "its ranks cannot start" if case.place == "importing" else "the ranks go on"
        return f"the agent on {struck['host']} is stopped (SIGSTOP) for " in line and then in line
    culprit = line.partition(f"rank {struck['rank']} on {struck['host']} ")[2].partition(";")[0]
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
    from tests.benchmarks.hangs_on_nodes import Nodes
    from tests.training.runs import causal_data, model_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines; what is in it is not run again"
    )
    parser.add_argument("--only", default="0:60", help="which cases, as FIRST:END")
    parser.add_argument("--seconds", type=float, default=5.0, help="cluster.hang_after")
    parser.add_argument("--nodes", action="store_true", help="on the nodes of a Slurm cluster")
    options = parser.parse_args()
    first, end = (int(number) for number in options.only.split(":"))
    wanted = (cases_on_nodes() if options.nodes else cases())[first:end]
    done = (
        [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
        if options.results.exists()
        else []
    )
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hangs")))
        os.environ.setdefault("XDG_STATE_HOME", str(scratch))
        if options.nodes:
            nodes = stack.enter_context(Nodes.of(scratch, options.seconds))
        else:
            model, data = model_directory(scratch / "model"), causal_data(scratch / "data", packing=False)
        for number, case in enumerate(wanted):
            if case.name in {one["case"] for one in done}:
                continue
            if options.nodes:
                ranks = case.world_size // case.nodes
                seen = nodes.strike(case.name, case.engine, case.fault, case.nodes, ranks)
            else:
                seen = inject(case, model, data, scratch / str(number), options.seconds)
            done.append(judged(case, seen))
            print(json.dumps(done[-1]), flush=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print(table(done))


if __name__ == "__main__":
    main()
