"""The watch over ranks that are bare processes: what they say of themselves, what is seen of them, and two
nodes that watch together."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import HungError
from launcher.launch import hangs as hangs_module
from launcher.launch import sight, stacks, watchdog
from launcher.launch.hangs import Hangs
from launcher.launch.slurm.policy import Attempt, decide
from launcher.runs import places
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.places import Page, Whereabouts
from launcher.runs.processes import STACKS_SIGNAL
from launcher.runs.seen import Published, Seen, publish, published, ranks_of

RANK = """
import faulthandler, json, sys, time
from launcher.runs.places import here
from launcher.runs.processes import STACKS_SIGNAL
path, memory = here.begin()
faulthandler.register(STACKS_SIGNAL, file=memory, all_threads=True)
print(path, flush=True)
here.step_done(int(sys.argv[1]), 0.25)
for done in range(10):
    here.at("forward", done=done, total=20)
    time.sleep(0.05)
def all_gather():
    here.waits(1)
    time.sleep(600)
all_gather()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[RunDirectory, int], int]]:
    """Start a rank of a run that says where it is, and return once it waits, which it does for ever."""
    processes: list[subprocess.Popen[str]] = []

    def begin(run: RunDirectory, rank: int) -> int:
        process = subprocess.Popen([sys.executable, "-c", RANK, "12"], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        wait_for(lambda: Page.open(path).read(rank, "", process.pid).collective)
        run.attempt(1).mkdir(parents=True, exist_ok=True)
        write_atomically(run.attempt(1) / f"rank-{rank}.json", f'{{"places": "{path}"}}')
        return process.pid

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_rank_says_where_it_is_and_another_process_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Whereabouts()
    path, _ = mine.begin()
    theirs = Page.open(path)
    assert (theirs.read(3, "n1", 7).count, theirs.read(3, "n1", 7).first_step) == (0, None)
    mine.steps_begin(0)
    assert theirs.read(3, "n1", 7).first_step == 0
    mine.at("data", done=2, total=8, detail="/cache/ä")
    with mine.during("compiling"):
        assert theirs.read(3, "n1", 7).place == "compiling"
    mine.moved()
    mine.waits(1)
    mine.step_done(12, 0.25)
    mine.own_work(0.125)
    mine.peak_memory(lambda: 1 << 30)
    monkeypatch.setattr(Whereabouts, "_SECONDS_BETWEEN_MEMORY", math.inf)
    mine.peak_memory(lambda: 1 << 40)  # too soon after the last to be asked
    mine.saving("writing", step=10, detail="__0_0.distcp")
    mine.saved_bytes(5)
    seen = theirs.read(3, "n1", 7)
    assert (seen.rank, seen.place, seen.done, seen.total, seen.detail, seen.collective) == (
        3,
        "data",
        3,
        8,
        "/cache/ä",
        True,
    )
    assert (seen.step, seen.step_seconds, seen.busy_seconds, seen.memory_bytes) == (12, 0.25, 0.125, 1 << 30)
    assert (seen.save, seen.save_step, seen.save_bytes, seen.save_detail) == (
        "writing",
        10,
        5,
        "__0_0.distcp",
    )
    theirs.note_look("T")
    assert mine.looks() == (1, 1, 0)


def test_a_text_is_cut_to_what_fits() -> None:
    mine = Whereabouts()
    mine.at("data", detail="x" * 5000)
    assert mine.read(0, "", 0).detail == "x" * 480
    mine.at("forward")
    assert mine.read(0, "", 0).detail == ""


def test_without_memfd_there_is_a_file_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    mine = Whereabouts()
    path, _ = mine.begin()
    mine.at("loading")
    assert Page.open(path).read(0, "", 0).place == "loading"
    monkeypatch.setattr(
        os, "posix_fallocate", refuse
    )  # /dev/shm and the directory for temporary files are full
    nowhere = Whereabouts()
    assert nowhere.begin() == ("", 2)
    nowhere.at("loading")
    assert nowhere.read(0, "", 0).place == "loading"


def test_what_is_published_is_read_or_passed_over(tmp_path: Path) -> None:
    seen = [Seen(rank, "n1", 7, "forward", step=12) for rank in (2, 0)]
    publish(tmp_path / "ranks-1.json", Published(4, seen))
    publish(tmp_path / "ranks-1.json", Published(5, seen))
    assert published(tmp_path / "ranks-1.json") == Published(5, seen)
    (tmp_path / "ranks-0.json").write_text('{"number": 1, "ranks": [{"rank": 1')
    assert published(tmp_path / "ranks-0.json") is None and published(tmp_path / "none") is None
    assert [one.rank for one in ranks_of(tmp_path)] == [0, 2]


def test_what_is_said_costs_microseconds() -> None:
    mine = Whereabouts()
    mine.begin()
    began = time.process_time()
    for number in range(10_000):
        mine.at("data", done=number, total=8, detail="/a/directory")
        mine.turn("forward")
    assert (time.process_time() - began) / 10_000 < 1e-4  # some 2 us


def test_a_process_is_seen(start: Callable[[RunDirectory, int], int], tmp_path: Path) -> None:
    pid = start(RunDirectory(tmp_path), 0)
    assert sight.look(pid, closely=False).state in "RSD"
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: sight.look(pid).state == "T")
    seen = sight.look(pid)
    assert not seen.traced and seen.cpu_seconds > 0 and seen.read_bytes > 0
    assert sight.look(os.getpid()).stopped_child == pid
    assert sight.look(2**22 - 1).state == ""
    assert stacks.catches(pid, STACKS_SIGNAL) and not stacks.catches(pid, signal.SIGUSR1)
    os.kill(pid, STACKS_SIGNAL)
    assert stacks.is_pending(pid, STACKS_SIGNAL) and not stacks.is_pending(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not stacks.is_pending(pid, STACKS_SIGNAL))


def test_who_holds_a_lock_is_known(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    assert sight.lock_holder(lock) == 0
    with open(lock, "w") as file:
        assert sight.lock_holder(lock) == 0
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sight.lock_holder(lock) == os.getpid()


STACK = """Thread 0x00007f67e8c6b6c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Current thread 0x00007f6820853b80 (most recent call first):
  File "/a/launcher/training/reporting/whereabouts.py", line 42 in wait
  File "/a/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 4394 in {function}
  File "/a/lib/python3.11/site-packages/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", line 119 in __call__
  File "/a/launcher/training/engines/fsdp.py", line 75 in micro_step
"""


@pytest.mark.parametrize(
    ("function", "collective"),
    [
        ("all_gather_into_tensor", "all_gather"),
        ("all_reduce", "all_reduce"),
        ("reduce_scatter_tensor", "reduce_scatter"),
        ("x", "a collective"),
    ],
)
def test_a_stack_tells_its_collective(function: str, collective: str) -> None:
    assert stacks.innermost(STACK.format(function=function)) == (collective, "micro_step (fsdp.py:75)")


def test_a_stack_elsewhere_tells_where() -> None:
    text = (
        'Current thread 0x1 (most recent call first):\n  File "/a/lib/python3.11/json/decoder.py", line 3 '
        "in decode\n"
    )
    assert stacks.innermost(f'{text}  File "/b/tasks/chat.py", line 88 in encode\n') == (
        "",
        "encode (chat.py:88)",
    )
    assert stacks.innermost("") == ("", "")


FEED = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Thread 0x2 (most recent call first):
  File "/a/launcher/tasks/causal_lm.py", line 196 in collate
  File "/a/launcher/training/data/feed.py", line 121 in _make
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 58 in run

Current thread 0x3 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/a/launcher/training/data/feed.py", line 98 in _taken
  File "/a/launcher/training/trainer.py", line 240 in _accumulate
"""


def test_the_thread_that_makes_the_next_micro_batch_tells_where() -> None:
    assert stacks.innermost(FEED) == ("", "collate (causal_lm.py:196)")
    alone = FEED[FEED.index("Current") :]
    assert stacks.innermost(alone) == ("", "_taken (feed.py:98)")


@pytest.mark.parametrize("name", ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_a_flight_recorder_is_asked_where_there_is_one(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fr3.pipe")
    reading = os.open(tmp_path / "fr3.pipe", os.O_RDONLY | os.O_NONBLOCK)
    variables = {**os.environ, "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{tmp_path}/fr", name: "/t/trace_"}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=variables, stdin=subprocess.PIPE) as process:
        wait_for(lambda: "NCCL" in stacks._flight_recorder(3, process.pid))
        assert stacks._flight_recorder(3, process.pid) == "NCCL's flight recorder writes /t/trace_3"
        assert "does not listen" in stacks._flight_recorder(4, process.pid)
    assert os.read(reading, 9).startswith(b"1")
    os.close(reading)


def watched(run: RunDirectory, hangs: list[Hangs], until: Callable[[list[str]], bool]) -> list[str]:
    """The lines that the first node says until something is so."""
    lines: list[str] = []
    over = threading.Event()

    def one(watch: Hangs) -> None:
        with watch.watching():
            over.wait()

    threads = [threading.Thread(target=one, args=(watch,)) for watch in hangs]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: lines.extend(hangs[0].said()) or until(lines))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return lines


def test_two_nodes_watch_and_the_first_one_judges(
    start: Callable[[RunDirectory, int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may hold up the watchers and the disk for that long; here nothing is told by it.
    monkeypatch.setattr(watchdog, "GAP_SECONDS", math.inf)
    monkeypatch.setattr(hangs_module, "_UNHEARD_SECONDS", math.inf)
    run = RunDirectory(tmp_path)
    pids = [start(run, rank) for rank in (0, 1)]
    watches = [Hangs(run, 1, {rank: pids[rank]}, hang_after=3.0, node=rank, nodes=2) for rank in (0, 1)]
    for number, watch in enumerate(watches):
        watch.here.host = f"n{number + 1}"
    os.kill(pids[1], signal.SIGSTOP)
    wait_for(lambda: sight.look(pids[1]).state == "T")
    written = [run.attempt(1) / name for name in ("stacks-1.txt", "stacks-1-node-1.txt")]

    def told(_: list[str]) -> bool:
        # What is said last goes to the disk by a thread of its own.
        return (
            watches[0].failure is not None
            and all(path.exists() for path in written)
            and any(record["event"] == "suspected" for record in read(run.events_file))
        )

    lines = watched(run, watches, told)
    failure = watches[0].failure
    assert failure is not None and watches[1].failure is None
    assert (failure.rank, failure.host, failure.exit_code, failure.failure_class) == (
        1,
        "n2",
        HungError.exit_code,
        "hung",
    )
    said = (
        "after step 12 (a step takes 0.2 s): rank 1 on n2 is stopped (SIGSTOP); rank 0 waits in a "
        "collective. Stacks: "
    )
    assert len(lines) == 1 and said in lines[0]
    [suspected] = [record for record in read(run.events_file) if record["event"] == "suspected"]
    assert suspected["line"] in lines[0] and [one["state"] for one in suspected["ranks"]] == ["S", "T"]
    assert "in all_gather" in (run.attempt(1) / "stacks-1.txt").read_text()
    assert "it writes no stack" in (run.attempt(1) / "stacks-1-node-1.txt").read_text()


def test_a_stopped_agent_of_another_node_is_named_by_the_first(
    start: Callable[[RunDirectory, int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GAP_SECONDS", math.inf)
    monkeypatch.setattr(hangs_module, "_UNHEARD_SECONDS", math.inf)
    run = RunDirectory(tmp_path)
    run.attempt(1).mkdir(parents=True)
    watches = [Hangs(run, 1, {}, hang_after=2.0, node=node, nodes=2) for node in (0, 1)]
    with subprocess.Popen(["sleep", "600"]) as agent:
        try:
            for number, watch in enumerate(watches):
                watch.here.host, watch.here.agent_pid = f"n{number + 1}", agent.pid if number else os.getpid()
            os.kill(agent.pid, signal.SIGSTOP)
            lines = watched(run, watches, lambda _: watches[0].failure is not None)
        finally:
            agent.kill()
    failure = watches[0].failure
    assert failure is not None and (failure.rank, failure.host, failure.pid) == (-1, "n2", agent.pid)
    assert len(lines) == 1 and lines[0].startswith("the agent on n2 is stopped (SIGSTOP) for ")
    content = published(run.attempt(1) / "ranks-1.json")
    assert content is not None and content.agent is not None and content.agent.stopped_seconds > 2


def test_a_run_directory_that_does_not_answer_stops_no_watch(
    start: Callable[[RunDirectory, int], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is said all the same; what was to be written waits."""
    run = RunDirectory(tmp_path)
    pid = start(run, 0)
    hangs = Hangs(run, 1, {0: pid}, hang_after=2.0)
    answers = threading.Event()
    monkeypatch.setattr(Hangs, "_publish", lambda self, own: answers.wait(60))
    lines = watched(run, [hangs], lambda _: hangs.failure is not None)
    answers.set()
    assert any("no step for" in line for line in lines)


def test_a_fault_in_the_watch_ends_no_run(start: Callable[[RunDirectory, int], int], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    hangs = Hangs(run, 1, {0: start(run, 0)}, hang_after=2.0)
    hangs._judge_all = lambda now: 1 / 0  # type: ignore[assignment, return-value, method-assign]
    lines = watched(run, [hangs], bool)
    assert hangs.failure is None and "hangs are no longer watched for (ZeroDivisionError" in lines[0]


def test_a_second_hang_of_one_node_leaves_it_out() -> None:
    def hung(host: str) -> Attempt:
        return Attempt(1, "failed", 0, 5, failure_class="hung", cause="no step for 31 s", host=host)

    assert decide([hung("n2")], True, 3).exclude == () and decide([hung("n2")], True, 3).again
    assert decide([hung("n2"), hung("n1")], True, 3).exclude == ()
    assert decide([hung("n2"), hung("n1"), hung("n2")], True, 3).exclude == ("n2",)


def test_every_place_has_a_number_that_stays() -> None:
    assert len(set(places.PLACES)) == len(places.PLACES) < 64


@pytest.mark.parametrize(("command", "code"), [("kill -9 $$", -9), ("exit 7", 7)])
def test_how_a_child_ended_that_its_parent_has_not_waited_for(command: str, code: int) -> None:
    child = subprocess.Popen(["sh", "-c", command])
    try:
        while sight.look(child.pid).state != "Z":
            time.sleep(0.01)
        assert sight.exit_code(child.pid) == code
    finally:
        child.wait()
    assert sight.exit_code(child.pid) is None, "gone"
    assert sight.exit_code(os.getpid()) is None, "it lives"
