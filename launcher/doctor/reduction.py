"""A node's part of the test all-reduce: start its ranks, release them, end them in time."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from launcher.runs.doors import INTERFACE_VARIABLES
from launcher.runs.secret import PREFIX_VARIABLE

SECONDS = 60
"""For the ranks to find each other and add up."""
IMPORT_SECONDS = 180
"""For torch to be imported, which over a network takes a while."""
_PROGRAM = "launcher.training.all_reduce"


class Ranks:
    """The ranks of one node."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._said: list[queue.Queue[str | None]] = []

    def start(self, message: dict[str, Any], node: int, interface: str) -> dict[str, Any]:
        """Start them, and wait until all have imported torch."""
        per_node, order = int(message["ranks_per_node"]), list(message["nodes"])
        command = [sys.executable, "-m", _PROGRAM, message["backend"], str(SECONDS)]
        for local in range(per_node):
            place: dict[str, Any] = {
                "RANK": order.index(node) * per_node + local,
                "WORLD_SIZE": len(order) * per_node,
                "LOCAL_RANK": local,
            }
            place |= {
                "MASTER_ADDR": message["address"],
                "MASTER_PORT": message["port"],
                PREFIX_VARIABLE: message["prefix"],
            }
            if interface:
                place |= dict.fromkeys(INTERFACE_VARIABLES, interface)
            variables = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **{name: str(value) for name, value in place.items()},
            }
            self._begin(command, variables)
        return self._gather(IMPORT_SECONDS)

    def _begin(self, command: list[str], variables: dict[str, str]) -> None:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, said), daemon=True).start()
        self._processes.append(process)
        self._said.append(said)

    def release(self) -> dict[str, Any]:
        """Let them add up, and say what came of it."""
        for process in self._processes:
            try:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            except OSError:
                continue  # it is gone, as its missing answer will say
        return self._gather(SECONDS + 5)

    def _gather(self, seconds: float) -> dict[str, Any]:
        """What the slowest of them says; the first problem where there is one."""
        until, answers = time.monotonic() + seconds, []
        for process, said in zip(self._processes, self._said, strict=True):
            try:
                line = said.get(timeout=max(0.1, until - time.monotonic()))
            except queue.Empty:
                return {"problem": f"not done after {seconds:.0f} s"}
            if line is None:
                return {"problem": _why(process)}
            answers.append(json.loads(line))
        problem = next((answer for answer in answers if "problem" in answer), None)
        return problem or max(answers, key=lambda answer: next(iter(answer.values())))

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
    """What a rank says, line by line, as far as it is meant for us; None at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            said.put(line)
    said.put(None)


def _why(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code == -signal.SIGALRM:
        return f"not done after {SECONDS} s"
    return f"a rank was killed by signal {-code}" if code < 0 else f"a rank ended with code {code}"
