"""Reports on what a rank is doing, from hooks in PyTorch and transformers: waiting, compiling, loading."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch._C._distributed_c10d import Work
from transformers import core_model_loading

from launcher.runs.places import here


class Waited:
    """The seconds that this process's main thread has waited for other ranks, since `watch` was first called.

    It is the time in `Work.wait`, in which every collective of FSDP and DeepSpeed ends on a CPU. On a GPU a
    wait is only queued.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._wait: Any = None

    def watch(self) -> None:
        """Start counting; a second call changes nothing."""
        if self._wait is not None:
            return
        original = self._wait = Work.wait
        main = threading.main_thread().ident

        @functools.wraps(original)
        def wait(work: Any, *arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != main:
                return original(work, *arguments, **named)
            here.waits(1)
            began = time.perf_counter()
            try:
                return original(work, *arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began
                here.waits(-1)

        Work.wait = wait  # type: ignore[method-assign, assignment]


waited = Waited()
"""The waiting time of this process."""


def say_compiling() -> None:
    """Make PyTorch's compiler report when it works: it may compile at any step, for minutes."""
    from torch._dynamo.callback import callback_handler

    compiling = contextlib.ExitStack()

    def begin(_: Any) -> None:
        compiling.enter_context(here.during("compiling"))

    def end(_: Any) -> None:
        compiling.close()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)


@contextlib.contextmanager
def tensors_counted() -> Iterator[None]:
    """Make from_pretrained report each parameter that it has read, inside."""
    original = core_model_loading.set_param_for_module

    def set_param(model: Any, name: str, *rest: Any, **named: Any) -> Any:
        here.moved(detail=name)
        return original(model, name, *rest, **named)

    core_model_loading.set_param_for_module = set_param
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = original
