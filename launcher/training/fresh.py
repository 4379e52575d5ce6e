"""Fresh CPU ranks for each benchmark, like those of a job.

Earlier work slows later work in the same process: an engine leaves process groups, gloo threads and fragmented
memory behind. So each rank is forked from a server process that has imported everything once, which is fast.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed
from torch import multiprocessing as ranks_of
from transformers.utils import logging

from launcher.runs.error_class import classify
from launcher.training import closing

_SECONDS_TO_BE_ENDED = 10.0


def in_fresh_ranks(work: Callable[..., Any], arguments: tuple[Any, ...], num_ranks: int) -> Any:
    """Run `work` on `num_ranks` ranks of one gloo group; return rank 0's result (plain values and tensors).

    `work` is a module-level function. Raises ProcessRaisedException with the traceback of a failed rank, and
    ProcessExitedException.
    """
    multiprocessing.set_forkserver_preload([__name__, "launcher.training.fresh_imports", work.__module__])
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder, _accelerator("cpu"):
        started = (num_ranks, folder, work, arguments)
        ranks_of.start_processes(_rank, started, num_ranks, start_method="forkserver")
        return torch.load(Path(folder) / "result.pt", weights_only=True)


@contextlib.contextmanager
def _accelerator(name: str) -> Iterator[None]:
    """Set DS_ACCELERATOR within this context. DeepSpeed reads it once, when the fork server imports it; later
    processes of this one must not inherit it."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = before or name
    try:
        yield
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]


def _rank(
    rank: int, num_ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    closing.stay_here()
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    try:
        result = work(*arguments)
        if rank == 0:
            torch.save(result, Path(folder) / "result.pt")
        leave()
    except RuntimeError as error:
        if classify(error)[1]:
            time.sleep(
                _SECONDS_TO_BE_ENDED
            )  # this failure follows from another rank's, which must be reported first and ends this rank
        raise


def leave() -> NoReturn:
    """End this rank together with all others, by os._exit: in an orderly exit, gloo threads that still run
    sometimes abort the process."""
    distributed.barrier()
    util._exit_function()  # type: ignore[attr-defined]
    os._exit(0)
