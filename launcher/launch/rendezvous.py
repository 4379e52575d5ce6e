"""Where the agents and ranks of an attempt meet, unreachable for others.

torchrun's own ways listen on every interface, and hold a pickle that the agent reads again and again: whoever
reaches the port runs code. On one machine nothing listens here. The agent's store is memory of its own, the
ranks' one is a file without a name that is opened through /proc, where other users are refused. On several
nodes the first one listens at the address where the others look for it, to them alone once they have come,
and the names in the store begin with the attempt's secret.
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
"""What torchrun calls this by (--rdzv-backend)."""
HERE = "this-machine"
"""The endpoint where there is one node: torchrun warns of one that is empty."""
_SECONDS_TO_MEET = 600


def register(node: int) -> None:
    """Tell torchrun of it. `node` is this agent's number among the attempt's."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    def make(parameters: Any) -> Any:
        return _Rendezvous(parameters, node)

    rendezvous_handler_registry.register(BACKEND, make)


class _Rendezvous:
    """Answer torchrun as a RendezvousHandler, for nodes that are known before and never change."""

    def __init__(self, parameters: Any, node: int) -> None:
        self._num_nodes, self._node, self._id = parameters.max_nodes, node, parameters.run_id
        self._endpoint = parameters.endpoint

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Return whether ranks are told that an agent's store is there for them."""
        return self._num_nodes > 1

    def next_rendezvous(self) -> Any:
        """Meet. Raises RankLostError where a stranger came too, OSError, and torch's DistNetworkError and
        DistStoreError."""
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
            # For a script that opens a store of its own; the launcher's ranks use neither address nor port.
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
            # A machine may know itself by a name that leads nowhere else; started by hand, no number is
            # given.
            own = socket.gethostbyname(address)
            bound = "0.0.0.0" if own.startswith("127.") else own
            listening = socket.create_server((bound, port), backlog=4096).detach()
            # It is there once every agent is: who has come by then may come again, and the ranks beside him.
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
        """The attempt's secret; where the agents are started by hand, the first one makes it. Raises
        TimeoutError."""
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
