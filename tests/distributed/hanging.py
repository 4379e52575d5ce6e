"""What each rank runs in tests of hangs: the trainer itself, in which fault.json has one rank hang at a place
that it says it is at, or run out of memory there.

    {"place": "forward", "kind": "stop", "sleep", "memory" or "agent", "rank": 1, "step": 7}

Of the kind `agent` the rank stops its agent; at the place `importing` that stops itself, before it has a rank.
Without a rank the first that comes to the place does; of several `attempts` one in each. `struck.json` in the
attempt's directory then says which it was, and on which node. FUNCTIONS are places inside of others.

It is the program of the ranks, or the module that they are forked with (LAUNCHER_WARM=hanging): then the
fault is in the variable FAULT, as a job's environment has it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from launcher.launch.rendezvous import ATTEMPT_VARIABLE
from launcher.runs.places import PLACES, Whereabouts, here
from tests.distributed.judging import STRUCK

ATTEMPT = Path(os.environ[ATTEMPT_VARIABLE])
FAULT: dict[str, Any] = json.loads(
    os.environ.get("FAULT") or (ATTEMPT.parents[1] / "fault.json").read_text(encoding="utf-8")
)
FUNCTIONS = {
    "saving": "launcher.training.checkpoint.checkpointer:write_hashed",
    "filling the image": "launcher.training.checkpoint.checkpointer:Checkpointer._staged",
    "collating": "launcher.training.data.ahead:Loader.batch",
    "told": "launcher.training.step_totals:add_up",
}
"""Places inside of others."""
AFTER = ("told",)


def strike(step: int) -> None:
    rank, host = int(os.environ.get("RANK", "-1")), os.uname().nodename
    is_due = step >= FAULT.get("step", 0) and int(ATTEMPT.name) <= FAULT.get("attempts", 1)
    if FAULT.get("rank", rank) != rank or FAULT.get("host", host) != host or not is_due:
        return
    struck = -1 if FAULT["kind"] == "agent" else rank
    try:
        with open(ATTEMPT / STRUCK, "x", encoding="utf-8") as file:
            json.dump({"rank": struck, "host": host, "time": time.time()}, file)
    except FileExistsError:
        return
    if FAULT["kind"] == "memory":
        raise MemoryError
    if FAULT["kind"] in ("stop", "agent"):
        os.kill(os.getppid() if FAULT["kind"] == "agent" and rank >= 0 else os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(FAULT.get("seconds", 600))


def _hang_at_places() -> None:
    for name in ("at", "turn", "moved"):
        original = getattr(Whereabouts, name)

        def said(
            self: Whereabouts, *arguments: Any, _original: Any = original, _name: str = name, **named: Any
        ) -> None:
            _original(self, *arguments, **named)
            place = PLACES[self._numbers[0]]
            # Of the preparation it is the rows that hang, which one rank alone reads.
            if place == FAULT["place"] and (place != "preparing" or _name == "moved"):
                strike(self._numbers[2])

        setattr(Whereabouts, name, said)


def _hang_in(name: str) -> None:
    """Strike before a function, or after it."""
    module_name, _, path = FUNCTIONS[name].partition(":")
    holder: Any = importlib.import_module(module_name)
    *owners, last = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    original = getattr(holder, last)

    def hanging(*arguments: Any, **named: Any) -> Any:
        if name not in AFTER:
            strike(here._numbers[2])
            return original(*arguments, **named)
        result = original(*arguments, **named)
        strike(here._numbers[2])
        return result

    setattr(holder, last, hanging)


if FAULT["place"] in FUNCTIONS:
    _hang_in(FAULT["place"])
else:
    _hang_at_places()

if __name__ == "__main__":
    from launcher.training.attempt import train
    from launcher.training.entry import main

    main(train=train)
else:  # in the agent, for all ranks that it forks
    import launcher.training.trainer  # noqa: F401

    if FAULT["place"] == "importing":
        strike(0)
