"""Samples of what a model says, as they lie in a run directory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.panel import Panel

from launcher.cli.display import summary
from launcher.cli.watch import _follow, events, screen
from launcher.cli.watch_state import Watched
from launcher.runs import samples
from launcher.runs.events import append, event
from launcher.runs.layout import RunDirectory


def test_the_newest_are_found_by_their_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert samples.newest(run) is None
    for step in (99_999_999, 100_000_000, 7):
        samples.write(run, step, [{"row": step, "input": {"text": "ü"}, "answer": {"label": "a"}}])
    (tmp_path / "samples" / "step-999999999999.jsonl.swp").write_text("x")
    assert samples.newest(run) == (
        100_000_000,
        [{"row": 100_000_000, "input": {"text": "ü"}, "answer": {"label": "a"}}],
    )


def test_a_damaged_file_shows_what_is_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    samples.write(run, 1, [{"row": 0, "answer": {"label": "a"}}])
    path = tmp_path / "samples" / "step-00000001.jsonl"
    path.write_text(path.read_text() + '{"row": 1, "ans')
    found = samples.newest(run)
    assert found is not None and [row["row"] for row in found[1]] == [0]
    path.write_bytes(b"\xff\xfe")
    assert samples.newest(run) in (None, (1, []))


def test_lines_are_short_and_tell_the_texts(tmp_path: Path) -> None:
    rows = [
        {"row": 0, "input": {"text": "good  film"}, "answer": {"label": "positive", "probability": 0.98765}},
        {"row": 1, "input": {"question": "why?", "context": "x" * 1000}, "answer": {"text": "so"}},
    ]
    first, second = samples.lines(rows)
    assert first == "good film -> label: positive, probability: 0.9877"
    assert second.startswith("question: why?, context: xxx") and second.endswith("… -> so")


def test_the_truth_and_what_the_model_says_are_told_apart_and_stay_whole() -> None:
    row = {"input": {"text": "x" * 90, "opinion": "bad"}, "answer": {"label": "good"}, "truth": ["opinion"]}
    [line] = samples.lines([row], 60)
    assert len(line) == 60 and line.startswith("xxx") and line.endswith("x…; true: bad; model: good")
    row["input"] = {"text": "short", "opinion": "bad"}
    assert samples.lines([row]) == ["short; true: bad; model: good"]
    row["truth"] = ["gone"]
    assert samples.lines([row]) == ["text: short, opinion: bad -> good"]


def test_a_chat_that_is_scored_is_readable(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    chat = [{"role": "user", "content": "Hello\nyou"}, {"role": "assistant", "content": "Hi"}]
    answer = {"log_probability": -1.5, "tokens": 2, "perplexity": 2.117}
    samples.write(run, 4, [{"row": 0, "input": {"messages": chat}, "answer": answer}])
    scored = "user: Hello you / assistant: Hi -> log_probability: -1.5, tokens: 2, perplexity: 2.117"
    lines = summary(run, "run").splitlines()
    assert (
        f"    {scored}"
        == lines[lines.index("  how probable held-out texts are to the model, after step 4:") + 1]
    )


@pytest.mark.parametrize(
    ("texts", "answer", "expected"),
    [
        ("a" * 90, "b" * 3, "a" * 32 + "… -> bbb"),
        ("a" * 3, "b" * 90, "aaa -> " + "b" * 32 + "…"),
        ("a" * 90, "b" * 90, "a" * 17 + "… -> " + "b" * 17 + "…"),
        ("a" * 18, "b" * 18, "a" * 18 + " -> " + "b" * 18),
    ],
)
def test_the_answer_is_never_cut_away_for_a_long_text(texts: str, answer: str, expected: str) -> None:
    assert samples.lines([{"input": {"text": texts}, "answer": {"label": answer}}], 40) == [expected]
    run_width = samples.lines([{"input": {"text": texts * 9}, "answer": {"label": answer * 9}}])
    assert all(len(line) <= 600 for line in run_width)


def test_watch_and_the_summary_show_the_newest(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    samples.write(run, 4, [{"row": 0, "input": {"text": "good film"}, "answer": {"label": "positive"}}])
    seen = Watched(run).look(ask=False)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(screen(seen, 120), height=40)
    drawn = console.export_text()
    assert "predictions for held-out rows after step 4" in drawn and "good film -> positive" in drawn
    assert "held-out rows, after step 4:\n    good film -> positive" in summary(run, "run")
    samples.write(run, 8, [{"row": 0, "input": {"text": "good film"}, "answer": {"log_probability": -4.0}}])
    console.print(screen(Watched(run).look(ask=False), 120), height=40)
    assert "how probable held-out texts are to the model after step 8" in console.export_text()


@pytest.mark.parametrize(("width", "height"), [(40, 24), (56, 24), (60, 24), (80, 22), (80, 24), (120, 40)])
def test_the_screen_of_a_run_fits_its_terminal(tmp_path: Path, width: int, height: int) -> None:
    run = new_run(tmp_path)
    for number in range(2, 20):
        append(run.metrics_file, {"kind": "train", "step": number, "loss": 4.0 / number})
    event(run.events_file, "checked", ours="11.0138", own="11.0073", seconds=1.6)
    for number in range(9):
        event(run.events_file, "saved", step=number, bytes=1 << 20)
    seen = Watched(run).look(ask=False)
    beat = {"rank": 0, "host": "node-1", "step": 19, "busy_seconds": 1.5, "behind_seconds": 0.1}
    seen["ranks"] = [beat | {"slowness": 0, "memory_bytes": 1.3 * 2**30}]
    seen["samples"] = 4, [{"input": {"text": f"film {row}"}, "answer": {"label": "good"}} for row in range(4)]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(screen(seen, width, height), height=height)
    drawn = console.export_text()
    first = events(seen["events"]).lines[1]
    assert first.endswith("checked  a row gives 11.0138, by the model's own class 11.0073")
    assert all(len(line) <= width for line in drawn.splitlines())
    assert ("1.3 GiB" in drawn) == (width >= 56), "the loss comes first"
    assert f"saved  step 8{'  size 1.05 MB' * (width > 40)}" in drawn and "film 0 -> good" in drawn
    plotted = [line for line in drawn.splitlines() if "┤" in line or "└" in line]
    assert len(plotted) >= 3 and "└" in plotted[-1], "the axis of the steps is there"


def test_the_last_picture_of_a_finished_run_fits_and_says_why_it_leaves(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    event(run.events_file, "finished", step=1)
    run.finished_file.touch()
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    _follow(Watched(run), console, 0.2)
    whole, _, left = console.file.getvalue().rpartition("\x1b[?1049l")  # type: ignore[attr-defined]
    leave = "Ctrl-C leaves; the run goes on"
    assert leave in whole and leave not in left
    lines = left.removesuffix("\n").split("\n")
    assert lines[-1] == f"{tmp_path.name} is finished: there is nothing more to watch" and len(lines) == 23


def new_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    event(run.events_file, "started", attempt=1, world_size=1)
    append(run.metrics_file, {"kind": "train", "step": 1, "loss": 2.0})
    return run


def test_of_many_events_the_newest_are_seen_with_their_values() -> None:
    """A panel with too little room leaves out the oldest, not the newest."""
    many: list[dict[str, Any]] = [
        {"time": 1.0, "event": "evaluated", "step": step, "metrics": {"loss": 2.123456, "accuracy": 0.5}}
        for step in range(9)
    ]
    many.append(
        {"time": 1.0, "event": "saved", "step": 9, "bytes": 273_713_166, "digest": "8272fcd26d675f20"}
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(Panel(events(many), height=4))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "evaluated  step 8  loss 2.123  accuracy 0.5" in drawn and "saved  step 9  size 274 MB" in drawn
    assert "step 7" not in drawn and "8272fcd" not in drawn
    console.print(events(many))
    assert "step 0" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_event_takes_one_line_of_the_panel() -> None:
    """One that says more elsewhere would push the newest out of it."""
    phases = {"phases": {"steady step": 2**30}}
    more = {"event": "compared", "time": 1.0, "device": "cpu", "expected": phases}
    many = [more | {"measured": {"phases": {"steady step": 2**31}}}, {"event": "saved", "time": 2.0}]
    first, last = events(many).lines
    assert "its peak of 2.0 GiB" in first and "\n" not in first and "saved" in last
