"""Bytes that a kernel takes and gives back within itself, which no tensor of the model's shows."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.planner.limits import WIDENED_AT_MOST

PACKED_AT_MOST = 3 << 19
"""Bytes of the blocks in which oneDNN copies what it multiplies in half precision: up to 1.4 MB was seen
(torch 2.13, avx512_bf16)."""


def packed_bytes(rows: int, num_out: int) -> int:
    """Return the bytes that the product [out, rows] x [rows, in] of a weight's gradient takes for itself on a
    CPU in half precision.

    A block of each side, at most 256 of the outputs and 64 of the inputs, and their sum in fp32. Read off 34
    products from 40 x 48 x 96 to 512 x 2,048 x 8,192: up to 600 rows within a tenth, above mostly over.
    """
    block = num_out / -(-num_out // 256)
    return min(PACKED_AT_MOST, int(1.05 * (2 * rows * (block + 64) + 256 * block)))


def attention_bytes(
    lengths: Sequence[int], width: int, key_width: int, heads: int, size: int, cuda: bool
) -> tuple[int, int]:
    """Return what attention over packed samples takes and gives back within itself, forward and backward.

    `width` and `key_width` are the numbers of a token's queries and keys. A CPU has one sample's results beside
    the row's, and to widen it its inputs (launcher/training/model/packed_kernel.py). A GPU's backward kernel
    adds up the queries' gradient in fp32, and makes one of keys and values for each head of queries
    (FlashAttention-2). A CPU's kernel has a block of scores in fp32 for each thread, one thread of which is
    counted, with what it adds up of them; going back a second one of their gradients (FlashAttentionKernel.cpp,
    torch 2.13).
    """
    longest, tokens = max(lengths), sum(lengths)
    if cuda:
        grouped = 2 * size * width if key_width < width else 0
        return 0, tokens * (4 * width + grouped)
    rows = min(longest, 256 if longest >= 768 else 64 if longest >= 192 else 32)
    scores = 4 * rows * min(longest, 512)
    wide = size if size > 2 or longest > WIDENED_AT_MOST else 4
    copies = 0 if wide == size else 3 * width + 2 * key_width
    forward = longest * (size * width + 4 * heads) + scores + 4 * rows * (2 + width // heads)
    return forward, longest * wide * (width + 2 * key_width + copies) + 2 * scores
