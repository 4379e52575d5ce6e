"""Count the elements that ZeRO-3 has gathered during each block of a pass, cached for later plans."""

from __future__ import annotations

from collections.abc import Hashable

from launcher.planner.memory.program import Segment, Unit, Weight
from launcher.planner.memory.zero3_prefetch import Coordinator, Key, Tracer
from launcher.planner.memory.zero_states import ZeroCut

_CACHE: dict[Hashable, dict[Key, int]] = {}
_MOST_CACHED = 32
"""Entries; each takes about 110 KB for a model of 126 layers."""


def gathered_elements(
    root: Unit, layers: list[Unit], cut: ZeroCut, segments: list[Segment]
) -> dict[Key, int]:
    """Return the elements gathered during each block, and at the end of the pass (`END`).

    They depend on the order of the blocks, not on their sizes. So they are the same for all micro-batches of
    one precision.
    """
    # gloo's limit for copies is in bytes, and elements depend on the precision of the computation.
    copied_below = cut.copied_below / cut.itemsize
    limits = (cut.prefetch_bucket, cut.persistence, cut.max_live, copied_below)
    weights = tuple(
        (weight.name, weight.shape, weight.viewed) for unit in (root, *layers) for weight in unit.weights
    )
    blocks = tuple((segment.kind, segment.layer, segment.backward) for segment in segments)
    key = (cut.ranks, *limits, cut.recomputes, cut.speaks, weights, blocks)
    if key not in _CACHE:
        if len(_CACHE) >= _MOST_CACHED:
            _CACHE.clear()
        head = output_embeddings(root) if cut.speaks else None
        trace = Tracer(root, layers, cut.persistence, head).trace(segments, cut.recomputes)
        external = frozenset({head.name} if head is not None else ())
        _CACHE[key] = Coordinator(
            trace, cut.prefetch_bucket, cut.max_live, cut.max_live, copied_below, external
        ).go()
    return _CACHE[key]


def output_embeddings(root: Unit) -> Weight | None:
    """Return the output embeddings: the last matrix with the shape of the first, the input embeddings; if
    tied, the first itself."""
    words = root.weights[0]
    matrices = [weight for weight in root.weights if len(weight.shape) > 1]
    return next((weight for weight in reversed(matrices) if weight.shape == words.shape), None)
