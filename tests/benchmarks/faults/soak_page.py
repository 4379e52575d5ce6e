"""The page of the soak test, made of what several soaks came to."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

from tests.benchmarks import _report
from tests.benchmarks.faults.effective import Timeline, Times


def figures(done: dict[str, Any], every: int) -> dict[str, Any]:
    """Return what is kept of a soak: how often each thing was done, and of each piece where its time went."""
    pieces = [
        {key: value for key, value in piece.items() if key not in ("injections", "timeline")}
        | {"times": vars(Timeline(**piece["timeline"]).times(every))}
        for piece in done["pieces"]
    ]
    kinds = Counter(entry["kind"] for piece in done["pieces"] for entry in piece["injections"])
    broken = [
        piece | {"injections": len(piece["injections"]), "why": re.sub(r"/\S+/", "", piece["why"])}
        for piece in done["broken"]
    ]
    return {"kinds": kinds, "pieces": pieces, "broken": broken}


def report(soaks: dict[str, Any], num_steps: int, every: int) -> str:
    """Return the section of docs/benchmarks/faults.md. `soaks`: the figures of each, by its seed;
    `every`: the steps between saves."""
    pieces = [piece for soak in soaks.values() for piece in soak["pieces"]]
    broken = [(seed, piece) for seed, soak in soaks.items() for piece in soak["broken"]]
    kinds: Counter[str] = Counter()
    for soak in soaks.values():
        kinds.update(soak["kinds"])
    each = ", ".join(f"{sum(soak['kinds'].values())} of seed {seed}" for seed, soak in soaks.items())
    different = sum(bool(piece["differences"]) for piece in pieces)
    lines = [
        f"{_report.sentence(pieces[-1]['conditions'])}\n",
        f"{len(pieces)} runs of {num_steps} steps on 2 of 3 nodes with 2 ranks each, saved every {every} steps.",
        f"{sum(kinds.values())} injections ({each}), {sum(piece['failures'] for piece in pieces)} of which "
        f"ended an attempt; {sum(piece['saves_failed'] for piece in pieces)} saves failed.",
        f"{sum(piece['checkpoints_chosen'] for piece in pieces)} checkpoints were chosen, each was whole. "
        f"{different} runs differ from the undisturbed one in a sample, a loss, a gradient norm or a weight.",
        f"Runs that did not get to their end: {len(broken)}. Jobs that Slurm held, and that were released: "
        f"{sum(piece.get('released', 0) for piece in pieces)}.",
        "",
        _report.table(("injection", "times"), sorted(kinds.items(), key=lambda item: -item[1])),
        _effective([Times(**piece["times"]) for piece in pieces if "times" in piece]),
    ]
    lines += [f"- seed {seed}, piece {one['piece']}: {one['why'].splitlines()[0]}" for seed, one in broken]
    return "\n".join(lines)


def _effective(times: list[Times]) -> str:
    """Return what the runs lost in time, beside the formula."""
    total = functools.reduce(Times.add, times)
    failures = max(1, total.failures)
    return (
        f"Effective time: {total.ratio:.1%} of {total.wall:.0f} s went into steps that count (they were "
        f"held up for another {total.held:.0f} s by what ended nothing). "
        f"By [the formula](../guide-checkpoints.md#how-often-to-save) it is {total.formula:.1%}: "
        f"stall {total.stalls / total.saves:.2f} s, interval {total.intervals / total.saves:.2f} s, "
        f"restart {total.restarts / failures:.1f} s, MTTF {total.wall / failures:.1f} s."
    )
