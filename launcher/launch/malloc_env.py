"""Environment variables that set how much freed memory, and how many kernels of products, CPU ranks keep."""

from __future__ import annotations

import contextlib

from launcher.plain_files import read_json
from launcher.planner.memory.limits import keeps_freed
from launcher.runs.layout import RunDirectory

_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""PyTorch requests 2 MiB pages for tensors of at least that size: a page costs the system the same, whatever
its size.

docs/benchmarks/allocator.md has the savings. If the system always or never gives huge pages, nothing changes."""
_FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""oneDNN generates code for every shape of a bf16 product. By default it and PyTorch each keep the code and the
buffers of the last 1,024: 700 MiB that no plan counts, if samples have many lengths.

docs/benchmarks/many_lengths.md has the savings. Models that take seconds per step are no slower: tried with
micro-batches of 8 and of 64 samples."""
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(2 << 20), **_HUGE_PAGES, **_FEW_SHAPES}
"""Variables with which freed blocks of 2 MiB or more, those in huge pages, go back to the system.

glibc raises its own threshold to 32 MiB once large blocks are freed, and then keeps smaller ones: a rank of
SmolLM2-135M peaked at 2.96 GB with that, at 1.75 GB with a fixed 1 MiB (2 ranks, fp32, 512 tokens per
micro-batch, full activation checkpointing)."""
ROOMY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    "MALLOC_ARENA_MAX": "1",
    **_HUGE_PAGES,
    **_FEW_SHAPES,
}
"""Variables with which freed blocks below 4 MiB are kept, in one arena for all threads: the system has to zero
each page that it gives.

docs/benchmarks/allocator.md has the time and memory of both."""


def variables(run: RunDirectory) -> dict[str, str]:
    """Return the environment variables of ranks on a CPU: ROOMY if the forecast leaves room, LEAN if it does not
    or there is no forecast."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        forecast = read_json(run.forecast_file)
        highest = max(phase["live"] for phase in forecast["phases"].values())
        return dict(ROOMY if keeps_freed(highest, forecast["memory_bytes"]) else LEAN)
    return dict(LEAN)
