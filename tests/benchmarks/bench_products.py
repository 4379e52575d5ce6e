"""Products in bf16 and fp16 on this CPU: PyTorch's own way, by way of fp32, and fp32 itself, on one thread.

    python tests/benchmarks/bench_products.py

The shapes are those of SmolLM2-135M at 512 tokens. Writes docs/benchmarks/products.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _report import conditions, sentence, table, write
from torch.nn import functional

from launcher.training import cpu_half_matmul
from launcher.training.precision import DTYPES

PREFACE = """# Half precision on a processor without units for it

`tests/benchmarks/bench_products.py`: matrix products of SmolLM2-135M at 512 tokens on one thread, and attention over them. What stands
under "by fp32" is what ranks on such a processor do (`launcher/training/cpu_half_matmul.py`): numbers are widened a block at a time, multiplied,
and rounded once.
"""
SHAPES = {
    "query": (512, 576, 576),
    "feed-forward": (512, 576, 1536),
    "and back": (512, 1536, 576),
    "a part of the head": (341, 576, 4096),
}
ROUNDS, PATIENCE_SECONDS = 6, 2.0
Times = dict[str, dict[str, float]]


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls: what else the machine does only adds. A call that takes seconds
    is made once."""
    found = []
    while len(found) < ROUNDS and sum(found) < PATIENCE_SECONDS:
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def rates(dtype: torch.dtype) -> Times:
    """GFLOP/s of each shape: forward, gradient of the input, gradient of the weight; and milliseconds of
    attention with its gradient."""
    found: Times = {}
    for name, (rows, inner, columns) in SHAPES.items():
        left, weight, gradient = (
            torch.randn(shape).to(dtype) for shape in ((rows, inner), (columns, inner), (rows, columns))
        )
        works = {
            "forward": lambda left=left, weight=weight: left @ weight.t(),
            "input": lambda gradient=gradient, weight=weight: gradient @ weight,
            "weight": lambda gradient=gradient, left=left: gradient.t() @ left,
        }
        found[name] = {kind: 2e-9 * rows * inner * columns / fastest(work) for kind, work in works.items()}
    query, key = (torch.randn(1, heads, 512, 64).to(dtype).requires_grad_() for heads in (9, 3))

    def attend() -> None:
        functional.scaled_dot_product_attention(
            query, key, key, is_causal=True, enable_gqa=True
        ).sum().backward()

    found["attention"] = {"forward and backward": 1e3 * fastest(attend)}
    return found


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = conditions("torch")
    sides: dict[str, Times] = {"fp32": rates(torch.float32)}
    half = {name: dtype for name, dtype in DTYPES.items() if name != "fp32"}
    sides |= {f"{name}, PyTorch": rates(dtype) for name, dtype in half.items()}
    sides |= {
        f"{name}, by fp32": rates(dtype) for name, dtype in half.items() if cpu_half_matmul.widen(dtype)
    }
    figures: dict[str, Any] = {"conditions": found, "rates": sides}
    print(
        write(
            "products",
            f"{found['processor']}, {found['date']}",
            f"{sentence(found)}\n\n{describe(sides)}",
            figures,
            PREFACE,
        )
    )


def describe(sides: Times | Any) -> str:
    """GFLOP/s by shape and direction, a column for each side."""
    rows = [
        [f"{name}: {kind}", *(f"{side[name][kind]:.1f}" for side in sides.values())]
        for name, kinds in next(iter(sides.values())).items()
        for kind in kinds
        if name != "attention"
    ]
    rows.append(
        [
            "attention, forward and backward, ms",
            *(f"{side['attention']['forward and backward']:.1f}" for side in sides.values()),
        ]
    )
    return table(["GFLOP/s", *sides], rows)


if __name__ == "__main__":
    main()
