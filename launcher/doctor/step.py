"""The srun step of the doctor: its input, its output and its end."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

from launcher.doctor.link import Decoder, labelled
from launcher.errors import SchedulerError
from launcher.launch.slurm.client import call

_ENDED = re.compile(r"error: \S+: tasks? ([\d,-]+): ")
_WAITS = re.compile(r"srun: job (\d+) queued and waiting")
_SECONDS_TO_END = 5.0
_SECONDS_FOR_LAST_ANSWERS = 0.5
"""Of tasks that are over: what they said may come after the news of their end."""
_KEPT_LINES = 50


class Step:
    """One task on each node. Tasks are known by their number, which is the node's place in the allocation."""

    def __init__(self, command: list[str], environment: dict[str, str], say: Callable[[str], None]) -> None:
        self._say = say
        self._messages: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._errors: list[str] = []
        self._last_words: dict[int, str] = {}
        self._hung_up = False
        self.ended: set[int] = set()
        """Tasks that srun says are over."""
        try:
            # In a session of its own: Ctrl-C is for us, who then end it in order.
            self._srun = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise SchedulerError(
                f"{command[0]} is not on this machine: call this on a login node of the cluster"
            ) from None
        assert self._srun.stdout is not None and self._srun.stderr is not None
        threading.Thread(target=self._hear, args=(self._srun.stdout,), daemon=True).start()
        self._complaints = threading.Thread(target=self._read_errors, args=(self._srun.stderr,), daemon=True)
        self._complaints.start()

    def _hear(self, stream: IO[str]) -> None:
        decoder = Decoder()
        for line in stream:
            if (found := decoder.feed(line)) is not None:
                self._messages.put(found)
        self._hung_up = True
        self._messages.put(None)

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            self._errors = [*self._errors, line.strip()][-_KEPT_LINES:]
            if (said := labelled(line)) is not None:
                self._last_words[said[0]] = said[1].strip() or self._last_words.get(said[0], "")
            if ended := _ENDED.search(line):
                self.ended |= _numbers(ended[1])
            if waits := _WAITS.search(line):
                self._say(f"job {waits[1]} waits in the queue")

    def tell(self, order: str, **arguments: Any) -> None:
        """Give all nodes an order."""
        assert self._srun.stdin is not None
        with contextlib.suppress(OSError):  # srun is gone, as the missing answers will say
            self._srun.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self._srun.stdin.flush()

    def first(self, seconds: float) -> dict[int, dict[str, Any]]:
        """The first answer of any node, once the job has its nodes. Raises SchedulerError where it gets none
        within `seconds`."""
        found = self.answers("hello", 1, seconds)
        if found:
            return found
        if not self._hung_up:
            raise SchedulerError(
                f"no node answered in {seconds:.0f} s: the job waits in the queue; give it longer with "
                "--wait SECONDS"
            )
        raise SchedulerError(f"srun: {self._reason()}")

    def answers(self, order: str, expected: int | Iterable[int], seconds: float) -> dict[int, dict[str, Any]]:
        """Answers by node: those of `expected`, or of as many as that; fewer where the rest are over, or
        silent for so long."""
        until, found = time.monotonic() + seconds, dict[int, dict[str, Any]]()
        wanted = set() if isinstance(expected, int) else set(expected)
        while time.monotonic() < until:
            missing = wanted - found.keys()
            if not missing and (not isinstance(expected, int) or len(found) >= expected):
                break
            if missing and missing <= self.ended:
                until = min(until, time.monotonic() + _SECONDS_FOR_LAST_ANSWERS)
            try:
                message = self._messages.get(timeout=0.2)
            except queue.Empty:
                continue
            if message is None:
                self._messages.put(None)  # for the next question
                break
            if message[1].get("order") == order:
                found[message[0]] = message[1]
        return found

    def last_words(self, node: int) -> str:
        """The last line that a task wrote on stderr."""
        return self._last_words.get(node, "")

    def _reason(self) -> str:
        self._complaints.join(_SECONDS_TO_END)
        lines = (
            [line for line in self._errors if "error" in line.lower()]
            or self._errors
            or ["ended without a word"]
        )
        return lines[0].removeprefix("srun: error: ").removeprefix("Unable to allocate resources: ")

    def end(self, job: str) -> None:
        """Let the nodes clean up and leave; what does not leave is cancelled. `job` is the job, or the step
        of a job that is not ours."""
        assert self._srun.stdin is not None
        with contextlib.suppress(OSError):
            self._srun.stdin.close()
        if job and self._is_over():
            return
        with contextlib.suppress(SchedulerError):
            if job:
                call(["scancel", job], seconds=_SECONDS_TO_END)
        # srun that still waits for nodes takes its request back.
        self._srun.terminate()
        if not self._is_over():
            self._srun.kill()
            self._srun.wait()

    def _is_over(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._srun.wait(_SECONDS_TO_END)
        return self._srun.poll() is not None


def _numbers(text: str) -> set[int]:
    """`0,2-4` -> {0, 2, 3, 4}."""
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if low.isdigit() and (not high or high.isdigit()):
            found |= set(range(int(low), int(high or low) + 1))
    return found
