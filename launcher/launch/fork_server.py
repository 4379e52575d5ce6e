"""The process from which the ranks of a CPU run are forked, with the trainer already imported.

Each rank would take seconds to import it, and the agent two more for torch: so the agent imports once for all.

The agent forks this process before it has a second thread, and requests ranks from it. Each rank is forked
twice, so that it becomes the agent's own child (prctl(2), PR_SET_CHILD_SUBREAPER): the agent can wait for it
and kill it, and it dies with the agent. GPU runs do not do this: CUDA libraries that were loaded before a fork
may be unusable after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from launcher.runs.processes import STOP_SIGNALS, die_with_parent, parent_of

VARIABLE = "LAUNCHER_WARM"
"""The module that is imported before ranks are forked; 0 starts each rank as a new process. The user's own
value takes precedence over launcher's."""
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_TO_BECOME_A_CHILD = 10.0
_SECONDS_BETWEEN_LOOKS = 0.02
_MOST_BYTES = 1 << 22


class Forked:
    """A forked rank, with the part of `subprocess.Popen`'s interface that torchrun uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, a signal as a negative number; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = (
                    self.pid,
                    1 << 8,
                )  # another caller has waited for it: all that is known is that it is gone
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process as Popen does. Raises subprocess.TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return code


class WarmProcess:
    """The process that ranks are forked from, as the agent sees it."""

    def __init__(self, module: str) -> None:
        """Import a module, here and so in every rank, and start the process. Raises RuntimeError in a process
        with several threads. The environment must be that of the ranks."""
        if threading.active_count() > 1:
            raise RuntimeError("a process with several threads cannot be forked safely")
        # The agent gets a thread for these once there is something to stop; ranks unblock them themselves.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        with contextlib.suppress(BaseException):  # a rank that needs the module reports the error
            importlib.import_module(module)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        agent = os.getpid()
        if len(list(Path("/proc/self/task").iterdir())) == 1 and os.fork() == 0:
            self._channel.close()
            _serve(theirs, agent)
        theirs.close()

    def rank(self, command: tuple[str, ...], environment: dict[str, str]) -> Forked | None:
        """Fork one rank, given the command that would start it and its environment; None if it cannot be
        forked and must be started as a new process."""
        if command[1:3] != ("-u", "-m"):
            return None
        try:
            self._channel.send(json.dumps({"arguments": command[3:], "environment": environment}).encode())
            pid = int(self._channel.recv(64) or 0)
        except (OSError, ValueError):
            return None
        until = time.monotonic() + _SECONDS_TO_BECOME_A_CHILD
        while pid and parent_of(pid) not in (0, os.getpid()) and time.monotonic() < until:
            time.sleep(0.001)
        return Forked(pid) if pid else None


def attach(handler: type[Any], warm: WarmProcess) -> None:
    """Make torchrun's handler of a rank's process try a fork first."""
    start = handler._popen

    def _popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        redirected = self._stdout is not None or self._stderr is not None
        return (None if redirected else warm.rank(args, env)) or start(self, args, env)

    handler._popen = _popen


def _serve(channel: socket.socket, agent: int) -> NoReturn:
    """Fork a rank for each request, until the agent is gone."""
    try:
        os.setsid()
        die_with_parent(agent)
        while request := channel.recv(_MOST_BYTES):
            channel.send(str(_fork(channel, json.loads(request), agent)).encode())
    finally:
        os._exit(0)


def _fork(channel: socket.socket, request: dict[str, Any], agent: int) -> int:
    """Fork a rank as a grandchild whose parent exits at once, and return its process id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            channel.close()
            os.close(reading)
            os.close(writing)
            _become(request, agent)
        os.write(writing, str(grandchild).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return int(pipe.read() or 0)


def _become(request: dict[str, Any], agent: int) -> NoReturn:
    """Run the requested rank in this process."""
    until = time.monotonic() + _SECONDS_TO_BECOME_A_CHILD
    while os.getppid() != agent and time.monotonic() < until:
        time.sleep(0.001)
    with contextlib.suppress(OSError):
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
