"""Messages between ranks of one machine: through shared memory and through gloo alone, in turns.

    python tests/benchmarks/bench_messages.py

Every round sends each message both ways on the same ranks. Wall time is that of the slowest rank, processor time
the mean of the ranks'.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from _report import ROOT, conditions, parser, sentence, table, write

sys.path.insert(0, str(ROOT))

PREFACE = """# Messages between ranks of one machine

`tests/benchmarks/bench_messages.py`: all-gather and reduce-scatter as FSDP and ZeRO send them, through shared memory
(`launcher/training/shared_messages.py`) and through gloo alone, in turns on the same ranks; medians. All-reduce has
no such way: tried on 2026-11-29, it took 1.05 to 1.3 times gloo's time for 128 MiB.
"""
KIBIBYTES = (64, 256, 1024, 8192, 131_072)
ROUNDS = 7
Times = dict[str, dict[str, list[tuple[float, float]]]]


def on_rank(kibibytes: int) -> Times:
    """Wall and processor seconds of each message, each way, round by round."""
    import torch
    from torch import distributed
    from torch.distributed import ReduceOp

    from launcher.training import shared_messages

    size = distributed.get_world_size()
    part = torch.randn(kibibytes * 256 // size)
    whole, output = torch.randn(part.numel() * size), torch.empty_like(part)
    messages: dict[str, Any] = {
        "all-gather": lambda: distributed.all_gather_single(whole, part),
        "reduce-scatter": lambda: distributed.reduce_scatter_single(output, whole, op=ReduceOp.AVG),
    }
    times: Times = {name: {"shared memory": [], "gloo": []} for name in messages}
    for _ in range(ROUNDS):
        for name, message in messages.items():
            for way, least in (("shared memory", 1 << 10), ("gloo", 1 << 60)):
                shared_messages.SHARED_MESSAGE_BYTES = least
                distributed.barrier()
                wall, busy = time.perf_counter(), time.process_time()
                message()
                times[name][way].append((time.perf_counter() - wall, time.process_time() - busy))
    return times


def measured(num_ranks: int, kibibytes: int) -> list[list[Any]]:
    """Rows of the table."""
    from tests.training.ranks import on_ranks

    results: list[Times] = on_ranks(num_ranks, on_rank, kibibytes)
    rows = []
    for name in results[0]:
        row: dict[str, tuple[float, float]] = {}
        for way in ("gloo", "shared memory"):
            rounds = list(zip(*(result[name][way] for result in results), strict=True))
            row[way] = (
                statistics.median(max(wall for wall, _ in one) for one in rounds) * 1e3,
                statistics.median(statistics.mean(busy for _, busy in one) for one in rounds) * 1e3,
            )
        (wall, busy), (own_wall, own_busy) = row["gloo"], row["shared memory"]
        rows.append(
            [
                num_ranks, f"{kibibytes:,}", name, f"{wall:.2f}", f"{own_wall:.2f}", f"{wall / own_wall:.2f}",
                f"{busy:.2f}", f"{own_busy:.2f}", f"{busy / own_busy:.2f}",
            ]
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure on two ranks and on three, and write the section."""
    options = parser(__doc__).parse_args()
    found = conditions("torch")
    rows = [row for ranks in (2, 3) for kibibytes in KIBIBYTES for row in measured(ranks, kibibytes)]
    head = ["ranks", "KiB", "message", "gloo, ms", "shared, ms", "ratio"]
    text = f"{sentence(found)}\n\n{table([*head, 'gloo, CPU ms', 'shared, CPU ms', 'ratio'], rows)}"
    print(text)
    if not options.dry:
        print(write("messages", found["date"], text, {"conditions": found, "rows": rows}, PREFACE))


if __name__ == "__main__":
    main()
