"""Start fresh CPU ranks for each measurement, as a job would have them.

What ran before in a process slows what comes after: an engine leaves its process groups behind, with gloo's
threads, and memory in pieces. A process that has imported everything once is copied for each rank instead,
which takes a moment.
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
    """Return what `work` returns on rank 0, of plain values and tensors, where it runs on as many ranks of
    one gloo group.

    `work` is a function of a module. Raises ProcessRaisedException with the traceback of a rank that fails,
    and ProcessExitedException.
    """
    multiprocessing.set_forkserver_preload([__name__, "launcher.training.fresh_imports", work.__module__])
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder, _accelerator("cpu"):
        started = (num_ranks, folder, work, arguments)
        ranks_of.start_processes(_rank, started, num_ranks, start_method="forkserver")
        return torch.load(Path(folder) / "result.pt", weights_only=True)


@contextlib.contextmanager
def _accelerator(name: str) -> Iterator[None]:
    """DeepSpeed asks for it while it is imported, once for all ranks; what this process starts later is none
    of theirs."""
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
            )  # the rank that failed is to be heard of first; then this one is ended
        raise


def leave() -> NoReturn:
    """End this rank, with all others: gloo's threads, of which some still run, would now and then abort an
    orderly end."""
    distributed.barrier()
    util._exit_function()  # type: ignore[attr-defined]
    os._exit(0)
