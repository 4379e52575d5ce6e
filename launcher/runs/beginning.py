"""The activity of an attempt's ranks before its first step, in words, to be shown until a step is done."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.runs.places import PLACES, Place

_WORDS = {
    "starting": ("importing PyTorch and Transformers", ""),
    "preparing": ("reading rows", "so far"),
    "waiting for the preparation": ("waiting for rows read elsewhere", ""),
    "building operators": ("building operators", ""),
    "loading": ("loading the model", "tensors"),
    "checking the loss": ("checking the loss", ""),
    "compiling": ("compiling", ""),
    "restoring": ("reading the checkpoint", ""),
}
"""The words for each place, and the unit that is counted there."""
_IN_A_STEP = ("data", "forward", "backward", "exchange", "optimizer", "recording")


def doing(ranks: Sequence[Place], world_size: int | None) -> tuple[str, str] | None:
    """Return the activity of the least advanced rank, and how much of it is done (empty if nothing is counted).

    None once a step is done, while ranks do something that shows its own progress, such as an evaluation, and
    if they do not report it, as in a script.
    """
    if not ranks:
        return "starting: importing PyTorch", ""  # in the process that starts the ranks or forks them
    if world_size is not None and len(ranks) < world_size:
        return "starting ranks", f"{len(ranks)} of {world_size}"
    last = min(ranks, key=lambda one: (PLACES.index(one.place), one.done))
    if last.count == 0 or last.step > (last.first_step or 0):
        return None
    if last.place in _IN_A_STEP:
        return "the first step", ""
    if last.place not in _WORDS:
        return None
    words, unit = _WORDS[last.place]
    return words, f"{last.done:,} {unit}" if unit and last.done else ""
