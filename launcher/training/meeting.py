"""The rendezvous of ranks: the store of every process group.

The launcher's trainer and a script's libraries create process groups as usual, with `init_process_group()`.
torch then looks up a store from the environment; this module substitutes the attempt's store.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, urlparse

from launcher.runs import secret
from launcher.training import closing, gradient_messages, shared_messages

Found = Iterator[tuple[Any, int, int]]
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def prepare() -> None:
    """Make this process create its process groups through the attempt's store, and close their ports
    afterwards."""
    for name, change in changes().items():
        change(importlib.import_module(name))


def changes() -> dict[str, Callable[[ModuleType], None]]:
    """Return, by module name, the function that patches the module once it is imported."""
    return {
        "torch.distributed.rendezvous": _use_the_attempts_store,
        "torch.distributed.distributed_c10d": _change_groups,
        "torch.distributed.fsdp._fully_shard._fsdp_collectives": gradient_messages.put_off,
    }


def _change_groups(distributed: ModuleType) -> None:
    closing.shut_behind(distributed)
    shared_messages.use(distributed)


def _use_the_attempts_store(rendezvous: ModuleType) -> None:
    handlers = rendezvous._rendezvous_handlers
    if not isinstance(handlers["env"], functools.partial):
        given = {name: os.environ.get(name) for name in _ADDRESS}
        handlers["env"] = functools.partial(_meet, handlers["env"], given, itertools.count())


def _meet(
    otherwise: Callable[..., Found],
    given: dict[str, str | None],
    number: Iterator[int],
    url: str,
    timeout: timedelta = timedelta(minutes=30),
    **options: Any,
) -> Found:
    """Yield store, rank and world size, like torch's own handler of `env://`. That handler is still used for
    groups that are not the agent's."""
    by_agent = os.environ.keys() & {secret.STORE_VARIABLE, secret.SECRET_VARIABLE}
    if not by_agent or given != {name: os.environ.get(name) for name in _ADDRESS}:
        yield from otherwise(url, timeout=timeout, **options)
        return
    query = dict(parse_qsl(urlparse(url).query))
    rank, size = (int(query.get(name.lower(), os.environ[name])) for name in ("RANK", "WORLD_SIZE"))
    # A group created after another was destroyed must not see the keys that the other left behind.
    yield _store(f"group-{next(number)}", size, timeout), rank, size


def _store(name: str, size: int, timeout: timedelta) -> Any:
    from torch.distributed import FileStore, PrefixStore, TCPStore

    if path := os.environ.get(secret.STORE_VARIABLE):
        return PrefixStore(name, FileStore(path, size))
    word = secret.read(Path(os.environ[secret.SECRET_VARIABLE]))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(
        f"{word}/ranks/{name}", TCPStore(address, port, size, False, timeout, wait_for_workers=False)
    )
