"""Workspace that a kernel allocates and frees within itself, which no tensor of the model shows."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.planner.limits import WIDENED_AT_MOST

PACKED_AT_MOST = 3 << 19
"""Bytes of the blocks into which oneDNN copies its operands in half precision: up to 1.4 MB was seen
(torch 2.13, avx512_bf16)."""


def packed_bytes(rows: int, num_out: int) -> int:
    """Return a CPU's workspace in bytes for a weight's gradient in half precision, the product [out, rows] x
    [rows, in].

    It holds a block of each operand, at most 256 outputs and 64 inputs, and their sum in fp32. Fitted to 34
    products from 40 x 48 x 96 to 512 x 2,048 x 8,192: within a tenth up to 600 rows, mostly too high above.
    """
    block = num_out / -(-num_out // 256)
    return min(PACKED_AT_MOST, int(1.05 * (2 * rows * (block + 64) + 256 * block)))


def attention_bytes(
    lengths: Sequence[int],
    width: int,
    key_width: int,
    heads: int,
    size: int,
    cuda: bool,
    widened: bool = False,
) -> tuple[int, int]:
    """Return the bytes of attention's workspace for packed samples, forward and backward.

    `width` and `key_width` are the elements of a token's queries and keys. A CPU holds one sample's results
    in addition to the row's, and its inputs if they are widened (launcher/training/model/packed_kernel.py). A
    GPU's backward kernel accumulates the queries' gradient in fp32, and makes gradients of keys and values
    for each query head (FlashAttention-2). A CPU's kernel has a block of scores in fp32 and its sums for each
    thread, of which one is counted; the backward pass has a second block, of gradients
    (FlashAttentionKernel.cpp, torch 2.13). widened: the CPU has no units for half precision, and computes
    attention in fp32 (launcher/training/cpu_half_matmul.py).
    """
    longest, tokens = max(lengths), sum(lengths)
    if cuda:
        grouped = 2 * size * width if key_width < width else 0
        return 0, tokens * (4 * width + grouped)
    rows = min(longest, 256 if longest >= 768 else 64 if longest >= 192 else 32)
    scores = 4 * rows * min(longest, 512)
    wide = size if size > 2 or (longest > WIDENED_AT_MOST and not widened) else 4
    copies = 0 if wide == size else 3 * width + 2 * key_width
    forward = longest * (size * width + 4 * heads) + scores + 4 * rows * (2 + width // heads)
    if widened:
        forward += longest * (4 * (width + 2 * key_width) + (4 - size) * width)  # inputs; the result
    return forward, longest * wide * (width + 2 * key_width + copies) + 2 * scores
