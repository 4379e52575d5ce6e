"""Examination of a cluster's nodes together, in one allocation."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import launcher
from launcher.doctor import collective_check, compare, probe
from launcher.doctor.compare import Node
from launcher.doctor.directory import write
from launcher.doctor.finding import Report, failed
from launcher.doctor.machine import nearest
from launcher.doctor.srun import Step
from launcher.errors import SchedulerError

_SECONDS = {
    "meet": 45.0,
    "connect": 45.0,
    "write": 90.0,
    "read": 45.0,
    "reduce": collective_check.SECONDS + 15.0,
}
"""The orders, and the time limit in seconds for each: a node that exceeds it counts as silent."""
_SECONDS_FOR_HELLO = 90.0
_TOLD = {"addresses", "port", "num_gpus", "address"}
"""Names of values in each node's answers that are sent to all nodes."""
_LOGIN = "this machine"
_OPTIONS = ("--ntasks-per-node=1", "--label", "--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none")
"""Options of srun: a node that fails does not end the others."""


@dataclass(frozen=True)
class Request:
    """The requested examination, and the options for Slurm."""

    num_nodes: int
    directory: Path
    options: tuple[str, ...] = ()
    """Further options of srun."""
    gpus_per_node: int = 0
    interface: str | None = None
    wait_seconds: float = 600.0
    minutes: int = 10

    def command(self, word: str, inside: bool) -> list[str]:
        """Return the srun command, one task per node; inside a job it starts a step next to others."""
        counts = [f"--nodes={self.num_nodes}", f"--ntasks={self.num_nodes}", f"--time={self.minutes}"]
        if self.gpus_per_node:
            counts += [f"--gres=gpu:{self.gpus_per_node}", f"--cpus-per-task={2 * self.gpus_per_node}"]
        named = ["--job-name=launcher-doctor", *(["--overlap"] if inside else [])]
        program = [sys.executable, "-u", "-m", probe.__name__, str(nearest(self.directory)), word]
        interface = [self.interface] if self.interface else []
        return ["srun", *counts, *_OPTIONS, *named, *self.options, *program, *interface]


@dataclass
class Examination:
    """A single examination, from the first order to the last."""

    request: Request
    say: Callable[[str], None]
    nodes: list[Node] = field(default_factory=list)
    job: str = ""

    def after(self, own: Report, environment: Mapping[str, str]) -> list[Report]:
        """Return the reports of this machine and each node; if the job gets no nodes, the first says why."""
        try:
            return [own, *self.run(environment)]
        except SchedulerError as error:
            advice = (
                "see --partition, --account, --nodes and what else was asked for; `sinfo` lists what there is"
            )
            return [Report(own.node, (*own.findings, failed("allocation", str(error), advice)))]

    def run(self, environment: Mapping[str, str]) -> list[Report]:
        """Return a report for each node. Raises SchedulerError if the job gets no nodes."""
        word, inside = secrets.token_hex(8), "SLURM_JOB_ID" in environment
        place = nearest(self.request.directory)
        folder = probe.folder(place, word)
        paths = [str(Path(launcher.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        variables = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        step = Step(self.request.command(word, inside), variables, self.say)
        try:
            self._greet(step)
            wrote_here = []
            with contextlib.suppress(OSError):
                folder.mkdir()
                write(folder / _LOGIN, word, size=0)
                wrote_here = [_LOGIN]
            self._go_round(step, wrote_here)
        finally:
            step.end(self._to_cancel(inside))
            shutil.rmtree(folder, ignore_errors=True)
        return compare.reports(self.nodes, place)

    def _to_cancel(self, inside: bool) -> str:
        """Return the id to cancel: our own job, or inside somebody's job only our step."""
        step = next((node.said("hello").get("step") for node in self.nodes if node.said("hello")), "")
        return (f"{self.job}.{step}" if self.job and step else "") if inside else self.job

    def _greet(self, step: Step) -> None:
        """Wait until the nodes start, and collect their first answers."""
        hello = next(iter(step.first(self.request.wait_seconds).values()))
        names = hello.get("hosts") or [f"node {index}" for index in range(self.request.num_nodes)]
        self.job, self.nodes = hello.get("job", ""), [Node(name) for name in names]
        self.say(f"job {self.job} on {', '.join(names)}")
        self._note("hello", range(len(names)), step, _SECONDS_FOR_HELLO)

    def _go_round(self, step: Step, wrote_here: list[str]) -> None:
        """Send each order to all nodes that still answer, with the answers so far."""
        secret = secrets.token_hex(32)
        for order, seconds in _SECONDS.items():
            there = {
                index: node
                for index, node in enumerate(self.nodes)
                if not node.silent_at and "problem" not in node.said("hello")
            }
            if not there:
                return
            self.say(order)
            wrote = [*wrote_here, *(node.name for node in self.nodes if "free" in node.said("write"))]
            peers = {
                node.name: {key: told[key] for told in node.answers.values() for key in told.keys() & _TOLD}
                for node in there.values()
            }
            step.tell(order, peers=peers, wrote=wrote, secret=secret)
            self._note(order, there.keys(), step, seconds)

    def _note(self, order: str, expected: Collection[int], step: Step, seconds: float) -> None:
        answers = step.answers(order, expected, seconds)
        for index in expected:
            if index in answers:
                self.nodes[index].answers[order] = answers[index]
            else:
                self.nodes[index].silent_at = order
                self.nodes[index].last_words = step.last_words.get(index, "")
