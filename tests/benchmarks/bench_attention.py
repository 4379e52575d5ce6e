"""Attention over packed samples: one operator with a kernel for CPUs, and a loop over slices of the row, in turns.

    python tests/benchmarks/bench_attention.py

The loop is PyTorch's `scaled_dot_product_attention` for each sample on a slice of the row, joined again, as launcher
did before it had an operator. One thread; processor time; forward and backward apart.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from _report import ROOT, conditions, parser, sentence, table, write

sys.path.insert(0, str(ROOT))

PREFACE = """# Attention over packed samples on a CPU

`tests/benchmarks/bench_attention.py`: rows of 1,024 tokens with 9 heads of queries, 3 of keys, 64 wide (SmolLM2-135M), causal, one
thread. "Loop" is a fused call for each sample on a slice of the row, "operator" is `launcher/training/model/packed_kernel.py`. Both in
turns, round by round: processor time, medians; a ratio is the median of the rounds' own.
"""
TOKENS, HEADS, KEY_HEADS, WIDTH, ROUNDS = 1024, 9, 3, 64, 15
CASES = (("bf16", 64), ("bf16", 150), ("bf16", 512), ("fp32", 150), ("fp32", 512))
Attend = Callable[..., Any]


def looped(query: Any, key: Any, value: Any, ends: Any) -> Any:
    """A fused call for each sample."""
    import torch

    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor[:, :, begin:end] for tensor in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for begin, end in itertools.pairwise(ends.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def operator(query: Any, key: Any, value: Any, ends: Any) -> Any:
    """All samples in one."""
    from launcher.training.model.packed_kernel import packed

    return packed(query, key, value, ends, WIDTH**-0.5, True, None)[0]


def timed(attend: Attend, inputs: tuple[Any, ...]) -> tuple[float, float, Any]:
    """Processor seconds of a forward and of a backward pass, and the gradients."""
    import torch

    begun = time.process_time()
    result = attend(*inputs)
    between = time.process_time()
    gradients = torch.autograd.grad(result, inputs[:3], torch.ones_like(result))
    return between - begun, time.process_time() - between, gradients


def measured(precision: str, length: int) -> list[list[Any]]:
    """Rows of the table; the two ways' gradients are held to each other first."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ends = torch.tensor([*range(0, TOKENS, length), TOKENS], dtype=torch.int32)
    inputs = tuple(
        torch.randn(1, TOKENS, heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    for one, other in zip(*(timed(way, (*inputs, ends))[2] for way in (looped, operator)), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.1 if precision == "bf16" else 1e-4)
    rounds = [[timed(way, (*inputs, ends))[:2] for way in (looped, operator)] for _ in range(ROUNDS)]
    rows = []
    for number, name in enumerate(("forward", "backward")):
        loop, own = ([one[way][number] * 1e3 for one in rounds] for way in (0, 1))
        ratio = statistics.median(before / after for before, after in zip(loop, own, strict=True))
        medians = (f"{statistics.median(times):.1f}" for times in (loop, own))
        rows.append([precision, length, name, *medians, f"{ratio:.2f}"])
    return rows


def main() -> None:
    """Measure every case, and write the section."""
    import torch

    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = conditions("torch")
    rows = [row for case in CASES for row in measured(*case)]
    head = ["precision", "tokens of a sample", "pass", "loop, ms", "operator, ms", "loop / operator"]
    text = f"{sentence(found)}\n\n{table(head, rows)}"
    print(text)
    if not options.dry:
        print(write("attention", found["date"], text, {"conditions": found, "rows": rows}, PREFACE))


if __name__ == "__main__":
    main()
