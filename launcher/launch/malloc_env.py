"""Choose how much memory ranks on a CPU keep: of what was freed, and of the code of products."""

from __future__ import annotations

import contextlib

from launcher.plain_files import read_json
from launcher.planner.memory.limits import keeps_freed
from launcher.runs.layout import RunDirectory

_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""PyTorch asks the system for pages of 2 MiB under tensors that are as large: a page costs the system the
same, whatever its size.

What it saves: docs/benchmarks/allocator.md. Where the system gives such pages always, or never, it changes
nothing."""
_FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""oneDNN makes code for every shape of a product in bf16, and it and PyTorch each keep the code and what it
needs of the last 1,024 by default: 700 MiB that no plan knows of, where samples have many lengths.

What it saves: docs/benchmarks/many_lengths.md. Models of seconds a step are no slower: tried with 8 and with 64
samples a pass."""
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(2 << 20), **_HUGE_PAGES, **_FEW_SHAPES}
"""Blocks from 2 MiB on go back to the system when they are freed: those that come in huge pages.

glibc raises its own threshold to 32 MiB as soon as large blocks come and go, and keeps what lies between: a
rank of SmolLM2-135M peaked at 2.96 GB with that, at 1.75 GB with a fixed 1 MiB (2 ranks, fp32, 512 tokens a
pass, full recomputation)."""
ROOMY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    "MALLOC_ARENA_MAX": "1",
    **_HUGE_PAGES,
    **_FEW_SHAPES,
}
"""Blocks below 4 MiB stay, for all threads alike: the system has to zero each page that it gives.

docs/benchmarks/allocator.md has what both take and hold."""


def variables(run: RunDirectory) -> dict[str, str]:
    """Return the variables of the environment of ranks on a CPU: ROOMY where the forecast says that there is
    room, LEAN where there is not, or nobody knows."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        forecast = read_json(run.forecast_file)
        highest = max(phase["live"] for phase in forecast["phases"].values())
        return dict(ROOMY if keeps_freed(highest, forecast["memory_bytes"]) else LEAN)
    return dict(LEAN)
