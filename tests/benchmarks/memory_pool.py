"""Ranks that are started once for each number of them, and then measure one case after another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.ports import free_port

PATIENCE_SECONDS = 300


def _serve(*arguments: Any) -> None:
    from tests.benchmarks.memory_ranks import serve

    serve(*arguments)


class World:
    """`world_size` ranks of one gloo group, to measure memory or `times`."""

    def __init__(self, world_size: int, times: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs, times), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned. After a failure the world is of no more use."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} said nothing for {PATIENCE_SECONDS} s")
            good, value = pipe.recv()
            if not good:
                self.close()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        """Have the ranks leave, or end them."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(3)
            if process.is_alive():
                process.kill()
