"""The rendezvous of an attempt's agents and ranks, which other users cannot reach.

torchrun's own backends listen on every interface, and store a pickle that the agent reads repeatedly: whoever
reaches the port can run code. Here nothing listens on a single machine. The agent's store is its own memory,
and the ranks' store is an unnamed file that is opened through /proc, which refuses other users. With several
nodes, the first one listens at the address that the others know, and admits only them once all have come. The
names in the store begin with the attempt's secret.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.errors import RankLostError
from launcher.runs import doors, secret

ATTEMPT_VARIABLE = "LAUNCHER_ATTEMPT_DIRECTORY"
BACKEND = "launcher"
"""The name of this backend for torchrun (--rdzv-backend)."""
HERE = "this-machine"
"""The endpoint for a single node: torchrun warns about an empty one."""
_SECONDS_TO_MEET = 600


def register(node: int) -> None:
    """Register this backend with torchrun. `node` is this agent's number in the attempt."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    def make(parameters: Any) -> Any:
        return _Rendezvous(parameters, node)

    rendezvous_handler_registry.register(BACKEND, make)


class _Rendezvous:
    """A RendezvousHandler for torchrun, for nodes that are known in advance and never change."""

    def __init__(self, parameters: Any, node: int) -> None:
        self._num_nodes, self._node, self._id = parameters.max_nodes, node, parameters.run_id
        self._endpoint = parameters.endpoint

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Return whether ranks use the agent's store."""
        return self._num_nodes > 1

    def next_rendezvous(self) -> Any:
        """Meet the other agents. Raises RankLostError if more machines came than the run has nodes, OSError, and
        torch's DistNetworkError and DistStoreError."""
        from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

        store, address, port = self._on_one_machine() if self._num_nodes == 1 else self._on_several()
        return RendezvousInfo(store, self._node, self._num_nodes, RendezvousStoreInfo(address, port))

    def _on_one_machine(self) -> tuple[Any, str, int]:
        from torch.distributed import HashStore

        file = os.memfd_create("launcher-store")
        os.fchmod(file, 0o600)
        os.environ[secret.STORE_VARIABLE] = f"/proc/{os.getpid()}/fd/{file}"
        os.environ.pop(secret.SECRET_VARIABLE, None)
        with socket.create_server(("127.0.0.1", 0)) as free:
            # For a script that opens its own store; launcher's ranks use neither address nor port.
            return HashStore(), "127.0.0.1", free.getsockname()[1]

    def _on_several(self) -> tuple[Any, str, int]:
        from torch.distributed import PrefixStore, TCPStore

        os.environ.pop(secret.STORE_VARIABLE, None)
        word = secret.read(self._secret())
        address, _, number = self._endpoint.rpartition(":")
        port, timeout = int(number), timedelta(seconds=_SECONDS_TO_MEET)
        if self._node > 0:
            store = TCPStore(address, port, self._num_nodes, False, timeout)
        else:
            # A machine's own name may resolve to loopback, and agents started by hand may be given a name, not
            # a number.
            own = socket.gethostbyname(address)
            bound = "0.0.0.0" if own.startswith("127.") else own
            listening = socket.create_server((bound, port), backlog=4096).detach()
            # The store returns once every agent has joined: from then on only their hosts may connect.
            store = TCPStore(address, port, self._num_nodes, True, timeout, master_listen_fd=listening)
            callers = doors.callers((bound, port))
            if len(callers) > self._num_nodes:
                shown = ", ".join(sorted(callers))
                raise RankLostError(
                    f"{len(callers)} machines came to meet for a run on {self._num_nodes} nodes: {shown}"
                )
            doors.admit(listening, callers)
        return PrefixStore(f"{word}/agents", store), address, port

    def _secret(self) -> Path:
        """Return the path of the attempt's secret; if the agents are started by hand, the first one creates it.
        Raises TimeoutError."""
        path = Path(os.environ.get(secret.SECRET_VARIABLE) or Path(os.environ[ATTEMPT_VARIABLE], secret.NAME))
        os.environ[secret.SECRET_VARIABLE] = str(path)
        if self._node == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            secret.make(path.parent)
        until = time.monotonic() + _SECONDS_TO_MEET
        while not path.exists():
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{path} did not come: is the first node started, and is this directory the same there?"
                )
            time.sleep(0.1)
        return path

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody joins later."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return str(self._id)

    def shutdown(self) -> bool:
        return True
