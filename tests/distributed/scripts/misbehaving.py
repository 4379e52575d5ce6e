"""A script that meets its end in the way that it is told; without torch, so that it starts at once."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["LAUNCHER_RUN_DIRECTORY"])
RANK = int(os.environ["RANK"])


def note(name: str, content: object = None) -> None:
    (HERE / f"{name}-{RANK}.json").write_text(json.dumps(content))


def save_and_leave(number: int, frame: object) -> None:
    note("saved", signal.Signals(number).name)
    sys.exit(0)


def main(kind: str) -> None:
    if kind == "tell":
        seen = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("LAUNCHER_", "ACCELERATE_", "FSDP_"))
        }
        note(
            "told",
            {"arguments": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "seen": seen},
        )
    elif kind == "raise" and RANK == 1:
        raise ValueError("a bug")
    elif kind == "exit" and RANK == 1:
        sys.exit(3)
    elif kind == "words" and RANK == 1:
        sys.exit("no data here")
    elif kind == "well":
        sys.exit(0)
    elif kind == "kill" and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "memory" and RANK == 1:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        bytearray(2**31)
    elif kind == "disk" and RANK == 1:
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    elif kind == "saves on SIGTERM":
        if (HERE / f"saved-{RANK}.json").exists():
            return
        signal.signal(signal.SIGTERM, save_and_leave)
    if kind == "child":
        note("child", subprocess.Popen(["sleep", "600"]).pid)
    if kind == "tell":
        return
    note("ready")
    time.sleep(600)


main(sys.argv[1])
