"""Examine the nodes of a cluster together, in one allocation."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launcher
from launcher.doctor import compare, probe
from launcher.doctor.compare import Node
from launcher.doctor.directory import write
from launcher.doctor.finding import Report, failed
from launcher.doctor.machine import nearest
from launcher.doctor.reduction import IMPORT_SECONDS, SECONDS
from launcher.doctor.step import Step
from launcher.errors import SchedulerError
from launcher.launch.slurm.network import is_loopback

_SECONDS = {
    "hello": 90.0,
    "meet": 45.0,
    "connect": 45.0,
    "write": 90.0,
    "read": 45.0,
    "prepare": IMPORT_SECONDS + 10.0,
}
_SECONDS |= {"reduce": SECONDS + 15.0}
"""What a node has at most for each; then it counts as silent."""
_LOGIN = "login"


@dataclass(frozen=True)
class Request:
    """What to examine, and how Slurm is asked for it."""

    num_nodes: int
    directory: Path
    options: tuple[str, ...] = ()
    """srun's."""
    gpus_per_node: int = 0
    interface: str | None = None
    wait_seconds: float = 600.0
    minutes: int = 10

    def command(self, word: str, inside: bool) -> list[str]:
        """srun, one task on each node; a node that fails takes no other along. Inside of a job it is a step
        beside what runs there."""
        asked = [
            f"--nodes={self.num_nodes}",
            f"--ntasks={self.num_nodes}",
            "--ntasks-per-node=1",
            f"--time={self.minutes}",
        ]
        asked += [
            "--label",
            "--no-kill",
            "--kill-on-bad-exit=0",
            "--wait=0",
            "--mpi=none",
            "--job-name=launcher-doctor",
        ]
        if self.gpus_per_node:
            asked += [f"--gres=gpu:{self.gpus_per_node}", f"--cpus-per-task={2 * self.gpus_per_node}"]
        asked += ["--overlap"] if inside else []
        program = [sys.executable, "-u", "-m", probe.__name__, str(nearest(self.directory)), word]
        return ["srun", *asked, *self.options, *program, *([self.interface] if self.interface else [])]


@dataclass
class Examination:
    """One examination, from the first order to the last."""

    request: Request
    say: Callable[[str], None]
    nodes: list[Node] = field(default_factory=list)
    job: str = ""

    def after(self, own: Report, environment: Mapping[str, str]) -> list[Report]:
        """This machine's report, and one for each node; where the job gets none, the first says why."""
        try:
            return [own, *self.run(environment)]
        except SchedulerError as error:
            advice = (
                "see --partition, --account, --nodes and what else was asked for; `sinfo` lists what there is"
            )
            return [Report(own.node, (*own.findings, failed("allocation", str(error), advice)))]

    def run(self, environment: Mapping[str, str]) -> list[Report]:
        """A report for each node. Raises SchedulerError where the job gets no nodes."""
        word, inside = secrets.token_hex(8), "SLURM_JOB_ID" in environment
        place = nearest(self.request.directory)
        path = os.pathsep.join(
            [str(Path(launcher.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
        )
        step = Step(self.request.command(word, inside), {**environment, "PYTHONPATH": path}, self.say)
        try:
            self._greet(step)
            self._go_round(step, place, word)
        finally:
            step.end(self._whole(inside))
            shutil.rmtree(probe.folder(place, word), ignore_errors=True)
        return compare.reports(self.nodes, place)

    def _whole(self, inside: bool) -> str:
        """What to cancel: our own job; of somebody's job our step alone."""
        step = next((node.said("hello").get("step") for node in self.nodes if node.said("hello")), "")
        return (f"{self.job}.{step}" if self.job and step else "") if inside else self.job

    def _greet(self, step: Step) -> None:
        first = step.first(self.request.wait_seconds)
        hello = next(iter(first.values()))
        self.job = hello.get("job", "")
        names = hello.get("hosts") or [f"node {index}" for index in range(self.request.num_nodes)]
        self.nodes = [Node(name) for name in names]
        self.say(f"job {self.job} on {', '.join(names)}")
        left = [index for index in range(len(names)) if index not in first]
        self._note("hello", first | (step.answers("hello", left, _SECONDS["hello"]) if left else {}), step)

    def _go_round(self, step: Step, place: Path, word: str) -> None:
        heard = {node.name: node.said("hello") for node in self._there()}
        addresses = {
            name: [one for one in said["addresses"].values() if not is_loopback(one)]
            for name, said in heard.items()
        }
        self._order(step, "meet", addresses=addresses)
        reachable = {
            node.name: (node.said("meet").get("address") or (addresses[node.name] or [""])[0])
            for node in self._there()
        }
        if len(self.nodes) > 1:
            self._order(
                step,
                "connect",
                peers={name: (address, heard[name]["port"]) for name, address in reachable.items()},
            )
        self._share(step, place, word)
        if self._there() and all(not node.said("meet").get("problem") for node in self._there()):
            self._reduce(step, heard, reachable)

    def _share(self, step: Step, place: Path, word: str) -> None:
        """Everybody writes, this machine too; then everybody reads."""
        self._order(step, "write")
        wrote = [f"node-{index}" for index, node in enumerate(self.nodes) if "free" in node.said("write")]
        if wrote:
            folder = probe.folder(place, word)
            folder.mkdir(exist_ok=True)
            write(folder / _LOGIN, word, size=0)
            self._order(step, "read", names=[*wrote, _LOGIN])
        names = {f"node-{index}": node.name for index, node in enumerate(self.nodes)} | {
            _LOGIN: "this machine"
        }
        for node in self.nodes:
            if "missing" in node.said("read"):
                node.said("read")["missing"] = [names[name] for name in node.said("read")["missing"]]

    def _reduce(self, step: Step, heard: dict[str, dict[str, Any]], addresses: dict[str, str]) -> None:
        """Over the GPUs that every node has, or one rank a node over gloo."""
        order = [index for index, node in enumerate(self.nodes) if not node.silent_at]
        gpus = min(heard[self.nodes[index].name]["num_gpus"] for index in order)
        first = self.nodes[order[0]].name
        meeting = {
            "address": addresses[first] or "127.0.0.1",
            "port": heard[first]["port"] + 1,
            "prefix": secrets.token_hex(16),
        }
        self._order(
            step,
            "prepare",
            nodes=order,
            ranks_per_node=gpus or 1,
            backend="nccl" if gpus else "gloo",
            **meeting,
        )
        if all("problem" not in node.said("prepare") for node in self._there()) and len(self._there()) == len(
            order
        ):
            self._order(step, "reduce")

    def _there(self) -> list[Node]:
        return [node for node in self.nodes if not node.silent_at and "problem" not in node.said("hello")]

    def _order(self, step: Step, order: str, **arguments: Any) -> None:
        """Give an order to all, and take the answers of those that still talk."""
        talking = [index for index, node in enumerate(self.nodes) if node in self._there()]
        if not talking:
            return
        self.say(order)
        step.tell(order, **arguments)
        self._note(order, step.answers(order, talking, _SECONDS[order]), step, talking)

    def _note(
        self, order: str, answers: dict[int, dict[str, Any]], step: Step, asked: Iterable[int] | None = None
    ) -> None:
        for index in range(len(self.nodes)) if asked is None else asked:
            if index in answers:
                self.nodes[index].answers[order] = answers[index]
            else:
                self.nodes[index].silent_at, self.nodes[index].last_words = order, step.last_words(index)
