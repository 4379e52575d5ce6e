"""Sizes that the trainer keeps to and the planner counts with."""

from __future__ import annotations

DEFERRED_GRADIENT_BYTES = 4 << 30
"""FSDP: up to this size a rank adds gradients up unsharded over the micro-batches of a step and sends them once;
above it, memory is worth more."""
SHARED_MESSAGE_BYTES = 1 << 18
"""On a CPU: a message of at least this size between ranks of one machine goes through shared memory, where
nothing copies it; a smaller one through gloo, which is as quick there."""
CHUNK_ELEMENTS = 1 << 24
"""Logits that the loss holds at a time on a CPU: 64 MiB in fp32."""
CHUNK_ELEMENTS_OF_GPU = 1 << 26
"""On a GPU: 256 MiB in fp32. Each chunk reads the whole output matrix, which fewer positions would not pay for;
four times as many would take 4.3 GB with a vocabulary of 128k, much beside a card of 24 GB."""
WIDENED_MOMENTS = 1 << 24
"""Numbers of a moment in bf16 that a step has in fp32 at a time: 64 MiB."""
WIDENED_AT_MOST = 1024
"""Tokens of the longest packed sample whose attention's backward pass a CPU computes in fp32, in half precision.
The fused kernel's own in bf16 takes up to four times as long on short samples, and no less up to here
(docs/benchmarks/speed.md)."""


def chunk_length(vocabulary: int, cuda: bool) -> int:
    """Return the positions whose logits are held at a time."""
    return max(128, (CHUNK_ELEMENTS_OF_GPU if cuda else CHUNK_ELEMENTS) // vocabulary)
