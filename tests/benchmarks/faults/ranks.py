"""Rows 1, 2, 7, 19 to 28: what happens to ranks and agents, and inside them."""

from __future__ import annotations

import os
import signal
import time

from launcher.job.schema import Training
from tests.benchmarks.faults.registry import ALL, ENGINES, ONE, SAVING, Expected, injection
from tests.benchmarks.faults.scene import HIT_AT, MemoryGroup, Scene, later

KILLED = Expected(
    codes=(9,), failure_class="rank-lost", words=("rank 1", "SIGKILL", "launcher resume"), seconds=5
)
HANGS = 240.0
"""Seconds after which a hang that nobody ended is given up: six times what the row allows until it is named.
"""


@injection("1", "a rank killed -9 in a step", KILLED, ALL)
def rank_killed(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGKILL, "rank", rank=1)


def _at(moment: str, number: int, variants: tuple[str, ...], row: str = "1", rank: int = 1) -> None:
    expected = Expected(codes=(9,), failure_class="rank-lost", words=(f"rank {rank}", "SIGKILL"), seconds=6)

    @injection(row, f"a rank killed -9 in {moment}", expected, variants, name=f"rank_killed_in_{moment}")
    def killed(scene: Scene) -> None:
        scene.start(inside=f"kill@{moment}:{rank}:{number}")
        scene.wait_said()
        if moment in ("writing", "committing"):
            scene.check(
                "the save left a directory that is not chosen",
                not (scene.run.checkpoint(10) / "manifest.json").exists(),
            )


for _moment, _number in {
    "preparing": 1,
    "loading": 1,
    "data": 13,
    "forward": 26,
    "backward": 26,
    "exchange": 13,
    "optimizer": 13,
}.items():
    _at(_moment, _number, ENGINES if _moment in ("forward", "backward", "optimizer") else ONE)
_at("staging", 2, ("FSDP", "ZeRO-2", "ZeRO-3"), "7")
_at("writing", 2, SAVING, "7")
_at("committing", 2, SAVING, "7", rank=0)


@injection(
    "7",
    "a rank killed -9 while a checkpoint is loaded",
    Expected(codes=(9,), words=("rank 1", "SIGKILL"), seconds=6),
    ENGINES,
)
def rank_killed_in_restoring(scene: Scene) -> None:
    scene.copy_stopped()
    scene.start_again(inside="kill@restoring:1:1", attempt=2)
    scene.wait_said()


@injection(
    "1",
    "a rank crashes in native code (SIGSEGV)",
    Expected(codes=(9,), words=("rank 1", "SIGSEGV"), seconds=6),
    ENGINES,
)
def rank_crashed(scene: Scene) -> None:
    scene.start(inside="crash@forward:1:26")
    scene.wait_said()


@injection(
    "1", "a rank leaves without a word", Expected(codes=(9,), words=("rank 0", "exit code 21"), seconds=6)
)
def rank_left(scene: Scene) -> None:
    scene.start(inside="leave=21@exchange:0:13")
    scene.wait_said()


@injection("2", "the agent killed -9", Expected(codes=(9,), seconds=15), ALL)
def agent_killed(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGKILL, "agent")


@injection("2", "the launcher killed -9", Expected(codes=(-9,), seconds=15), ALL)
def launcher_killed(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGKILL, "launcher")
    scene.wait_gone()
    scene.check("status says interrupted", "interrupted" in scene.ask("status", str(scene.run.path)).stdout)


@injection("2", "the launcher killed -9 while shards are written", Expected(codes=(-9,), seconds=15), SAVING)
def launcher_killed_in_a_save(scene: Scene) -> None:
    scene.start(inside="slow=0.3@writing:all:1")
    scene.wait(lambda: list(scene.run.checkpoints.glob(".attempt-00000010*")), "a save of step 10")
    scene.signal(signal.SIGKILL, "launcher")


@injection("19", "NaN in the loss of one rank", Expected(bits=False, seconds=60), ENGINES)
def nan_loss(scene: Scene) -> None:
    scene.start(inside="nan@forward:1:26")
    scene.wait_said()
    scene.wait_end(90)
    scene.check(
        "all ranks skip that step", [record["step"] for record in scene.events("skipped")] == [HIT_AT + 1]
    )


@injection(
    "20", "Inf in the gradient of one rank, with a finite loss", Expected(bits=False, seconds=60), ENGINES
)
def infinite_gradient(scene: Scene) -> None:
    scene.start(inside="infinite@norm:1:13")
    scene.wait_said()
    scene.wait_end(90)
    said = scene.events("skipped")
    scene.check(
        "all ranks skip that step",
        [record["step"] for record in said] == [13] and "gradient" in said[0]["reason"],
    )


@injection(
    "21",
    "a loss that is fifty times too high from step 21 on",
    Expected((8,), None, ("the loss stayed above", "rewind 1 of this run", "diverged"), 90, resumes=False),
    ENGINES,
    name="loss_spike",
)
def loss_spike(scene: Scene) -> None:
    """It stays so high also after the run went back: once, and then it must end."""
    policy = (
        {"on_spike": {"action": "rewind", "window": 16, "steps": 3, "times": 1}}
        if "on_spike" in Training.model_fields
        else {}
    )
    scene.check("there is a policy (training.on_spike)", policy)
    scene.start(inside="spike=50@forward:all:41", changes={"training": policy})
    scene.wait_said()


@injection(
    "22",
    "one rank three times slower than the other",
    Expected((75,), words=("rank 1", "slower"), seconds=200),
    ENGINES,
)
def straggler(scene: Scene) -> None:
    scene.start(inside="slow=0.7@forward:1:10", changes={"training": {"max_steps": 4000}})
    scene.wait_said()
    named = "never"
    while scene.running() and time.time() < (scene.hit_at or 0) + 150:
        if "slower" in scene.output():
            named = f"{time.time() - (scene.hit_at or 0):.0f} s"
            break
        time.sleep(0.5)
    scene.seen["named_after"] = named
    scene.signal(signal.SIGTERM, "launcher")
    scene.check("named within 60 s", named != "never" and float(named.split()[0]) <= 60)


def _hang(
    name: str, row: str, fault: str, inside: str, words: tuple[str, ...], variants: tuple[str, ...]
) -> None:
    expected = Expected(codes=None, failure_class="hung", words=words, seconds=HANGS)

    @injection(row, fault, expected, variants, name=name)
    def hang(scene: Scene) -> None:
        scene.start(inside=inside)
        scene.wait_said()
        scene.wait_named(*words, seconds=60)


_hang(
    "hang_in_a_collective",
    "23",
    "a rank hangs before a collective",
    "hang@exchange:1:13",
    ("rank 1",),
    ENGINES,
)
_hang(
    "hang_in_data",
    "24",
    "a rank hangs in loading data",
    "hang@data:1:13",
    ("rank 1", "data"),
    ("FSDP", "ZeRO-3"),
)
_hang(
    "stopped_in_a_step",
    "25",
    "SIGSTOP on a rank in a step",
    "stop@forward:1:26",
    ("rank 1", "stopped"),
    ENGINES,
)
_hang(
    "stopped_in_preparing",
    "25, S3",
    "SIGSTOP on rank 0 while it tokenises",
    "stop@preparing:0:1",
    ("rank 0", "stopped"),
    ONE,
)
_hang(
    "stopped_in_loading",
    "25, S3",
    "SIGSTOP on a rank while it loads the model",
    "stop@loading:1:1",
    ("rank 1", "stopped"),
    ONE,
)
_hang(
    "stopped_in_evaluating",
    "25, S3",
    "SIGSTOP on a rank in an evaluation",
    "stop@evaluating:1:1",
    ("rank 1", "stopped"),
    ONE,
)
_hang("hang_in_the_optimizer", "23", "a rank hangs in the optimizer", "hang@optimizer:0:13", ("rank 0",), ONE)


@injection("25, S3", "SIGSTOP on a rank for 12 s, then SIGCONT", Expected(seconds=90), ENGINES)
def stopped_for_a_while(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGSTOP, "rank", rank=1)
    time.sleep(12)
    scene.signal(signal.SIGCONT, "rank", rank=1)


@injection(
    "25, S3",
    "a rank is stopped, then SIGTERM to the launcher",
    Expected(codes=(130,), words=("stopped", "rank 1"), seconds=30),
)
def stopped_then_asked_to_stop(scene: Scene) -> None:
    scene.start(changes={"cluster": {"grace": "8s"}})
    scene.wait_step()
    scene.signal(signal.SIGSTOP, "rank", rank=1)
    time.sleep(1)
    scene.signal(signal.SIGTERM, "launcher")


@injection(
    "S3",
    "the agent stopped (SIGSTOP), then rank 1 killed -9",
    Expected(codes=None, words=("rank 1", "SIGKILL"), seconds=30),
)
def agent_stopped_then_rank_killed(scene: Scene) -> None:
    scene.start(changes={"training": {"max_steps": 40}})
    scene.wait_step()
    agent = scene.processes("agent")[0].pid
    os.kill(agent, signal.SIGSTOP)
    time.sleep(0.5)
    scene.signal(signal.SIGKILL, "rank", rank=1)


@injection("-", "every process stopped for 40 s and continued (a machine suspended)", Expected(seconds=120))
def suspended(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGSTOP, "launcher", "agent", "rank", "helper")
    time.sleep(40)
    scene.signal(signal.SIGCONT, "launcher", "agent", "rank", "helper")


MEMORY = Expected(codes=(4,), failure_class="out-of-memory", words=("rank 1", "--set"), seconds=10)


@injection("26", "out of memory in the first step", MEMORY, ENGINES)
def memory_in_the_first_step(scene: Scene) -> None:
    scene.start(inside="memory@forward:1:1")
    scene.wait_said()


@injection("27", "out of memory late, on one sample", Expected(codes=(0,), bits=False, seconds=120), ENGINES)
def memory_late(scene: Scene) -> None:
    scene.start(inside="memory@forward:1:26")
    scene.wait_said()


@injection(
    "28",
    "the host's out-of-memory killer",
    Expected(codes=(4,), failure_class="out-of-memory", words=("out-of-memory killer",), seconds=10),
    missing=MemoryGroup.missing,
)
def killed_by_the_host(scene: Scene) -> None:
    with scene.memory_group() as group:
        scene.start()
        scene.wait_step()
        rank = scene.processes("rank", rank=1)[0]
        group.add(rank.pid)
        scene.hit()
        group.limit(1 << 18)
        later(0.2, lambda: group.limit(0))
        scene.wait_end(30)


@injection("4", "SIGTERM to one rank", Expected(codes=(75,), seconds=30, most_lost=0), ENGINES)
def sigterm_to_a_rank(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGTERM, "rank", rank=1)


@injection("4", "SIGTERM to the agent", Expected(codes=(75,), seconds=30, most_lost=0))
def sigterm_to_the_agent(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGTERM, "agent")


def _stop(number: signal.Signals, grace: str, row: str, variants: tuple[str, ...]) -> None:
    expected = Expected(codes=(75,), words=("saved", "launcher resume"), seconds=30, most_lost=0)

    @injection(
        row,
        f"{number.name} to the launcher, {grace} of grace",
        expected,
        variants,
        name=f"{number.name.lower()}_{grace}",
    )
    def stop(scene: Scene) -> None:
        scene.start(changes={"cluster": {"grace": grace}})
        scene.wait_step()
        scene.signal(number, "launcher")


_stop(signal.SIGTERM, "30s", "4", ALL)
_stop(signal.SIGTERM, "90s", "4", ONE)
_stop(signal.SIGTERM, "600s", "4", ONE)
_stop(signal.SIGINT, "30s", "4", ENGINES)
_stop(signal.SIGHUP, "30s", "4", ONE)
_stop(signal.SIGUSR1, "30s", "6", ENGINES)
_stop(signal.SIGUSR2, "30s", "6", ONE)


@injection(
    "5",
    "SIGTERM with less grace than a save takes",
    Expected((75, 130), None, ("launcher resume",), 30, most_lost=12),
    ENGINES,
)
def too_little_grace(scene: Scene) -> None:
    scene.start(inside="slow=4@writing:all:1", changes={"cluster": {"grace": "5s"}})
    scene.wait(lambda: scene.events("saved"), "a save")
    scene.wait_step()
    saves = {path.name for path in scene.run.checkpoints.glob("step-*")}
    scene.signal(signal.SIGTERM, "launcher")
    scene.wait_end(60)
    left = {path.name for path in scene.run.checkpoints.glob("step-*")}
    scene.check("the checkpoints there were stay", saves & left)


@injection("7", "SIGTERM while shards are written", Expected(codes=(75,), seconds=30, most_lost=0), SAVING)
def sigterm_in_a_save(scene: Scene) -> None:
    scene.start(inside="slow=0.5@writing:all:1")
    scene.wait(lambda: list(scene.run.checkpoints.glob(".attempt-00000010*")), "a save of step 10")
    scene.signal(signal.SIGTERM, "launcher")


@injection("8", "SIGTERM before the first step", Expected(codes=(75,), seconds=30, most_lost=0), ENGINES)
def sigterm_before_the_first_step(scene: Scene) -> None:
    scene.start()
    scene.wait(lambda: scene.processes("agent"), "the agent")
    scene.signal(signal.SIGTERM, "launcher")


@injection("-", "a second Ctrl-C", Expected(codes=(130,), seconds=10))
def second_interrupt(scene: Scene) -> None:
    scene.start(inside="slow=3@forward:all:20")
    scene.wait_said()
    scene.signal(signal.SIGINT, "launcher")
    later(1.0, lambda: scene.signal(signal.SIGINT, "launcher")).join()
