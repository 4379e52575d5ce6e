"""One rank of the all-reduce that `launcher doctor` runs.

    python -m launcher.training.all_reduce DIRECTORY BACKEND SECONDS

Rank, world size and rendezvous address come from the environment, as for any rank under the agent. A failure
is recorded in DIRECTORY.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

from launcher.errors import LauncherError
from launcher.runs import failure
from launcher.runs.processes import die_with_parent

_NUM_ELEMENTS = 4 << 20
_REPEATS = 3


def main(arguments: list[str]) -> int:
    """Return the exit code. SIGALRM ends the process, wherever it waits, if the all-reduce takes longer than
    SECONDS."""
    die_with_parent()
    directory, backend, seconds = Path(arguments[0]), arguments[1], int(arguments[2])
    try:
        before = time.perf_counter()
        import torch.distributed  # noqa: F401

        imported = time.perf_counter() - before
        signal.alarm(seconds)
        print(json.dumps({"import_seconds": imported, **add_up(backend, seconds)}), flush=True)
    except Exception as error:  # any failure is what the user wants to see
        failure.record(directory, int(os.environ["RANK"]), error)
        return 1
    return 0


def add_up(backend: str, seconds: int) -> dict[str, float]:
    """Sum a vector over all ranks and return the time taken. Raises LauncherError if the sum is wrong."""
    import torch
    from torch import distributed

    from launcher.training import meeting

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    meeting.prepare()
    before = time.perf_counter()
    distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    size = distributed.get_world_size()
    vector = torch.full((_NUM_ELEMENTS,), float(distributed.get_rank() + 1), device=device)
    distributed.all_reduce(vector)
    together = time.perf_counter() - before
    expected = size * (size + 1) / 2
    if not bool((vector == expected).all()):
        raise LauncherError(f"the sum is {vector[0].item():g} and not {expected:g}")
    before = time.perf_counter()
    for _ in range(_REPEATS):
        distributed.all_reduce(vector)
    vector[0].item()
    each = (time.perf_counter() - before) / _REPEATS
    distributed.destroy_process_group()
    return {"seconds": together, "bytes_per_second": 4 * _NUM_ELEMENTS / each}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
