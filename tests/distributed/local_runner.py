"""A launcher process for tests: launch.local over the imitation of a trainer."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from launcher.cli.display import Display
from launcher.launch import local, supervisor, watchdog
from launcher.launch.fork_server import VARIABLE as WARM_VARIABLE
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.runs.seen import Seen


def judge_the_struck_alone(struck: Path) -> None:
    """Hold a rank for hanging only once the test has struck one, and the watch for watching all the time.

    Else a machine that is busy for some seconds is a hang of its own, or begins the clocks anew.
    """
    look = watchdog.Judge.look

    def judged(self: watchdog.Judge, now: float, ranks: list[Seen]) -> watchdog.Verdict:
        verdict = look(self, now, ranks)
        if not struck.exists():
            self.suspected, verdict = False, ""
        return verdict

    watchdog.Judge.look = judged  # type: ignore[method-assign]
    watchdog.GAP_SECONDS = math.inf


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
        judge_the_struck_alone(options.run / "struck.json")
    if options.entry == "imitation":  # it trains nothing: the agent's own import does for its ranks too
        os.environ.setdefault(WARM_VARIABLE, "torch.distributed")
    run = RunDirectory(options.run)
    plan = Plan.read(run.plan_file)
    display = Display(plan, line_seconds=0.0) if options.display else None
    return local.run(run, plan, display, stop_at=options.stop_at, entry=options.entry)


if __name__ == "__main__":
    sys.exit(main())
