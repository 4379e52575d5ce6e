"""What each rank runs in tests of hangs: the trainer itself, in which fault.json has one rank hang at a place
that it says it is at.

    {"place": "forward", "kind": "stop" or "sleep", "rank": 1, "step": 7}

Without a rank the first that comes to the place does; of several `attempts` one in each. `struck.json` in the
attempt's directory then says which it was, and on which node. The place `saving` is inside a save. It is the program of the ranks, or the module that they are forked with
(LAUNCHER_WARM=hanging): then the fault is in the variable FAULT, as a job's environment has it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from launcher.launch.rendezvous import ATTEMPT_VARIABLE
from launcher.runs.places import PLACES, Whereabouts
from tests.distributed.judging import STRUCK

ATTEMPT = Path(os.environ[ATTEMPT_VARIABLE])
FAULT: dict[str, Any] = json.loads(
    os.environ.get("FAULT") or (ATTEMPT.parents[1] / "fault.json").read_text(encoding="utf-8")
)


def strike(step: int) -> None:
    rank = int(os.environ["RANK"])
    is_due = step >= FAULT.get("step", 0) and int(ATTEMPT.name) <= FAULT.get("attempts", 1)
    if FAULT.get("rank", rank) != rank or not is_due:
        return
    try:
        with open(ATTEMPT / STRUCK, "x", encoding="utf-8") as file:
            json.dump({"rank": rank, "host": os.uname().nodename, "time": time.time()}, file)
    except FileExistsError:
        return
    if FAULT["kind"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
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


def _hang_in_saves() -> None:
    from launcher.training.checkpoint import checkpointer

    write = checkpointer.write_hashed

    def hanging(*arguments: Any) -> Any:
        strike(FAULT.get("step", 0))
        return write(*arguments)

    checkpointer.write_hashed = hanging


if FAULT["place"] == "saving":
    _hang_in_saves()
else:
    _hang_at_places()

if __name__ == "__main__":
    from launcher.training.attempt import train
    from launcher.training.entry import main

    main(train=train)
else:
    import launcher.training.trainer  # noqa: F401  for all ranks that are forked
