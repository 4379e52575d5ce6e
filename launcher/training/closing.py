"""Close gloo's listening ports once all peers have connected.

gloo asks nobody who connects for a name: who says the number of a connection that is still awaited takes that
rank's place, reads what its peer sends and answers what it likes. The number is small, and counts up.
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
    """Have each gloo group that this process makes shut its ports. Takes the module
    torch.distributed.distributed_c10d."""
    group = getattr(distributed, "ProcessGroupGloo", None)
    if group is None or hasattr(group.__init__, "__wrapped__"):
        return
    make = group.__init__

    @functools.wraps(make)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        before = {one.descriptor for one in doors.listening()}
        make(self, *arguments, **options)
        if os.environ.get(_LAZY, "0") in ("0", ""):  # else peers come at the first message, and later
            _shut([one for one in doors.listening() if one.descriptor not in before])

    group.__init__ = __init__


def stay_here() -> None:
    """Have the groups of this process, which are all of this machine, listen to it alone, shut their ports, and
    pass large messages through shared memory."""
    from torch.distributed import (
        distributed_c10d,
    )  # not above: a script may set variables before it imports torch

    os.environ.update(dict.fromkeys(doors.INTERFACE_VARIABLES, here) if (here := doors.loopback()) else {})
    shut_behind(distributed_c10d)
    shared_messages.use(distributed_c10d)


def _shut(new: list[doors.Listening]) -> None:
    """Raises RankLostError where somebody else was quicker than the ranks."""
    for one in new:
        doors.admit(one.descriptor)
    if users := doors.strangers({one.place for one in new}):
        whose = ", ".join(map(str, sorted(users)))
        raise RankLostError(
            f"another user of this machine (uid {whose}) connected to a port on which this rank waited "
            "for its peers"
        )
