"""Say in words what an attempt's ranks are at before its first step: for the minute in which no step moves."""

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
"""By place: what people would call it, and what is counted there."""
_IN_A_STEP = ("data", "forward", "backward", "exchange", "optimizer", "recording")


def doing(ranks: Sequence[Place], world_size: int | None) -> tuple[str, str] | None:
    """Return what the rank that is least far is at, and how much of it is done (empty where nothing is counted).

    None once a step is done, while ranks are at something that shows its own progress, as an evaluation, and
    where they do not tell, as those of a script.
    """
    if not ranks:
        return "starting: importing PyTorch", ""  # the process that starts them, or that they are forked from
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
