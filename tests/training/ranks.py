"""Run a function on several gloo ranks and get back what each returned."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from launcher.training import shared_messages
from tests.ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
"""Forks processes of one that has imported what all ranks need; every test of a session has the same."""
CONTEXT.set_forkserver_preload(["tests.training.preloaded"])


PATIENCE_SECONDS = 800
"""A rank that says nothing for so long hangs. Compiling takes most of it on a busy machine."""


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each rank of a new gloo group, one thread each; what the ranks returned, in
    their order."""
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiving, sending = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(rank, world_size, port, sending, function, arguments))
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE_SECONDS):
                raise TimeoutError(f"rank {rank} said nothing for {PATIENCE_SECONDS} s")
            good, value = pipe.recv()
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results.append(torch.load(io.BytesIO(value), weights_only=False))
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return results


def _rank(
    rank: int,
    world_size: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    shared_messages.use(distributed_c10d)
    try:
        distributed.init_process_group("gloo")
        buffer = io.BytesIO()
        torch.save(
            function(*arguments), buffer
        )  # as bytes: tensors sent as such would live only as long as this process
        pipe.send((True, buffer.getvalue()))
        distributed.barrier()
    except BaseException:  # the parent shows it
        pipe.send((False, traceback.format_exc()))
    finally:
        distributed.destroy_process_group()
