"""torchrun's elastic agent, adapted to a supervised run.

    python -m launcher.launch.agent [torchrun's own arguments]

It differs from `python -m torch.distributed.run` in seven things:

1. It dies with the launcher, and each rank dies with it, so that nothing outlives a launcher that was killed
  with SIGKILL.
2. It forwards a stop signal to the launcher, which stops the ranks politely. torchrun would end them.
3. When a rank has failed, it kills the others at once with SIGKILL. torchrun sends SIGTERM and waits up to
  30 s, but a rank in a collective cannot handle that. So a SIGTERM that reaches a rank always comes from
  outside and is a polite request.
4. On a CPU the ranks are forks of one process that has imported the trainer (see fork_server.py).
5. It writes to exits.json how each rank ended (a signal as a negative code), and whether the agent itself
  killed it.
6. Agents and ranks meet where other users cannot reach them (see rendezvous.py).
7. It creates no log directory, which torchrun leaves below TMPDIR: each rank has its own log in the attempt's
  directory.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.launch import rendezvous
from launcher.launch.fork_server import VARIABLE, WarmProcess, attach
from launcher.launch.rendezvous import ATTEMPT_VARIABLE
from launcher.runs.failure import record, write_exits
from launcher.runs.notices import tell
from launcher.runs.processes import PARENT_VARIABLE, RUN_VARIABLE, STOP_SIGNALS, die_with_parent, kill_group

NODE_VARIABLE = "LAUNCHER_NODE"
"""The number of this node in the attempt, from 0 on."""
_SECONDS_TO_REAP = 5


def main(arguments: list[str]) -> int:
    """Run the agent to its end. Returns 0 if every rank ended with 0, 1 if one failed, and the error's own exit
    code if the rendezvous failed."""
    die_with_parent()
    launcher = os.getppid()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    module = os.environ.get(VARIABLE, "0")
    warm = WarmProcess(module) if module != "0" else None
    _pass_signals_on(launcher)

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    if run := os.environ.get(RUN_VARIABLE):
        from launcher.launch.script_run import apply_configuration
        from launcher.runs.layout import RunDirectory

        apply_configuration(RunDirectory(Path(run)), Path(os.environ[ATTEMPT_VARIABLE]))
    if warm is not None:
        attach(SubprocessHandler, warm)
    killed = _kill_instead_of_asking(SubprocessContext)
    node = int(os.environ.get(NODE_VARIABLE) or 0)
    rendezvous.register(node)
    options = torchrun.parse_args(arguments)
    options.log_dir = options.log_dir or os.devnull
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        ends = [_end(rank, failure, killed) for rank, failure in error.failures.items()]
        tell(exits=ends)  # first without the disk, which may be full, gone or stalled
        write_exits(Path(os.environ[ATTEMPT_VARIABLE]), ends, node)
        return 1
    except LauncherError as error:  # of the rendezvous, before any rank existed that could record it
        record(Path(os.environ[ATTEMPT_VARIABLE]), node * int(options.nproc_per_node), error)
        return error.exit_code
    return 0


def _pass_signals_on(launcher: int) -> None:
    """Receive stop signals in a separate thread and forward them to the launcher.

    They stay blocked in every other thread, so that torchrun's handlers never see them, and in the ranks until
    those have handlers. So a signal never kills a process that should stop politely.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def forward() -> None:
        while True:
            number = signal.sigwait(STOP_SIGNALS)
            # The launcher counts Ctrl-Cs, and it has seen this one itself if it came from a terminal.
            os.kill(launcher, signal.SIGTERM if number == signal.SIGINT else number)

    threading.Thread(target=forward, daemon=True).start()


def _kill_instead_of_asking(context: type[Any]) -> set[int]:
    """Have torchrun kill the ranks and their children with SIGKILL. Returns a set that will hold the process
    ids of the ranks that were still alive then."""
    killed: set[int] = set()
    close = context._close

    def _close(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        for handler in self.subprocess_handlers.values():
            if handler.proc.poll() is None:
                killed.add(handler.proc.pid)
            kill_group(handler.proc.pid)
        close(self, signal.SIGKILL, _SECONDS_TO_REAP)

    context._close = _close
    return killed


def _end(rank: int, failure: Any, killed: set[int]) -> dict[str, Any]:
    ended = {
        "rank": rank,
        "pid": failure.pid,
        "code": failure.exitcode,
        "time": time.time(),
        "by_agent": failure.pid in killed,
    }
    return {**ended, "host": os.uname().nodename}


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's shutdown takes a second or more, and nothing is left to do
