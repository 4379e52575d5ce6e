"""`launcher doctor`: messages, neighbours, srun, and the command."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from pathlib import Path

import pytest

from launcher.cli import doctor as command
from launcher.cli import main as cli
from launcher.doctor import local
from launcher.doctor.cluster import Examination, Request
from launcher.doctor.compare import Node
from launcher.doctor.connectivity import Listener, reach, resolve
from launcher.doctor.finding import Finding, Report, failed, ok, warning
from launcher.doctor.srun import Step, encode
from launcher.errors import SchedulerError
from tests.unit.programs import Programs, programs

__all__ = ["programs"]
PLACE = Path("/shared")


class TestNeighbours:
    def test_names(self) -> None:
        assert resolve(["localhost", "surely.invalid", "10.1.2.3"]) == {
            "localhost": "127.0.0.1",
            "surely.invalid": "",
            "10.1.2.3": "10.1.2.3",
        }

    def test_ports_and_clocks(self) -> None:
        listener = Listener(28_500, "word")
        try:
            found = reach({"a": ("127.0.0.1", listener.port), "b": ("127.0.0.1", 9)}, "127.0.0.1", "word")
            assert found["a"][0] == "" and abs(found["a"][1]) < 100
            assert found["b"][0] == "127.0.0.1 port 9: Connection refused"
            assert (
                "somebody else listens there"
                in reach({"a": ("127.0.0.1", listener.port)}, "", "wrong")["a"][0]
            )
        finally:
            listener.server_close()


class TestStep:
    def step(self, script: str, said: list[str] | None = None) -> Step:
        return Step(["/bin/bash", "-c", script], dict(os.environ), (said if said is not None else []).append)

    @pytest.mark.parametrize("size", [0, 10, 599, 600, 601, 5000])
    def test_messages_arrive_whole_however_srun_mixes_their_lines(self, size: int, tmp_path: Path) -> None:
        messages = [{"text": f"{node} " * size, "signs": "äß\n\x00'\"\\"} for node in range(3)]
        lines = [
            [f"{node}: {line}" for line in encode({"order": "hello", **message}).splitlines(keepends=True)]
            for node, message in enumerate(messages)
        ]
        assert all(len(line) < 1000 for each in lines for line in each)
        mixed = [line for some in itertools.zip_longest(*lines, fillvalue="srun: odd\n") for line in some]
        (tmp_path / "lines").write_text("".join(mixed), encoding="utf-8")
        step = self.step(f"cat {tmp_path / 'lines'}")
        assert step.answers("hello", range(3), 600) == dict(enumerate(messages))
        step.end("")

    def test_what_is_no_message_is_none(self, tmp_path: Path) -> None:
        begun = (
            "",
            "0: hello",
            "@doctor {}",
            "x: @doctor {}",
            "0: @doctor {broken",
            "1: @doctor [1]",
            "2: @doctor? {}",
            "3: @doctor {}",
        )
        (tmp_path / "lines").write_text(
            "".join(f"{line}\n" for line in (*begun, *(f"{node}: @doctor." for node in range(5))))
        )
        with (tmp_path / "lines").open("a", encoding="utf-8") as file:
            file.write(' 12: @doctor {"order": "hello", "a": 1}\n 12: @doctor.\n')
        step = self.step(f"cat {tmp_path / 'lines'}")
        assert step.first(600) == {12: {"a": 1}}
        step.end("")

    @pytest.mark.parametrize(("text", "numbers"), [("0", {0}), ("0,2-4", {0, 2, 3, 4}), ("7,", {7})])
    def test_numbers_of_tasks(self, text: str, numbers: set[int]) -> None:
        step = self.step(f"echo 'srun: error: n1: tasks {text}: Exited' >&2; exec sleep 600")
        assert step.answers("hello", numbers, 600) == {} and step.ended == numbers
        step.end("")

    def test_no_srun(self) -> None:
        with pytest.raises(SchedulerError, match="no-srun is not on this machine"):
            Step(["no-srun"], {}, print)

    @pytest.mark.parametrize(
        ("script", "said"),
        [
            (
                "echo 'srun: error: Unable to allocate resources: Invalid account' >&2; exit 1",
                "srun: Invalid account$",
            ),
            ("exit 1", "srun: ended without a word"),
            ("echo odd >&2; exit 1", "srun: odd"),
        ],
    )
    def test_srun_that_ends_at_once(self, script: str, said: str) -> None:
        step = self.step(script)
        with pytest.raises(SchedulerError, match=said):
            step.first(600)
        step.end("")

    def test_a_job_that_waits(self) -> None:
        said: list[str] = []
        step = self.step("echo 'srun: job 7 queued and waiting for resources' >&2; exec sleep 600", said)
        while not said:
            time.sleep(0.01)
        with pytest.raises(SchedulerError, match=r"waits in the queue; give it longer with --wait SECONDS"):
            step.first(0.1)
        assert said == ["job 7 waits in the queue"]
        step.end("")

    def test_answers_of_those_that_are_left(self) -> None:
        script = """echo '0: @doctor {"order": "hello"}'; echo '0: @doctor.'
echo '2: @doctor {"order": "old"}'; echo '2: @doctor.'; echo '1: Traceback: it broke' >&2
echo 'srun: error: n2: tasks 1-2: Exited with exit code 1' >&2; read line; read line; echo "0: $line" """
        step = self.step(script)
        assert set(step.first(600)) == {0}
        assert step.answers("hello", [1, 2], 600) == {0: {}}
        assert step.ended == {1, 2} and step.last_words == {1: "Traceback: it broke"}
        step.tell("nothing")
        step.end("")

    def test_what_does_not_end_is_killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("launcher.doctor.srun._SECONDS_TO_END", 0.3)
        said = """echo '0: @doctor {"order": "hello"}'; echo '0: @doctor.'"""
        step = self.step(f"trap '' TERM; {said}; while :; do sleep 0.1; done")
        step.first(600)
        step.end("no-such-job")
        assert step._srun.returncode == -9

    def test_inside_of_a_job_the_step_alone_is_cancelled(self) -> None:
        examination = Examination(Request(2, PLACE), print, [Node("n1", {"hello": {"step": "3"}})], "12")
        assert examination._to_cancel(inside=True) == "12.3" and examination._to_cancel(inside=False) == "12"
        assert Examination(Request(2, PLACE), print)._to_cancel(inside=True) == ""

    def test_what_srun_is_asked(self) -> None:
        request = Request(3, PLACE, ("--partition=a b",), gpus_per_node=4, interface="eth1")
        asked = request.command("word", inside=True)
        assert {"--nodes=3", "--gres=gpu:4", "--overlap", "--partition=a b", "--no-kill"} <= set(
            asked
        ) and asked[-1] == "eth1"
        assert not {"--overlap", "--gres=gpu:0"} & set(Request(1, PLACE).command("word", inside=False))


class TestCommand:
    def call(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["doctor", *arguments])
        return int(leaving.value.code or 0)

    @pytest.fixture
    def found(self, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
        findings = [ok("Slurm", "[bold]there[/bold]")]
        monkeypatch.setattr(local, "examine", lambda *_: Report("box", tuple(findings)))
        return findings

    def test_all_is_well(self, found: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
        assert self.call() == 0
        out = capsys.readouterr().out
        assert "[bold]there[/bold]" in out and "\x1b" not in out

    def test_a_warning_is_told_and_is_no_failure(
        self, found: list[Finding], capsys: pytest.CaptureFixture[str]
    ) -> None:
        found.append(warning("clock", "drifts", "mend it"))
        assert self.call() == 0
        assert "warning box: clock: drifts\n  mend it" in capsys.readouterr().out

    def test_something_is_wrong(self, found: list[Finding], capsys: pytest.CaptureFixture[str]) -> None:
        found.append(failed("munge", "is [red]away", "start it"))
        assert self.call("--json") == 1
        said = json.loads(capsys.readouterr().out)
        assert (
            said["verdict"] == said["nodes"][0]["verdict"] == "failed" and said["nodes"][0]["node"] == "box"
        )
        assert self.call() == 1
        assert "failed box: munge: is [red]away\n  start it" in capsys.readouterr().out

    def test_no_srun_is_a_finding(
        self, found: list[Finding], programs: Programs, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call("--slurm", "--json") == 1
        assert (
            "srun is not on this machine"
            in json.loads(capsys.readouterr().out)["nodes"][0]["checks"][-1]["found"]
        )

    def test_options_that_would_do_nothing(
        self, found: list[Finding], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call("--nodes", "2", "--partition", "main", "--srun=--mem=1G") == 2
        err = capsys.readouterr().err
        assert (
            "3 problems" in err and "--partition = 'main': is for the nodes of a cluster: add --slurm" in err
        )

    def test_colour_on_a_terminal_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr("sys.stdout", terminal)
        command._show([Report("box", (failed("a", "b", "c"),))])
        assert "\x1b[1;31mfailed" in terminal.getvalue()
