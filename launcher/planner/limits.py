"""Sizes that the trainer and the planner's estimates share."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

DEFERRED_GRADIENT_BYTES = 4 << 30
"""FSDP: up to this size, a rank accumulates unsharded gradients over a step's micro-batches and reduces them
once. Above it, saving memory matters more."""
SHARED_MESSAGE_BYTES = 1 << 18
"""On a CPU: a message of at least this size between ranks of one machine goes through shared memory without a
copy. A smaller one goes through gloo, which is as fast for it."""
CHUNK_ELEMENTS = 1 << 24
"""Logits that the loss computes at a time on a CPU: 64 MiB in fp32."""
CHUNK_ELEMENTS_OF_GPU = 1 << 26
"""On a GPU: 256 MiB in fp32. Each chunk reads the full output matrix, too costly for fewer positions. Four
times as many would take 4.3 GB with a vocabulary of 128k, much for a card of 24 GB."""
NORM_ELEMENTS = 1 << 17
"""Elements of a gradient that a CPU converts to fp64 at a time, for their norm: 1 MiB, which stays in its
cache. A copy of a whole embedding took ten times as long."""
WIDENED_MOMENTS = 1 << 24
"""Elements of a bf16 moment that a step converts to fp32 at a time: 64 MiB."""
WIDENED_BYTES = 1 << 20
"""The same for a moment of 8 bits; a multiple of `MOMENT_BLOCK`."""
MOMENT_BLOCK = 256
"""Elements of a row whose 8-bit moments share a scale, as in bitsandbytes and torchao."""
MOMENT_TABLES = 2 * (1 << 16) + 4 * 4 * 256
"""Bytes of the tables of 8-bit codes, for both moments."""
_FEWEST_OF_BYTES = 4096
"""Elements of the smallest matrix whose moments are kept in 8 bits, as in bitsandbytes and torchao."""
WIDENED_AT_MOST = 1024
"""Tokens of the longest packed sample for which a CPU in half precision computes attention's backward pass in
fp32. The fused kernel's own backward pass in bf16 takes up to four times as long on short samples, and no
less up to here
(docs/benchmarks/speed.md)."""


def chunk_length(vocabulary: int, cuda: bool) -> int:
    """Return the number of positions whose logits are computed at a time."""
    return max(128, (CHUNK_ELEMENTS_OF_GPU if cuda else CHUNK_ELEMENTS) // vocabulary)


def in_bytes(shape: Sequence[int]) -> bool:
    """Return whether 8-bit moments of a parameter with this unsharded shape are stored as such; those of vectors
    and small matrices stay in fp32."""
    return len(shape) >= 2 and prod(shape) >= _FEWEST_OF_BYTES
