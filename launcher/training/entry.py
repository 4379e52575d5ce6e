"""The program that torchrun starts on every rank: run directory -> trainer -> exit code.

    python -m launcher.training.entry RUN_DIRECTORY --attempt N [--stop-at STEP]

Before heavy imports, the rank arranges to die with its agent, installs signal handlers, opens its own log and
writes who it is. It always ends with os._exit, so that no destructor, thread or peer can delay it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from launcher.planner.plan import Plan
from launcher.runs.grace import grace_file
from launcher.runs.layout import RunDirectory
from launcher.runs.places import here
from launcher.runs.processes import die_with_parent
from launcher.training.rank import Rank, leave
from launcher.training.signals import StoppedEarly, StopRequest

Train = Callable[..., None]


def main(arguments: list[str] | None = None, train: Train | None = None) -> NoReturn:
    """Run one rank to its end. `train(run, plan, attempt, stop, stop_at=...)` defaults to the trainer's."""
    die_with_parent()
    stop = StopRequest().install()
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    rank = Rank(RunDirectory(options.run), options.attempt)
    try:
        rank.begin()
        here.at("starting")
        plan = Plan.read(rank.run.plan_file)
        stop.grace_seconds, stop.grace_file = plan.grace_seconds, grace_file(rank.directory)
        (train or _trainer())(rank.run, plan, options.attempt, stop, stop_at=options.stop_at)
    except StoppedEarly:
        print(f"{stop.asked_by}: left before there was anything to save", file=sys.stderr)
    except BaseException as error:  # any failure must reach the parent
        rank.fail(error)
    leave(0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher.training.entry", description="One rank of a run; started by torchrun."
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt")
    parser.add_argument("--stop-at", type=int, default=None, help="save and leave after this step")
    return parser.parse_args(arguments)


def _trainer() -> Train:
    import warnings

    from transformers.utils import logging

    from launcher.training.attempt import train

    # A rank's log is for events of this run: these messages appear in every run and carry no information.
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
    return train


if __name__ == "__main__":
    main()
