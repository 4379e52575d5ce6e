"""`launcher board`: who is answered, what is handed out, and that it is what other commands say."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.board.listing import Table
from launcher.board.pages import MOST_COMPARED, Pages
from launcher.board.server import Answer, Question, Server
from launcher.cli.app import app
from launcher.cli.progress import notice
from launcher.errors import ConfigurationError
from launcher.runs.layout import RunDirectory
from tests.unit.long_run import write_events
from tests.unit.report_runs import BEGAN, HOSTILE, a_run, step_record, write_metrics

needs_bokeh = pytest.mark.skipif(
    find_spec("bokeh") is None, reason="launcher[report] is not installed: no bokeh"
)
needs_jinja = pytest.mark.skipif(
    find_spec("jinja2") is None, reason="launcher[report] is not installed: no jinja2"
)


class Reply:
    """What came back."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.text = answer.status, answer.headers, answer.read().decode()


class Asking:
    """Someone who asks a server, with its token or without."""

    def __init__(self, server: Server) -> None:
        self.port, self.root = server.server_address[1], f"/{server.token}/"

    def __call__(self, page: str = "", method: str = "GET", root: str | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, (self.root if root is None else root) + page, skip_host="Host" in named)
        for name, value in named.items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            return Reply(connection.getresponse())
        finally:
            connection.close()


@contextmanager
def serving(folder: Path) -> Iterator[Asking]:
    with Server(0, Pages(folder, notice).answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield Asking(server)
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    a_run(tmp_path / "runs" / "one", num_steps=40)
    a_run(tmp_path / "runs" / "other", learning_rate=5e-4, num_steps=20)
    a_run(tmp_path / "secret", num_steps=20)
    return tmp_path / "runs"


@pytest.fixture
def ask(folder: Path) -> Iterator[Asking]:
    with serving(folder) as asking:
        yield asking


class TestWhoIsAnswered:
    @pytest.mark.parametrize("root", ["/", "", "/runs.json", "/0123/", "/é/", "http://127.0.0.1/", "//"])
    def test_without_the_token_nothing_is_told(self, root: str, ask: Asking) -> None:
        connection = socket.create_connection(("127.0.0.1", ask.port), timeout=60)
        connection.sendall(f"GET {root or '/'} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert (
            text.startswith("HTTP/1.0 403 ")
            and "lacks the board's token" in text
            and "one" not in text.split()
        )

    def test_a_token_that_is_nearly_right_is_wrong(self, ask: Asking) -> None:
        for root in (
            ask.root[:-2] + "/",
            ask.root[:-1] + "0/",
            ask.root.upper(),
            "/" + ask.root[1:].swapcase(),
        ):
            if root != ask.root:
                assert ask(root=root).status == 403
        assert len(ask.root) == 50, "192 bits"

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", "", "localhost@evil.example", "[::1"],
    )
    def test_another_name_of_this_machine_is_refused(self, host: str, ask: Asking) -> None:
        reply = ask(Host=host)
        assert reply.status == 421 and "127.0.0.1 and localhost alone" in reply.text

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:8080", "127.0.0.1:9"])
    def test_at_the_end_of_a_tunnel_the_port_may_be_another(self, host: str, ask: Asking) -> None:
        assert ask("runs.json", Host=host).status == 200

    def test_two_names_or_none_are_refused(self, ask: Asking) -> None:
        for hosts in ("", "Host: localhost\r\nHost: localhost\r\n"):
            connection = socket.create_connection(("127.0.0.1", ask.port), timeout=60)
            connection.sendall(f"GET {ask.root} HTTP/1.1\r\n{hosts}\r\n".encode())
            assert connection.recv(65536).startswith(b"HTTP/1.0 421 ")

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
    def test_it_is_for_reading_alone(self, method: str, ask: Asking) -> None:
        reply = ask(method=method)
        assert reply.status == 405 and reply.headers["Allow"] == "GET, HEAD"

    def test_what_is_no_request_is_refused(self, ask: Asking) -> None:
        assert ask(method="BREW").status == 501
        assert ask("x" * 70_000).status == 414
        assert ask("?" + "&".join("run=x" for _ in range(2000))).status == 400

    def test_every_answer_keeps_to_itself(self, ask: Asking) -> None:
        for reply in (ask("runs.json"), ask("none"), ask(root="/"), ask(method="POST"), ask(method="BREW")):
            assert reply.headers["Cache-Control"] == "no-store"
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Referrer-Policy"] == "no-referrer"
            assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
            assert "Set-Cookie" not in reply.headers and "Python" not in reply.headers["Server"]

    def test_it_listens_on_this_machines_own_address_alone(self) -> None:
        with Server(0, lambda question: Answer()) as server:
            assert server.server_address[0] == "127.0.0.1" and server.socket.family == socket.AF_INET

    def test_who_says_nothing_keeps_nobody_waiting(self, ask: Asking) -> None:
        silent = [socket.create_connection(("127.0.0.1", ask.port)) for _ in range(8)]
        silent[0].sendall(b"GET / HTT")
        assert ask("runs.json").status == 200
        for one in silent:
            one.close()
        assert ask("runs.json").status == 200

    def test_a_page_that_fails_takes_no_other_with_it(self) -> None:
        def answer(question: Question) -> Answer:
            raise RuntimeError("HF_TOKEN=abcdefgh12345678")

        with Server(0, answer) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            for _ in range(2):
                reply = Asking(server)()
                assert reply.status == 500
                assert reply.text == "It cannot be shown: RuntimeError: HF_TOKEN=***\n"
            server.shutdown()


class TestWhatIsHandedOut:
    def test_the_runs_are_those_of_the_list(self, folder: Path, ask: Asking) -> None:
        listed = json.loads(CliRunner().invoke(app, ["list", str(folder), "--json"]).output)
        told = json.loads(ask("runs.json").text)
        for one in (*listed["runs"], *told["runs"]):
            one.pop("checkpoint_age_seconds")
        assert told == listed and [one["name"] for one in told["runs"]] == ["one", "other"]

    @pytest.mark.parametrize(
        "name",
        ["..", "../secret", "%2e%2e/secret", "/etc", "one/..", "", ".", "one%00", "linked", "../runs/one"],
    )
    def test_nothing_outside_of_the_folder_is_a_run(self, name: str, folder: Path, ask: Asking) -> None:
        (folder / "linked").symlink_to(folder.parent / "secret")
        assert ask(f"report?run={name}").status == 404
        assert ask(name).status in (404, 200) and "secret" not in ask(name).text
        assert "linked" not in ask("runs.json").text

    @pytest.mark.parametrize("page", ["one/plan.json", "../one", "report/one", "runs.json/", "page.js"])
    def test_no_file_is_handed_out(self, page: str, ask: Asking) -> None:
        assert ask(page).status == 404

    def test_without_its_slash_or_a_run_it_leads_to_the_list(self, ask: Asking) -> None:
        reply = ask(root=ask.root[:-1])
        assert (reply.status, reply.headers["Location"]) == (301, ask.root)
        reply = ask("report")
        assert (reply.status, reply.headers["Location"]) == (303, "./")

    def test_more_runs_than_anyone_compares(self, folder: Path, ask: Asking) -> None:
        for number in range(MOST_COMPARED):
            (folder / f"run-{number}").mkdir()
            (folder / f"run-{number}" / "plan.json").write_text("{}")
        names = "&".join(f"run={path.name}" for path in folder.iterdir())
        reply = ask(f"report?{names}")
        assert reply.status == 400 and "choose at most 50" in reply.text

    @needs_jinja
    def test_the_list(self, folder: Path, ask: Asking) -> None:
        (folder / "new").mkdir()
        (folder / "new" / "plan.json").write_text("{}")
        page = ask().text
        assert re.findall(r'<tr data-key="(\w+)"', page) == ["one", "other", "new"]
        assert "40 of 40<progress" in page and "<small>loss</small> 0.075" in page
        for number, state in ((3, "all"), (2, "finished"), (1, "planned")):
            assert f">{state} {number}</a>" in page
        assert re.findall(r'<tr data-key="(\w+)"', ask("?sort=run").text) == ["new", "one", "other"]
        assert re.findall(r'<tr data-key="(\w+)"', ask("?sort=-step").text) == ["one", "other", "new"]
        assert re.findall(r'<tr data-key="(\w+)"', ask("?state=planned&sort=none").text) == ["new"]
        assert "There are no such runs" in ask("?state=burning").text

    def test_the_list_on_the_terminal_leaves_out_what_nobody_has(self, folder: Path) -> None:
        lines = CliRunner().invoke(app, ["list", str(folder)]).output.splitlines()
        assert lines[0].split() == ["run", "state", "step", "loss", "metric", "began", "took", "used", "disk"]
        assert lines[1].split()[:3] == ["one", "finished", "40"] and "loss 0.0750" in lines[1]
        assert "2025-10-0" in lines[1] and " 7 min 0 s " in lines[1]
        (folder.parent / "new" / "new").mkdir(parents=True)
        (folder.parent / "new" / "new" / "plan.json").write_text("{}")
        lines = CliRunner().invoke(app, ["list", str(folder.parent / "new")]).output.splitlines()
        assert lines[0].split() == ["run", "state", "step", "disk"] and lines[1] == "new  planned  0     2 B"

    def test_slurm_is_asked_once_for_all_who_look(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []

        def views_under_slurm(runs: Any) -> list[dict[str, Any]]:
            asked.append(1)
            return [{"name": "one", "slurm": {"job_id": "7"}}]

        monkeypatch.setattr("launcher.board.pages.views", views_under_slurm)
        pages = Pages(folder, notice)
        for _ in range(3):
            told = json.loads(pages.answer(Question("runs.json", {})).content)
        assert told["runs"][0]["slurm"] == {"job_id": "7"} and asked == [1]

    @needs_jinja
    def test_a_list_that_did_not_change_is_not_sent_again(self, folder: Path, ask: Asking) -> None:
        tag = ask().headers["ETag"]
        reply = ask("?again=1", If_None_Match=tag)
        assert (reply.status, reply.text, reply.headers["ETag"]) == (304, "", tag)
        write_metrics(RunDirectory(folder / "one"), [step_record(41)])
        reply = ask("?again=1", If_None_Match=tag)
        assert reply.status == 200 and "<script" not in reply.text and "41 of 40" in reply.text

    @needs_jinja
    def test_hostile_names_and_texts_stand_as_texts(self, folder: Path, ask: Asking) -> None:
        run = a_run(folder / "a<b>&\"'x", text=HOSTILE, num_steps=20)
        run.finished_file.unlink()
        write_events(
            run, [{"event": "failed", "failure": {"failure_class": "data", "cause": HOSTILE}, "time": BEGAN}]
        )
        page = ask().text
        assert "<script>window" not in page and "<img" not in page and "<b>" not in page
        link = re.search(r'href="(report\?run=a[^"]*)"', page)
        assert link and link[1] == "report?run=a%3Cb%3E%26%22%27x"
        assert HOSTILE in json.loads(ask("runs.json").text)["runs"][0]["failure"]["cause"]

    def test_head_is_the_head_alone(self, ask: Asking) -> None:
        head, whole = ask("runs.json", method="HEAD"), ask("runs.json")
        assert head.text == "" and int(head.headers["Content-Length"]) == len(whole.text.encode())


@needs_bokeh
@pytest.mark.slow
class TestReport:
    def test_it_is_the_reports_own_content(self, folder: Path, tmp_path: Path, ask: Asking) -> None:
        """Everything between the page's head and its foot is the same, to the letter."""
        for names in (["one"], ["one", "other"]):
            file = tmp_path / "page.html"
            CliRunner().invoke(app, ["report", *(str(folder / name) for name in names), "-o", str(file)])
            served = ask("report?" + "&".join(f"run={name}" for name in names)).text
            written = file.read_text(encoding="utf-8")
            assert _main(served) == _main(written) and len(_main(served)) > 5000
            assert served.count("</script>") == 4 and "connect-src 'self'" in served

    def test_it_follows_a_run_that_goes_on(self, folder: Path, ask: Asking) -> None:
        first = ask("report?run=one")
        tag, run = first.headers["ETag"], RunDirectory(folder / "one")
        assert ask("report?run=one&again=1", If_None_Match=tag).status == 304
        write_metrics(run, [step_record(41, loss=777.25)])
        reply = ask("report?run=one&again=1", If_None_Match=tag)
        assert reply.status == 200 and "777.2" in reply.text and len(reply.text) < 200_000
        assert "<script>" not in reply.text and "script-src 'none'" in reply.text
        assert _main(reply.text) == _main(ask("report?run=one").text)

    def test_a_run_that_was_begun_anew_is_read_anew(self, folder: Path, ask: Asking) -> None:
        assert "40" in ask("report?run=one").text
        run = RunDirectory(folder / "one")
        run.metrics_file.unlink()
        write_metrics(run, [step_record(step, loss=step * 1000.0) for step in (1, 2)])
        page = ask("report?run=one").text
        assert "2,000 <small>at 2</small>" in page and "<small>at 40</small>" not in _curves(page)

    def test_nothing_is_written(self, folder: Path, ask: Asking) -> None:
        (folder / "one" / "run_id").unlink()
        before = _files(folder)
        for page in ("", "runs.json", "report?run=one", "report?run=one&run=other", "report?run=one&again=1"):
            assert ask(page).status == 200
        assert _files(folder) == before


def _main(page: str) -> str:
    return page[page.index("<main") : page.index("</main>")]


def _curves(page: str) -> str:
    return page[page.index('id="curves"') : page.index('id="attempts-0"', page.index('id="curves"'))]


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


class TestTable:
    @staticmethod
    def _seen(name: str, **values: Any) -> dict[str, Any]:
        known: dict[str, Any] = dict.fromkeys(
            ("metric", "loss", "began", "seconds_left", "failure", "last_word")
        )
        known |= {"name": name, "state": "finished", "step": 1, "seconds": 0.0, "disk_bytes": 5}
        return known | values

    def test_what_is_not_known_comes_last_either_way(self) -> None:
        seen = [
            self._seen("a", loss="nan"),
            self._seen("b", loss=2.0),
            self._seen("c", loss=1.0),
            self._seen("d"),
        ]
        assert [row["name"] for row in Table.of(seen, "loss", "").rows] == ["c", "b", "a", "d"]
        assert [row["name"] for row in Table.of(seen, "-loss", "").rows] == ["b", "c", "a", "d"]
        assert Table.of(seen, "", "").disk_bytes == 20

    def test_links_keep_the_state_and_turn_the_order_round(self) -> None:
        seen = [self._seen("a", state="failed")]
        columns = {one.name: (one.way, one.link) for one in Table.of(seen, "-loss", "failed").columns}
        assert columns["loss"] == ("descending", "?sort=loss&state=failed")
        assert columns["run"] == ("none", "?sort=run&state=failed")
        assert columns["disk"] == ("none", "?sort=-disk&state=failed")
        states = Table.of(seen, "-loss", "failed").states
        assert [(one.name, one.number, one.shown) for one in states] == [("", 1, False), ("failed", 1, True)]


def _read_by(process: int) -> int:
    """Return the bytes that a process has read so far, from files and sockets."""
    return int(re.search(r"rchar: (\d+)", Path(f"/proc/{process}/io").read_text())[1])  # type: ignore[index]


class TestCommand:
    def test_a_folder_that_is_none_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("launcher.report.page.check_installed", lambda command: None)
        with pytest.raises(ConfigurationError, match=r"DIR = '.*none': is no folder; name the one"):
            CliRunner().invoke(app, ["board", str(tmp_path / "none")], catch_exceptions=False)

    def test_a_port_that_is_taken_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("launcher.report.page.check_installed", lambda command: None)
        with Server(0, lambda question: Answer()) as server:
            port = server.server_address[1]
            with pytest.raises(
                ConfigurationError, match=f"--port = {port}: .* in use; --port 0 takes a free one"
            ):
                CliRunner().invoke(app, ["board", str(tmp_path), "--port", str(port)], catch_exceptions=False)

    @pytest.mark.parametrize("display", ["", ":0"])
    def test_it_is_opened_without_its_token_on_a_command_line(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, display: str
    ) -> None:
        opened: list[str] = []

        def open_(address: str) -> bool:
            opened.append(Path(address.removeprefix("file://")).read_text())
            assert Path(address.removeprefix("file://")).parent.stat().st_mode & 0o077 == 0
            return True

        for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
            monkeypatch.delenv(name, raising=False)
        if display:
            monkeypatch.setenv("DISPLAY", display)
        monkeypatch.setattr("webbrowser.open", open_)
        monkeypatch.setattr("launcher.report.page.check_installed", lambda command: None)
        monkeypatch.setattr(threading.Event, "wait", lambda *_: True)
        done = CliRunner().invoke(app, ["board", str(folder), "--open"], catch_exceptions=False)
        address = re.search(r"  (http://\S+/)\n", done.output)
        assert done.exit_code == 0 and address is not None
        if display:
            assert opened == [f'<meta http-equiv="refresh" content="0; url={address[1]}">\n']
        else:
            assert not opened and "there is no browser here: open the address on a machine" in done.output

    @needs_bokeh
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_what_the_browser_reads_is_gone_at_the_end(
        self, number: signal.Signals, folder: Path, tmp_path: Path
    ) -> None:
        (own := tmp_path / "own").mkdir()
        command = [sys.executable, "-m", "launcher.cli.main", "board", str(folder), "--open"]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(own), "BROWSER": "true %s"}
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup it would be ignored
        )
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "if no page opens, open the address above\n"
            assert [path.name for path in own.glob("*/*")] == ["board.html"]
            process.send_signal(number)
            if number == signal.SIGHUP:  # by the shell, and by the kernel
                time.sleep(0.02)
                process.send_signal(number)
            assert process.wait(60) == 0 and not list(own.iterdir())
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    @needs_bokeh
    @pytest.mark.parametrize("as_json", [True, False])
    def test_it_says_where_it_is_and_ends_at_ctrl_c(self, as_json: bool, folder: Path) -> None:
        command = [sys.executable, "-m", "launcher.cli.main", "board", str(folder), *["--json"] * as_json]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            text = ""
            while not (text.endswith("}\n") if as_json else "Ctrl-C" in text):
                line = process.stdout.readline()
                assert line, process.stderr and process.stderr.read()
                text += line
            told = json.loads(text) if as_json else {}
            address = told["address"] if as_json else re.search(r"  (http://\S+/)\n", text)[1]  # type: ignore[index]
            port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([0-9a-f]{48})/", address).groups()  # type: ignore[union-attr]
            tunnel = told["tunnel"] if as_json else re.search(r"  (ssh .*)\n", text)[1]  # type: ignore[index]
            assert tunnel.startswith(f"ssh -N -L {port}:127.0.0.1:{port} ") and tunnel.endswith(
                socket.gethostname()
            )
            if as_json:
                assert told["port"] == int(port) and told["folder"] == str(folder)
            else:
                assert text.startswith("2 runs in ")
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
            connection.request("GET", f"/{token}/runs.json")
            assert len(json.loads(connection.getresponse().read())["runs"]) == 2
            connection.close()
            before = _read_by(process.pid)
            time.sleep(1.0)
            assert _read_by(process.pid) == before, "nobody asks, and nothing is read"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0 and process.stderr is not None and process.stderr.read() == ""
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def test_two_hundred_runs_within_two_seconds(tmp_path: Path) -> None:
    """By processor time: other work on the machine counts for nothing."""
    for number in range(200):
        run = RunDirectory(tmp_path / f"run-{number:03d}")
        run.path.mkdir()
        run.plan_file.write_text(
            json.dumps({"checkpoint": {"metric": "loss"}, "decisions": ["x" * 90] * 200})
        )
        write_metrics(run, [step_record(step) for step in range(1, 61)])
        write_events(run, [{"event": "started", "time": BEGAN}, {"event": "saved", "time": BEGAN + 9}])
        for step in (20, 40):
            run.checkpoint(step).mkdir(parents=True)
            for shard in range(8):
                (run.checkpoint(step) / f"__{shard}_0.distcp").touch()
    pages = Pages(tmp_path, notice)
    began = time.process_time()
    seen = json.loads(pages.answer(Question("runs.json", {})).content)["runs"]
    assert len(seen) == 200 and time.process_time() - began < 2
