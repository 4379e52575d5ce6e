"""Closing of gloo's listening ports once all peers have connected.

gloo does not authenticate. Anyone who sends the number of a connection that is still awaited takes that rank's
place, reads its peer's messages and can forge replies. The numbers are small and count up.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

from launcher.errors import RankLostError
from launcher.runs import doors
from launcher.training import shared_messages

_LAZY = "TORCH_GLOO_LAZY_INIT"


def shut_behind(distributed: ModuleType) -> None:
    """Make each gloo group that this process creates close its ports. `distributed` is the module
    torch.distributed.distributed_c10d."""
    group = getattr(distributed, "ProcessGroupGloo", None)
    if group is None or hasattr(group.__init__, "__wrapped__"):
        return
    make = group.__init__

    @functools.wraps(make)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        before = {one.descriptor for one in doors.listening()}
        make(self, *arguments, **options)
        if os.environ.get(_LAZY, "0") in ("0", ""):  # else peers connect lazily, at the first message
            _shut([one for one in doors.listening() if one.descriptor not in before])

    group.__init__ = __init__


def stay_here() -> None:
    """Restrict the process groups of this process, all within one machine: they listen on loopback only,
    close their ports, and pass large messages through shared memory."""
    from torch.distributed import (
        distributed_c10d,
    )  # not above: a script may set variables before it imports torch

    os.environ.update(dict.fromkeys(doors.INTERFACE_VARIABLES, here) if (here := doors.loopback()) else {})
    shut_behind(distributed_c10d)
    shared_messages.use(distributed_c10d)


def _shut(new: list[doors.Listening]) -> None:
    """Close these listening ports. Raises RankLostError if another user connected before the peers did."""
    for one in new:
        doors.admit(one.descriptor)
    if users := doors.strangers({one.place for one in new}):
        whose = ", ".join(map(str, sorted(users)))
        raise RankLostError(
            f"another user of this machine (uid {whose}) connected to a port on which this rank waited "
            "for its peers"
        )
