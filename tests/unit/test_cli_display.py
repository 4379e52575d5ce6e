"""What people see of a run, from its files."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli.display import Display, _evaluations, summary
from launcher.cli.progress import AttemptView, notice
from launcher.runs.events import append, event
from launcher.runs.layout import RunDirectory
from launcher.runs.seen import Published, Seen, publish
from launcher.runs.wording import duration
from tests.training.plans import plan_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def step(run: RunDirectory, number: int, time: float) -> None:
    record = {
        "kind": "train",
        "step": number,
        "loss": 1 / number,
        "learning_rate": 1e-3,
        "tokens_per_second": 1234.5,
    }
    append(
        run.metrics_file,
        {
            **record,
            "num_tokens": 100,
            "tokens_so_far": 100 * number,
            "peak_memory_bytes": 2**30,
            "time": time,
        },
    )


def show(run: RunDirectory, terminal: bool) -> str:
    """What an attempt of two steps prints."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, no_color=True, highlight=False)
    display = Display(plan_of(Path("none"), 2), console, line_seconds=0)
    event(run.events_file, "evaluated", step=99, metrics={"loss": 7531.0})
    display.begin(run, 2)
    event(run.events_file, "phase", phase="preparing", done=5, total=10, unit="rows")
    display.read()
    display.tick()
    event(run.events_file, "training", first_step=0, total_steps=4, num_parameters=1000, flops_per_token=6000)
    event(run.events_file, "evaluated", step=0, metrics={"loss": 3.0, "accuracy": 0.5})
    step(run, 1, 10.0)
    step(run, 2, 12.0)
    event(run.events_file, "save_failed", step=2, reason="disk full")
    display._shown_at = 0.0
    display.read()
    display.tick()
    display.end()
    return file.getvalue()


def test_plain_lines_where_there_is_no_terminal(run: RunDirectory) -> None:
    text = show(run, terminal=False)
    assert "\x1b" not in text
    assert f"attempt 2 in {run.path}" in text and "preparing" in text
    assert "measured after step 0: loss 3.0000, accuracy 0.5000" in text
    assert "step 2 of 4  loss 0.5000  learning rate 1.00e-03  1,234 tokens/s  peak 1.0 GiB  4 s left" in text
    assert "warning: the save of step 2 failed, training goes on: disk full" in text
    assert "7531" not in text, "what happened before this attempt is not shown"
    assert "MFU" not in text, "the rate of a CPU is not known"


def test_one_live_display_on_a_terminal(run: RunDirectory) -> None:
    text = show(run, terminal=True)
    assert "5 of 10 rows" in text
    assert "step 2 of 4" in text and "loss 0.5000" in text and "4 s left" in text
    assert "measured after step" in text and "accuracy" in text
    assert text.count("measured after step 0:") == 0
    last = text.rpartition("measured after step")[2]
    assert "0.5000" in last and "\x1b[2K" not in last, "the evaluations stay where the live display ends"


def test_before_the_first_step_it_says_what_ranks_are_at(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = io.StringIO(), [100.0]
    monkeypatch.setattr("launcher.cli.progress.time.monotonic", lambda: now[0])
    console = Console(file=file, force_terminal=True, width=60, no_color=True, highlight=False)
    display = Display(plan_of(Path("none"), 2), console)
    display.begin(run, 1)
    run.attempt(1).mkdir(parents=True)
    ranks = [Seen(rank, "vm", 9, "starting", count=1) for rank in range(2)]

    def shown() -> str:
        display._shown_at, now[0] = 0.0, now[0] + 5
        display.read()
        file.truncate(file.seek(0))
        display.tick()
        return file.getvalue()

    assert "starting: importing PyTorch" in (text := shown()) and " 0 s" in text
    publish(run.attempt(1) / "ranks-0.json", Published(1, ranks))
    assert "importing PyTorch and Transformers" in shown() and "5 s" in shown() and "10 s" in shown()
    publish(run.attempt(1) / "ranks-0.json", Published(2, [replace(one, place="forward") for one in ranks]))
    event(run.events_file, "training", first_step=0, total_steps=4)
    assert "the first step" in shown()
    step(run, 1, 10.0)
    assert "step 1 of 4" in (text := shown()) and "the first step" not in text
    display.end()


@pytest.mark.parametrize("width", [60, 100])
def test_lines_break_between_words_on_a_terminal(run: RunDirectory, width: int) -> None:
    file = io.StringIO()
    display = Display(console=Console(file=file, force_terminal=True, width=width, highlight=False))
    text = "SIGINT: saving at the next step, then leaving, within 30 s; Ctrl-C again ends it at once, without saving"
    display.say(text)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines) and " ".join(lines).split() == text.split()


def test_of_a_script_it_is_shown_what_rank_0_prints(run: RunDirectory) -> None:
    file = io.StringIO()
    plan = plan_of(Path("none"), 2, script=("train.py",))
    display = Display(plan, Console(file=file, width=100, highlight=False), line_seconds=0)
    display.begin(run, 1)
    run.attempt(1).mkdir(parents=True)
    (run.attempt(1) / "rank-0.log").write_bytes(b"step 1\n 10%|#\r 90%|##\nhalf a li")
    (run.attempt(1) / "rank-1.log").write_text("another\n")
    display.read()
    display.tick()
    assert file.getvalue().splitlines()[-2:] == ["step 1", " 90%|##"]


def test_evaluations_that_are_left_out_are_marked() -> None:
    console = Console(file=io.StringIO(), width=60)
    for number, rows in ((4, ["0", "1", "2", "3"]), (9, ["0", "...", "6", "7", "8"])):
        with console.capture() as seen:
            console.print(_evaluations([(step, {"loss": 1.0}) for step in range(number)]))
        assert [line.split()[0] for line in seen.get().splitlines()[1:]] == rows


def test_a_quiet_display_has_a_bar_and_no_lines(run: RunDirectory) -> None:
    file = io.StringIO()
    display = Display(console=Console(file=file, force_terminal=True, width=100, highlight=False), quiet=True)
    display.begin(run, 1)
    event(run.events_file, "phase", phase="preparing", done=5, total=10, unit="rows")
    display.read()
    display.tick()
    display.end()
    assert "5 of 10 rows" in file.getvalue() and "attempt" not in file.getvalue()


def test_a_display_without_anything_to_show_ends_quietly(run: RunDirectory) -> None:
    display = Display(plan_of(Path("none"), 2), Console(file=io.StringIO()))
    display.tick()
    display.end()


def test_time_left_leaves_evaluations_out() -> None:
    progress = AttemptView()
    progress.event({"event": "training", "first_step": 0, "total_steps": 10})
    for number, at in ((1, 1.0), (2, 2.0)):
        progress.metric({"step": number, "loss": 1.0, "time": at})
    assert progress.seconds_left() == 8
    progress.event({"event": "phase", "phase": "evaluating", "done": 1, "total": 2})
    for number, at in ((3, 100.0), (4, 102.0)):
        progress.metric({"step": number, "loss": 1.0, "time": at})
    assert progress.seconds_left() == 12
    assert not progress.metric({"kind": "evaluation", "step": 4, "metrics": {}})


def test_utilisation_needs_a_known_device() -> None:
    progress = AttemptView(peak=989e12, flops_per_token=1e9, record={"tokens_per_second": 494_500})
    assert progress.share_of_peak() == pytest.approx(0.5)
    assert AttemptView(flops_per_token=1e9, record={"tokens_per_second": 1}).share_of_peak() is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_the_numbers_say_has_a_line() -> None:
    back = notice(
        {"event": "rewound", "step": 9, "checkpoint_step": 6, "reason": "the loss stayed above 2", "times": 1}
    )
    assert back == (
        "warning: step 9: the loss stayed above 2: the weights are those of the checkpoint of step 6 again; "
        "the samples since are left out (rewind 1 of this run)"
    )
    assert (
        notice({"event": "symptom", "step": 50, "text": "the loss stays"})
        == "warning: step 50: the loss stays"
    )
    assert "that of step 1, 2 was given up" in str(
        notice({"event": "made_room", "step": 9, "removed": [1, 2]})
    )


@pytest.mark.parametrize(
    ("trained", "adapter", "expected"),
    [
        (136_957_248, None, "136,957,248 parameters"),
        (2_442_240, "LoRA, rank 8", "2.4M of 137.0M parameters (LoRA, rank 8)"),
        (57_600, None, "57,600 of 137.0M parameters"),
        (None, None, "136,957,248 parameters"),
    ],
)
def test_how_many_parameters_train(trained: int | None, adapter: str | None, expected: str) -> None:
    record = {"event": "training", "first_step": 0, "total_steps": 12, "num_parameters": 136_957_248}
    record |= {"num_trainable": trained} | ({"adapter": adapter} if adapter else {})
    assert notice(record) == f"training {expected}, from step 0 to 12"


@pytest.mark.parametrize(("device", "measured"), [("cpu", 2), ("cuda", 2), ("cpu", 0.5)])
def test_more_memory_than_planned_is_usual_on_a_cpu_alone(device: str, measured: float) -> None:
    had: dict[str, Any] = {"phases": {"steady step": measured * 2**30}}
    had |= {"bare_bytes": 431 * 2**20} if device == "cpu" else {}
    expected = {"phases": {"steady step": 2**30}}
    line = str(notice({"event": "compared", "measured": had, "expected": expected, "device": device}))
    if device == "cuda":
        assert line == "memory of a rank: its peak is 2.0 GiB of tensors, 1.0 GiB planned in a step"
        return
    peak, tensors = {2: "2.4 GiB", 0.5: "943 MiB"}[measured], "tensors (1.0 GiB planned in a step)"
    held = f"Python and its libraries (431 MiB), {tensors} and freed memory that a process keeps"
    less = f"Python and its libraries (431 MiB) and {tensors}"
    assert line == f"memory of a rank: its peak of {peak} is {held if measured > 1 else less}"


@pytest.mark.parametrize(
    "name", ["resumed", "rejected", "save_failed", "skipped", "early_stopping", "evaluated", "training"]
)
def test_events_worth_a_line_have_one(name: str) -> None:
    assert notice({"event": name, "step": 3})


def test_events_that_are_not_have_none() -> None:
    assert notice({"event": "phase"}) is None


def test_phases_follow_the_events() -> None:
    progress = AttemptView()
    for record, phase in (
        ({"event": "phase", "phase": "loading"}, "loading"),
        ({"event": "training"}, "training"),
        ({"event": "saved", "step": 5}, "training"),
        ({"event": "stopping"}, "stopping"),
        ({"event": "stopped"}, "stopped"),
    ):
        progress.event(record)
        assert progress.phase == phase
    assert progress.saved_step == 5


@pytest.mark.parametrize(
    ("counts", "is_near"),
    [([[51, 0], [48, 1]], True), ([[45, 6], [4, 45]], False), ([[0, 0], [0, 9]], False)],
)
def test_a_run_that_ends_no_better_than_the_commonest_class_is_told(
    run: RunDirectory, counts: list[list[int]], is_near: bool
) -> None:
    for number in (0, 2):
        event(run.events_file, "evaluated", step=number, metrics={"accuracy": 0.5})
    run.evaluation(2).parent.mkdir()
    run.evaluation(2).write_text(json.dumps({"details": {"confusion_matrix": counts}}))
    line = (
        "  note        accuracy 0.52 is near the commonest class's 0.51: a larger learning rate may help; "
        "`launcher lr-find runs/tiny/job.yaml` suggests one\n"
    )
    assert (line in summary(run, "runs/tiny")) == is_near
    cut = {"num_at_limit": 3, "num_answers": 1000, "max_new_tokens": 128}
    run.evaluation(2).write_text(json.dumps({"details": cut}))
    assert (
        "  note        3 of 1,000 answers came to 128 tokens, the most that one may have "
        "(evaluation.generate.max_new_tokens): the end may be missing\n"
    ) in summary(run, "runs/tiny")
    run.evaluation(2).write_text(json.dumps({"details": cut | {"num_at_limit": 0}}))
    assert "note" not in summary(run, "runs/tiny")
    run.evaluation(2).write_text("[]")
    assert "note" not in summary(run, "runs/tiny")


def test_the_summary_says_what_came_of_it_and_what_is_next(run: RunDirectory) -> None:
    event(run.events_file, "started", attempt=1)
    event(run.events_file, "evaluated", step=0, metrics={"loss": 3.0})
    step(run, 1, 1.0)
    step(run, 2, 2.0)
    event(run.events_file, "evaluated", step=2, metrics={"loss": 1.0})
    run.attempt(1).mkdir(parents=True)
    event(run.events_file, "finished", step=2, data_share=0.0123)
    text = summary(run, "runs/tiny")
    assert "  waiting     1.2% of the last attempt's steps, for data\n" in text
    assert "2, loss 1.0000 -> 0.5000; each one's is in runs/tiny/metrics.jsonl" in text
    assert text.endswith("  launcher logs runs/tiny")
    assert "before      loss 3.0000" in text and "after       loss 1.0000" in text
    assert "200 in" in text and "1 attempt\n" in text
    assert "launcher evaluate runs/tiny" in text and "export runs/tiny --out DIRECTORY\n" in text
    adapter = {"method": "prompt-tuning", "virtual_tokens": 4}
    run.plan_file.write_text(plan_of(run.path, model__adapter=adapter).to_json())
    assert "export runs/tiny --out DIRECTORY --adapter\n" in summary(run, "runs/tiny"), "nothing to merge"
