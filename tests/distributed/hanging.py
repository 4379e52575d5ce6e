"""What each rank runs in tests of hangs: the trainer itself, in which fault.json has one rank hang at a place
that it says it is at.

    {"place": "forward", "kind": "stop" or "sleep", "rank": 1, "step": 7}

Without a rank the first that comes to the place does. `struck.json` then says which it was. The place
`saving` is inside a save.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.runs.places import PLACES, Whereabouts

RUN = Path(sys.argv[1])
FAULT: dict[str, Any] = json.loads((RUN / "fault.json").read_text(encoding="utf-8"))
RANK = int(os.environ.get("RANK", "0"))


def strike(step: int) -> None:
    if FAULT.get("rank", RANK) != RANK or step < FAULT.get("step", 0):
        return
    try:
        with open(RUN / "struck.json", "x", encoding="utf-8") as file:
            json.dump({"rank": RANK, "time": time.time()}, file)
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


if __name__ == "__main__":
    from launcher.training.attempt import train
    from launcher.training.entry import main

    if FAULT["place"] == "saving":
        _hang_in_saves()
    else:
        _hang_at_places()
    main(train=train)
