"""The srun step of the doctor: orders to one probe per node, and answers, through srun's own pipes.

These need no shared file system, name resolution or open port. srun forwards at most a kilobyte of a task's
line at a time, and may insert another task's output. So a message is sent as short lines, the last of which
is a full stop.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from typing import IO, Any

from launcher.errors import SchedulerError
from launcher.launch.slurm.client import call

_MARK = "@doctor"
_LONGEST = 600
_LABELLED = re.compile(r"\s*(\d+): (.*)")
_ENDED = re.compile(r"error: \S+: tasks? ([\d,-]+): ")
_WAITS = re.compile(r"srun: job (\d+) queued and waiting")
_SECONDS_TO_END = 5.0
_SECONDS_FOR_LAST_ANSWERS = 0.5
"""Time to wait for the last answers of ended tasks, which may arrive after the news of their end."""
_KEPT_LINES = 50


def encode(message: dict[str, Any]) -> str:
    """Return a message as lines for srun's pipe."""
    text = json.dumps(message)
    pieces = [text[start : start + _LONGEST] for start in range(0, len(text), _LONGEST)]
    return "".join(f"{_MARK} {piece}\n" for piece in pieces) + f"{_MARK}.\n"


class Step:
    """A step with one task per node. Tasks are identified by number: the node's place in the allocation."""

    def __init__(self, command: list[str], environment: dict[str, str], say: Callable[[str], None]) -> None:
        self.ended: set[int] = set()
        """Tasks that have ended, according to srun."""
        self.last_words: dict[int, str] = {}
        """The last line that each task wrote to stderr."""
        self._say = say
        self._answers: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self._begun: dict[int, str] = defaultdict(str)
        self._complaints: deque[str] = deque(maxlen=_KEPT_LINES)
        self._news = threading.Condition()
        self._open = {"out", "err"}
        try:
            # In its own session, so that only we receive Ctrl-C, and end it in order.
            self._srun = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            reason = f"{command[0]} is not on this machine: call this on a login node of the cluster"
            raise SchedulerError(reason) from None
        for name, stream, take in (
            ("out", self._srun.stdout, self._hear),
            ("err", self._srun.stderr, self._complain),
        ):
            threading.Thread(target=self._read, args=(name, stream, take), daemon=True).start()

    def _read(self, name: str, stream: IO[str], take: Callable[[str], None]) -> None:
        for line in stream:
            with self._news:
                take(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._open.remove(name)
            self._news.notify_all()

    def _hear(self, line: str) -> None:
        """Process one line of a task's output; lines that are not messages are ignored."""
        if (labelled := _LABELLED.fullmatch(line)) is None:
            return
        node, text = int(labelled[1]), labelled[2]
        if text.startswith(f"{_MARK} "):
            self._begun[node] += text.removeprefix(f"{_MARK} ")
        elif text == f"{_MARK}.":
            with contextlib.suppress(ValueError, KeyError, TypeError):
                message = json.loads(self._begun.pop(node, ""))
                self._answers[message.pop("order")][node] = message

    def _complain(self, line: str) -> None:
        """Process one line of srun's stderr: from a task, or from srun itself."""
        self._complaints.append(line.strip())
        if (labelled := _LABELLED.fullmatch(line)) is not None:
            node = int(labelled[1])
            self.last_words[node] = labelled[2].strip() or self.last_words.get(node, "")
        if ended := _ENDED.search(line):
            spans = re.findall(r"(\d+)(?:-(\d+))?", ended[1])
            self.ended |= {task for low, high in spans for task in range(int(low), int(high or low) + 1)}
        if waits := _WAITS.search(line):
            self._say(f"job {waits[1]} waits in the queue")

    def tell(self, order: str, **arguments: Any) -> None:
        """Send an order to all nodes."""
        assert self._srun.stdin is not None
        with contextlib.suppress(OSError):  # srun has ended, which shows in missing answers
            self._srun.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self._srun.stdin.flush()

    def first(self, seconds: float) -> dict[int, dict[str, Any]]:
        """Return the first answers, once the job has its nodes. Raises SchedulerError if it gets none in
        `seconds`."""
        with self._news:
            self._news.wait_for(lambda: self._answers["hello"] or "out" not in self._open, seconds)
            if self._answers["hello"]:
                return dict(self._answers["hello"])
            if "out" in self._open:
                reason = "the job waits in the queue; give it longer with --wait SECONDS"
                raise SchedulerError(f"no node answered in {seconds:.0f} s: {reason}")
            self._news.wait_for(lambda: not self._open, _SECONDS_TO_END)
            lines = [line for line in self._complaints if "error" in line.lower()] or [*self._complaints]
        reason = (lines or ["ended without a word"])[0].removeprefix("srun: error: ")
        raise SchedulerError(f"srun: {reason.removeprefix('Unable to allocate resources: ')}")

    def answers(self, order: str, expected: Collection[int], seconds: float) -> dict[int, dict[str, Any]]:
        """Return the answers by node; fewer than `expected` if others ended, or are silent for `seconds`."""

        def missing() -> set[int]:
            return set(expected) - self._answers[order].keys() if "out" in self._open else set()

        with self._news:
            self._news.wait_for(lambda: missing() <= self.ended, seconds)
            self._news.wait_for(lambda: not missing(), _SECONDS_FOR_LAST_ANSWERS)
            return dict(self._answers[order])

    def end(self, job: str) -> None:
        """Let the nodes clean up and exit; cancel those that do not.

        `job` is the id of the job, or of our step in somebody else's job.
        """
        assert self._srun.stdin is not None
        with contextlib.suppress(OSError):
            self._srun.stdin.close()
        if job and self._is_over():
            return
        with contextlib.suppress(SchedulerError):
            if job:
                call(["scancel", job], seconds=_SECONDS_TO_END)
        # An srun that still waits for nodes withdraws its request.
        self._srun.terminate()
        if not self._is_over():
            self._srun.kill()
            self._srun.wait()

    def _is_over(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._srun.wait(_SECONDS_TO_END)
        return self._srun.poll() is not None
