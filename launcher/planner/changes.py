"""Changes that are allowed between two attempts of a run, and those that would make it another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan

ALLOWED = (
    "name",
    "engine",
    "sharding",
    "offload",
    "offload_to",
    "zero",
    "slurm",
    "precision",
    "activation_checkpointing",
    "attention",
    "layout",
    "head",
    "num_data_workers",
    "trackers",
    "tracking",
    "grace_seconds",
    "share_with_group",
    "hang_after",
    "length",
    "evaluate_every",
    "evaluation",
    "batch.micro_batch_size",
    "batch.accumulation_steps",
    "batch.data_parallel_size",
    "batch.balanced",
    "mesh",
    "model.attention",
    "model.compile",
    "model.trust_remote_code",
    "data.num_workers",
    "data.unusable",
    "data.positive_label",
    "training.epochs",
    "training.max_steps",
    "training.evaluate_every",
    "training.early_stopping",
    "training.skip_nonfinite",
    "training.on_spike",
    "checkpoint",
)
"""Keys for how and how long a run executes, and what it saves. All others decide what is learned, and
stay."""
_SAID_ELSEWHERE = {"format", "decisions", "refused", "task"}


@dataclass(frozen=True)
class Change:
    """One changed value of the plan; None if it was, or is, absent."""

    key: str
    before: Any
    after: Any

    @property
    def allowed(self) -> bool:
        return any(self.key == key or self.key.startswith(f"{key}.") for key in ALLOWED)


def changes(before: Plan, after: Plan) -> list[Change]:
    """Return every difference between two plans, by key."""
    old, new = before.flat(_SAID_ELSEWHERE), after.flat(_SAID_ELSEWHERE)
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def check(before: Plan, after: Plan) -> list[Change]:
    """Return the changes if all are allowed. Raises ConfigurationError with a problem for each that is
    not."""
    changed = changes(before, after)
    refused = [change for change in changed if not change.allowed]
    if refused:
        raise ConfigurationError([_problem(change) for change in refused], "this run was begun otherwise")
    return changed


def _problem(change: Change) -> Problem:
    before = "absent" if change.before is None else repr(change.before)
    reason = (
        f"was {before} when the run began, and decides what is learned; put it back, or begin another run "
        "with --run-dir"
    )
    return Problem(change.key, "absent" if change.after is None else change.after, reason)
