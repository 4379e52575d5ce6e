"""The plan of each rank's part of a save, computed once for the same shapes and shardings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from launcher.training.checkpoint import messages
from launcher.training.checkpoint.group import Ranks, RefusedError, describe
from launcher.training.checkpoint.storage import FileLayout, Image, TensorPlanner, global_plan

Tensors = dict[str, torch.Tensor]


@dataclass
class Layout:
    """This rank's part of a save, with the key of the tensors for which it was planned."""

    key: tuple[object, ...]
    planner: TensorPlanner
    file: FileLayout
    metadata: bytes
    """The content of `.metadata`; empty on all ranks except 0."""
    image: Image | None = None


def plan_save(tensors: Tensors, ranks: Ranks, known: Layout | None) -> Layout:
    """Return this rank's layout for saving the tensors: the known one, if their properties are unchanged.

    Otherwise this is collective. Raises RefusedError on all ranks if one of them cannot plan.
    """
    properties = ("dtype", "shape", "placements")
    key = tuple((name, *(getattr(one, kind, None) for kind in properties)) for name, one in tensors.items())
    if known is not None and known.key == key:
        return known
    planner = TensorPlanner()
    problem, local = None, dict[str, Any]()
    try:  # as JSON: a plan that cannot be converted is a problem too
        local = messages.of_plan(planner.local_plan(tensors, is_coordinator=ranks.rank == 0))
    except Exception as error:
        problem = describe(error)
    gathered = ranks.all_gather((problem, local))
    metadata = b""

    def decide() -> list[Any]:
        nonlocal metadata
        for rank, (reason, _) in enumerate(gathered):
            if reason is not None:
                raise RefusedError(reason if rank == 0 else f"rank {rank}: {reason}")
        plans, metadata = global_plan(planner, [messages.plan(value) for _, value in gathered])
        return [messages.of_plan(plan) for plan in plans]

    own = messages.plan(ranks.from_first(decide)[ranks.rank])
    return Layout(key, planner, FileLayout.of(ranks.rank, own.items), metadata)
