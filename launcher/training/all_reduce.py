"""One rank of the all-reduce that `launcher doctor` runs.

    python -m launcher.training.all_reduce BACKEND SECONDS

Rank, size and where to meet are in the environment, as torch.distributed reads them, and what the names in
their store begin with.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time

from launcher.runs.processes import die_with_parent
from launcher.runs.secret import PREFIX_VARIABLE

_NUM_ELEMENTS = 4 << 20
_REPEATS = 3


def main(arguments: list[str]) -> int:
    """The exit code; SIGALRM ends the process where the ranks have not added up in time, wherever in native
    code it waits."""
    die_with_parent()
    backend, seconds = arguments[0], int(arguments[1])
    before = time.perf_counter()
    import torch.distributed  # noqa: F401

    print(json.dumps({"import_seconds": time.perf_counter() - before}), flush=True)
    sys.stdin.readline()
    signal.alarm(seconds)
    try:
        print(json.dumps(add_up(backend, seconds)), flush=True)
    except Exception as error:  # whatever it was, it is what people want to know
        print(
            json.dumps(
                {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            ),
            flush=True,
        )
        return 1
    return 0


def add_up(backend: str, seconds: int) -> dict[str, float | str]:
    """Sums a vector over all ranks, and says how long it took; a wrong sum is a problem."""
    import datetime
    import os

    import torch
    import torch.distributed as distributed
    from torch.distributed import distributed_c10d

    from launcher.training import closing

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    before = time.perf_counter()
    closing.shut_behind(distributed_c10d)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # By itself the store would listen on every interface.
    listening = socket.create_server((address, port), backlog=4096).detach() if rank == 0 else None
    store = distributed.TCPStore(
        address, port, size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening
    )
    named = distributed.PrefixStore(os.environ[PREFIX_VARIABLE], store)
    distributed.init_process_group(backend, store=named, rank=rank, world_size=size, timeout=timeout)
    vector = torch.full((_NUM_ELEMENTS,), float(rank + 1), device=device)
    distributed.all_reduce(vector)
    together = time.perf_counter() - before
    expected = size * (size + 1) / 2
    if not bool((vector == expected).all()):
        return {"problem": f"the sum is {vector[0].item():g} and not {expected:g}"}
    before = time.perf_counter()
    for _ in range(_REPEATS):
        distributed.all_reduce(vector)
    vector[0].item()
    each = (time.perf_counter() - before) / _REPEATS
    distributed.destroy_process_group()
    return {"seconds": together, "bytes_per_second": 4 * _NUM_ELEMENTS / each}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
