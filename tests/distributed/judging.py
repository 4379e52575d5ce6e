"""How a watch judges in tests of hangs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from launcher.launch import watchdog
from launcher.runs.seen import Seen, SeenAgent

STRUCK = "struck.json"
"""In the attempt's directory: which rank the test has struck, where and when."""


def judge_the_struck_alone(run: Path) -> None:
    """Hold a rank for hanging only once the test has struck one, and the watch for watching all the time.

    Else a machine that is busy for some seconds is a hang of its own, or begins the clocks anew.
    """
    look = watchdog.Judge.look

    def judged(
        self: watchdog.Judge, now: float, ranks: list[Seen], agents: Sequence[SeenAgent] = ()
    ) -> watchdog.Verdict:
        verdict = look(self, now, ranks, agents)
        if not any(run.glob(f"attempts/*/{STRUCK}")):
            self.suspected, verdict = False, ""
        return verdict

    watchdog.Judge.look = judged  # type: ignore[method-assign]
    watchdog.GAP_SECONDS = math.inf
