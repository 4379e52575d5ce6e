"""The pages of `launcher board` in a real browser: they follow runs, are used by keyboard, and ask nobody else."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.board import pages
from launcher.board.server import Server
from launcher.cli.progress import notice
from launcher.runs.layout import RunDirectory
from tests import browser as browsers
from tests.unit.report_runs import HOSTILE, a_run, step_record, write_metrics

pytest.importorskip("bokeh", reason="launcher[report] is not installed: no bokeh")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsers.installed() is None, reason="no Chromium is installed"),
]

_LIST = "location.pathname.length === 50 && document.readyState === 'complete'"
_POINTS = "Bokeh.documents[0].roots()[0].renderers[0].data_source.data"
_RENEWED = "Number(document.documentElement.dataset.renewed || 0)"


class Board:
    """A server of a folder of three runs, until it is ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = Server(0, pages.Pages(folder, notice).answer)
        self.address = self._server.address
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Tunnel:
    """Carries connections from a port of its own to another one, as `ssh -L` does."""

    def __init__(self, to: int) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._to, self.port = to, self._listening.getsockname()[1]

    def __enter__(self) -> Tunnel:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                near, far = self._listening.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(one, other), daemon=True).start()


def _carry(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := one.recv(1 << 16):
            other.sendall(part)
        other.shutdown(socket.SHUT_WR)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    monkeypatch.setattr(pages, "_EVERY_SECONDS", 0.2)
    monkeypatch.setattr(pages, "_SHARE", 0)
    for name, text in (("one", "the reason"), ("other", "the reason"), ("hostile", HOSTILE)):
        run = a_run(tmp_path / "runs" / name, num_steps=60, text=text)
        run.finished_file.unlink()
    board = Board(tmp_path / "runs")
    yield board
    board.end()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    with browsers.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(autouse=True)
def _quiet(browser: browsers.Browser, board: Board) -> Iterator[None]:
    """Nothing complains, and nothing but the board is asked for anything."""
    browser.requests.clear()
    browser.complaints.clear()
    yield
    browser.call("Page.navigate", url="about:blank")  # what is open goes on asking
    assert browser.complaints == []
    asked = [one for one in browser.requests if not one.startswith(("data:", "blob:", "about:"))]
    assert asked and all(one.startswith(board.address) for one in asked)


def test_on_a_phone_and_a_desk_light_and_dark(board: Board, browser: browsers.Browser) -> None:
    for width, dark in ((1280, False), (390, True)):
        for page in ("", "report?run=one", "report?run=one&run=hostile"):
            browser.open(board.address + page, width, dark, ready=browsers.DRAWN if page else _LIST)
            assert browser.value("document.documentElement.scrollWidth") <= width
            ground = browser.value("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
            assert browser.value("window.stolen === undefined")
        assert browser.value("document.documentElement.dataset.drawn") == "8", (
            "one metric is of the other alone"
        )


def test_through_a_tunnel_to_another_port_it_is_live(board: Board, browser: browsers.Browser) -> None:
    with Tunnel(int(board.address.split(":")[2].split("/")[0])) as tunnel:
        board.address = f"http://localhost:{tunnel.port}/{board.address.split('/')[3]}/"
        browser.open(board.address, 1280, ready=_LIST)
        rows = "document.querySelectorAll('tbody tr').length"
        assert browser.value(rows) == 3
        a_run(board.folder / "fourth", num_steps=20, text="the reason")
        browser.wait(f"{rows} === 4")
        browser.call("Page.navigate", url="about:blank")


def test_a_report_follows_its_run_and_leaves_what_is_looked_at(
    board: Board, browser: browsers.Browser
) -> None:
    browser.open(f"{board.address}report?run=one", 1280)
    browser.value("document.querySelector('#environment-0 ~ details summary').click()")
    browser.value(
        "document.querySelector('#checkpoints-0').scrollIntoView(); document.querySelector('#plot-0').focus()"
    )
    browser.press("+")
    span = "(({start, end}) => end - start)(Bokeh.documents[0].roots()[0].x_range)"
    looked_at = (
        "scrollY",
        span,
        "document.querySelectorAll('details[open]').length",
        "document.activeElement.id",
    )
    before = [browser.value(one) for one in looked_at]
    assert before[3] == "plot-0" and browser.value("(window.kept = Bokeh.documents[0]) !== undefined")
    write_metrics(RunDirectory(board.folder / "one"), [step_record(step, loss=777.25) for step in (61, 62)])
    browser.wait(f"{_RENEWED} >= 1")
    browser.wait(f"Math.max(...{_POINTS}.x) === 62")
    assert browser.value(f"Math.max(...{_POINTS}.y)") == 777.25
    assert [browser.value(one) for one in looked_at] == before
    assert browser.value("Bokeh.documents[0] === window.kept"), "the same figures took the new points"
    figures = "document.querySelector('#curves tbody').textContent"
    assert "777.2 at 61" in browser.value(figures)
    assert browser.value("document.getElementById('live').textContent") == "Live"


def test_a_curve_that_was_not_there_is_drawn(board: Board, browser: browsers.Browser) -> None:
    browser.open(f"{board.address}report?run=one&run=other", 1280)
    browser.value("document.querySelector('input[data-run=\"1\"]').click()")
    evaluated = {"kind": "evaluation", "step": 60, "metrics": {"loss": 1.0, "recall": 0.5}}
    write_metrics(RunDirectory(board.folder / "one"), [evaluated])
    browser.wait("document.documentElement.dataset.drawn === '8'")
    captions = "[...document.querySelectorAll('figcaption')].map((one) => one.textContent)"
    assert "evaluation: recall" in browser.value(captions)
    lines = "Bokeh.documents[0].roots().flatMap((one) => one.renderers)"
    assert browser.value(f"{lines}.filter((one) => one.name === 'run-1').every((one) => !one.visible)")
    assert browser.value(f"{lines}.filter((one) => one.name === 'run-0').every((one) => one.visible)")
    assert browser.value("Bokeh.documents.length") == 1


def test_a_run_that_has_not_begun_begins(board: Board, browser: browsers.Browser) -> None:
    run = RunDirectory(board.folder / "new")
    run.path.mkdir()
    run.plan_file.write_text("{}", encoding="utf-8")
    browser.open(f"{board.address}report?run=new", 1280, ready=f"{_LIST.replace('50', '56')}")
    assert (
        browser.value("document.querySelector('#curves').textContent").count("No step has been written") == 1
    )
    write_metrics(run, [step_record(1), step_record(2)])
    browser.wait("document.documentElement.dataset.drawn === '5'")


def test_runs_are_compared_by_keyboard(board: Board, browser: browsers.Browser) -> None:
    browser.open(board.address, 1280, ready=_LIST)
    ticked = 0
    for _ in range(60):
        browser.press("Tab")
        if ticked < 2 and browser.value("document.activeElement.matches('input[name=run]')"):
            browser.press(" ")
            ticked += 1
        if ticked == 2 and browser.value("document.activeElement.matches('.bar-of-choice button')"):
            break
    browser.press(" ")
    browser.wait(browsers.DRAWN)
    assert browser.value("location.search") == "?run=hostile&run=one"
    assert browser.value("document.querySelectorAll('#compare tbody tr').length") >= 2
    browser.value("document.querySelector('nav a').click()")
    browser.wait(_LIST)


def test_the_list_follows_and_keeps_what_is_ticked(board: Board, browser: browsers.Browser) -> None:
    browser.open(f"{board.address}?sort=run", 1280, ready=_LIST)
    browser.value("document.querySelector('input[value=other]').click()")
    new = RunDirectory(board.folder / "another")
    new.path.mkdir()
    new.plan_file.write_text("{}", encoding="utf-8")
    write_metrics(RunDirectory(board.folder / "one"), [step_record(61)])
    browser.wait("document.querySelectorAll('tbody tr').length === 4")
    assert browser.value("[...document.querySelectorAll('input:checked')].map((one) => one.value)") == [
        "other"
    ]
    rows = browser.value("[...document.querySelectorAll('tbody tr')].map((one) => one.dataset.key)")
    assert rows == ["another", "hostile", "one", "other"]
    browser.wait("document.querySelector('tr[data-key=one]').textContent.includes('61 of 60')")


def test_what_was_chosen_stays_from_page_to_page(board: Board, browser: browsers.Browser) -> None:
    browser.open(board.address, 1280, ready=_LIST)
    for _ in range(2):
        browser.value("document.getElementById('theme').click()")
    browser.value("document.querySelector('tr[data-key=one] a').click()")
    browser.wait(browsers.DRAWN)
    assert browser.value("document.getElementById('theme').textContent") == "Theme: dark"
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    browser.value("document.getElementById('theme').click()")


def test_held_it_stays_and_without_a_board_it_says_so(board: Board, browser: browsers.Browser) -> None:
    browser.open(f"{board.address}report?run=one", 1280)
    browser.value("document.getElementById('live').click()")
    before = browser.value(_RENEWED)  # it may have been renewed before it was held
    write_metrics(RunDirectory(board.folder / "one"), [step_record(61)])
    browser.value("new Promise((done) => setTimeout(done, 800))")
    assert (
        browser.value(_RENEWED) == before
        and browser.value("document.getElementById('live').textContent") == "Held"
    )
    browser.value("document.getElementById('live').click()")
    browser.wait(f"{_RENEWED} === {before + 1}")
    (board.folder / "one").rename(board.folder / "gone")
    browser.wait("document.getElementById('live').textContent === 'Not live: this is no longer there'")
    (board.folder / "gone").rename(board.folder / "one")
    browser.wait("document.getElementById('live').textContent === 'Live'")
    board.end()
    browser.wait("document.getElementById('live').textContent === 'Not live: the board does not answer'")
    assert all("404" in one or "ERR_CONNECTION_REFUSED" in one for one in browser.complaints)
    browser.complaints.clear()
    browser.value("document.getElementById('live').click()")


def test_nothing_leaves_and_nothing_foreign_runs(board: Board, browser: browsers.Browser) -> None:
    browser.open(f"{board.address}report?run=hostile", 1280)
    tried = (
        "fetch('http://192.0.2.1/a').then(() => 'left', () => 'stayed')",
        "fetch('http://localhost:1/a').then(() => 'left', () => 'stayed')",
        "new Promise((done) => { const one = new Image(); one.onload = () => done('left'); one.onerror = () => done('stayed');"
        " one.src = 'http://192.0.2.1/b'; })",
    )
    for attempt in tried:
        assert browser.value(attempt) == "stayed"
    browser.value(
        "(() => { const one = document.createElement('script'); one.textContent = 'window.stolen = 5'; document.body.append(one); })()"
    )
    assert browser.value("window.stolen === undefined")
    assert browser.complaints and all("Content Security Policy" in one for one in browser.complaints)
    browser.complaints.clear()
    browser.requests[:] = [
        one for one in browser.requests if "192.0.2.1" not in one and "localhost:1/" not in one
    ]
