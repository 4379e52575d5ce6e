"""The checkpoints' own gloo group, separate from training's collectives.

A save's background thread uses it while the main thread trains; collectives of two threads on one group would
mix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from launcher.errors import LauncherError, by_failure_class, one_line
from launcher.training import exchange

T = TypeVar("T")


class RefusedError(Exception):
    """The reason why a save cannot be done; its text is shown to users unchanged."""


def describe(error: BaseException) -> str:
    """Return an error as one readable line."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.strerror} ({Path(os.fsdecode(error.filename)).name})"
            if error.filename
            else error.strerror
        )
    return str(error) if isinstance(error, RefusedError) else one_line(error)


class Ranks:
    """The exchange of small JSON values between all ranks. With one rank nothing is sent, and no process group
    is needed.

    With more, a tuple arrives as a list.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.group = None
        if world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        return [value] if self.world_size == 1 else exchange.all_gather(value, self.group)

    def from_first(self, work: Callable[[], T]) -> T:
        """Return the result of `work` on rank 0, on every rank. An error there is raised on all ranks, with the
        same failure class."""
        if self.world_size == 1:
            return work()
        if self.rank > 0:
            value, problem = exchange.from_first(None, self.group)
            if problem is not None:
                raise _error(*problem)
            return cast(T, value)
        try:
            value = work()
        except Exception as error:
            exchange.from_first((None, _kind_and_arguments(error)), self.group)
            raise
        exchange.from_first((value, None), self.group)
        return value


def _kind_and_arguments(error: Exception) -> tuple[str, list[Any]]:
    if isinstance(error, LauncherError):
        return error.failure_class, [str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else os.fsdecode(error.filename)
        return "OSError", [error.errno, error.strerror, name]
    return "", [describe(error)]


def _error(kind: str, arguments: list[Any]) -> Exception:
    if kind == "OSError":
        return OSError(*arguments)
    return by_failure_class(kind)(*arguments) if kind else RefusedError(*arguments)
