"""Sizes that the trainer keeps to and the planner counts with."""

from __future__ import annotations

DEFERRED_GRADIENT_BYTES = 4 << 30
"""FSDP: up to this size a rank adds gradients up unsharded over the micro-batches of a step and sends them once;
above it, memory is worth more."""
SHARED_MESSAGE_BYTES = 1 << 18
"""On a CPU: a message of at least this size between ranks of one machine goes through shared memory, where
nothing copies it; a smaller one through gloo, which is as quick there."""
CHUNK_ELEMENTS = 1 << 24
"""Logits that the loss holds at a time: 64 MiB in fp32."""


def chunk_length(vocabulary: int) -> int:
    """Return the positions whose logits are held at a time."""
    return max(128, CHUNK_ELEMENTS // vocabulary)
