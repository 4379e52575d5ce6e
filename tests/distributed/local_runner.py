"""A launcher process for tests: launch.local over the imitation of a trainer."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launcher.cli.display import Display
from launcher.launch import local, supervisor
from launcher.launch.fork_server import VARIABLE as WARM_VARIABLE
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from tests.distributed.judging import judge_the_struck_alone


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--exit-seconds", type=float, default=supervisor.EXIT_SECONDS)
    parser.add_argument("--display", action="store_true")
    parser.add_argument("--entry", default="imitation")
    options = parser.parse_args()
    supervisor.EXIT_SECONDS = options.exit_seconds
    if options.entry == "hanging":
        judge_the_struck_alone(options.run)
    if options.entry == "imitation":  # it trains nothing: the agent's own import does for its ranks too
        os.environ.setdefault(WARM_VARIABLE, "torch.distributed")
    run = RunDirectory(options.run)
    plan = Plan.read(run.plan_file)
    display = Display(plan, line_seconds=0.0) if options.display else None
    return local.run(run, plan, display, stop_at=options.stop_at, entry=options.entry)


if __name__ == "__main__":
    sys.exit(main())
