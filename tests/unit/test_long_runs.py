"""Runs of a million steps: what is read of their files, how much memory it takes, and that it comes to the
same as reading everything."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.display import summary
from launcher.cli.logs import Logs
from launcher.cli.watch_state import Watched
from launcher.launch.slurm import after_job
from launcher.launch.slurm.deadline import lead_seconds
from launcher.launch.slurm.view import runs_below, views
from launcher.runs import events
from launcher.runs.curve import MOST_POINTS, Curve, is_step
from launcher.runs.fold import Fold
from launcher.runs.layout import RunDirectory
from launcher.runs.status import last_step, read_status
from launcher.runs.successive_halving import Halving
from launcher.runs.tail import Tail, lines_backwards
from launcher.runs.totals import Totals
from launcher.sweep.leaderboard import leaderboard
from launcher.sweep.sweep import Sweep
from tests.unit.long_run import BEGAN, events_of, long_run, step_line, write_events
from tests.unit.test_scheduling_local import plan

NUM_STEPS = 100_000


def bytes_read() -> int:
    """All that this process has read by system calls so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def cost(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes read, and the most bytes that were allocated at a time."""
    tracemalloc.start()
    before = bytes_read()
    work()
    read, (_, peak) = bytes_read() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return read, peak


def readers(run: RunDirectory, sweep: Sweep) -> dict[str, Callable[[], Any]]:
    """Everybody who looks at a run's long files; who looks again and again once more."""
    watched, totals, logs, rule = (
        Watched(run),
        Totals(run),
        Logs(run, None, None, 40),
        Halving.of(sweep.run(0)),
    )
    assert rule is not None
    return {
        "status": lambda: read_status(run),
        "list": lambda: views(runs_below(run.path.parent)),
        "watch, the first look": lambda: watched.look(ask=True),
        "watch, a later look": lambda: watched.look(ask=False),
        "the last step": lambda: last_step(run),
        "the lead, at first": lambda: lead_seconds(run, plan(), totals),
        "the lead, later": lambda: lead_seconds(run, plan(), totals),
        "summary": lambda: summary(run, "runs/long"),
        "logs": lambda: logs.show(follow=False),
        "leaderboard": lambda: leaderboard(sweep),
        "requeued in a row": lambda: after_job._times_in_a_row(run, "preempted"),
        "what a later evaluation means to a sweep": lambda: rule.gives_up(sweep.run(0)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    long_run(folder / "long", NUM_STEPS, num_log_lines=200_000)
    return folder


def sweep_over(run: RunDirectory, path: Path) -> Sweep:
    """A sweep of which a run is the only point."""
    (path / "points").mkdir(parents=True)
    content = {
        "format": 1,
        "points": [[]],
        "metric": "loss",
        "nproc": None,
        "halving": {"first": 100, "factor": 3},
    }
    (path / "sweep.json").write_text(json.dumps(content))
    (path / "points" / "000").symlink_to(run.path)
    return Sweep.read(path)


def check_costs(run: RunDirectory, sweep: Sweep, first: int, memory: int) -> None:
    rule = Halving.of(sweep.run(0))
    assert rule is not None and not rule.gives_up(sweep.run(0))
    views([])  # what is imported at the first call is no part of it
    for name, work in readers(run, sweep).items():
        if name == "what a later evaluation means to a sweep":
            continue  # the first look of a point that goes on reads its events once; then it follows them
        read, peak = cost(work)
        assert read < (150_000 if "later" in name or name == "the last step" else first), (
            f"{name} read {read:,} bytes"
        )
        assert peak < memory, f"{name} needed {peak:,} bytes"
    assert cost(lambda: rule.gives_up(sweep.run(0)))[0] < 10_000


def test_nobody_reads_a_long_file_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(folder / "long")
    assert run.metrics_file.stat().st_size > 25e6
    check_costs(run, sweep_over(run, tmp_path / "sweep"), first=2_500_000, memory=20 << 20)
    assert "a line of the log, the 199999th" in capsys.readouterr().out


@pytest.mark.slow
def test_a_million_steps_cost_no_more(tmp_path: Path) -> None:
    run = long_run(tmp_path / "runs" / "long", 1_000_000, num_log_lines=200_000)
    assert run.metrics_file.stat().st_size > 250e6
    check_costs(run, sweep_over(run, tmp_path / "sweep"), first=2_500_000, memory=20 << 20)


def test_of_what_was_not_kept_few_lines_are_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a million steps are summed up in some 0.6 s of a core (bench_long_runs.py)."""
    long, run = RunDirectory(folder / "long"), RunDirectory(tmp_path)
    for file in (long.metrics_file, long.events_file):
        (tmp_path / file.name).symlink_to(file)
    numbers = []
    for fold in (Curve, Totals):
        looked_at = []
        take = fold.take
        monkeypatch.setattr(
            fold, "take", lambda self, line, take=take, at=looked_at: (at.append(line), take(self, line))[1]
        )
        known, fresh = fold(long).refresh().state, fold(run).refresh().state
        assert fresh == known
        numbers.append(len(looked_at))
    # Of the steps all until 8 are thinned to one; of the events those of the evaluations.
    assert numbers[0] < 0.25 * NUM_STEPS and numbers[1] < 0.8 * len(long.events_file.read_text().splitlines())


def test_a_run_from_before_anything_was_kept_is_read_once_in_blocks(tmp_path: Path) -> None:
    run = long_run(tmp_path / "long", NUM_STEPS, kept=False)
    watched = Watched(run)
    _, peak = cost(lambda: watched.look(ask=True))
    assert peak < 20 << 20
    assert cost(lambda: watched.look(ask=False))[0] < 150_000
    assert cost(lambda: read_status(run))[0] < 2_500_000, (
        "the state of a run needs no more of its steps than the last"
    )


def test_what_a_long_run_shows(folder: Path, tmp_path: Path) -> None:
    run = RunDirectory(folder / "long")
    seen = Watched(run).look(ask=True)
    assert len(seen["losses"]) <= MOST_POINTS + 2
    assert (seen["losses"][0][0], seen["losses"][-1][0]) == (1, NUM_STEPS)
    assert [step for step, _ in seen["losses"][1:]] == [*range(64, NUM_STEPS, 64), NUM_STEPS]
    status = seen["status"]
    assert (status["step"], status["checkpoint_step"], status["metrics"]) == (
        NUM_STEPS,
        NUM_STEPS,
        {"loss": 9 - NUM_STEPS % 777 / 777},
    )
    assert [event["event"] for event in seen["events"][-2:]] == ["evaluated", "saved"] and len(
        seen["events"]
    ) == 12
    text = summary(run, "runs/long")
    assert f"{4096 * NUM_STEPS:,} in 5 h 33 min, over 1 attempt" in text
    assert "train: 1,000 of 1,000 rows used" in text


def counted(lines: list[str]) -> dict[int, float]:
    """The losses that count, by reading everything: a step takes the place of itself and of all later ones."""
    found: dict[int, float] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if is_step(record):
            for step in range(record["step"], max(found, default=0) + 1) if record["step"] in found else ():
                found.pop(step, None)
            found[record["step"]] = record["loss"]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_crashes_steps_run_again_and_keeping_at_any_time_change_nothing(seed: int, tmp_path: Path) -> None:
    """Attempts of random length that crash in the middle of a line; a reader that goes on from what was kept
    knows what another reads."""
    draw, run, reached = random.Random(seed), RunDirectory(tmp_path), 0
    written: list[str] = []
    following = Curve(run)
    for attempt in range(1, 9):
        write_events(run, events_of(range(reached + 1, reached + 1), attempt))
        for step in range(reached + 1, reached + draw.randrange(2, 60)):
            written.append(step_line(step, attempt))
            with open(run.metrics_file, "a") as file:
                file.write(written[-1])
            if draw.random() < 0.1:
                written.append(
                    json.dumps({"kind": "evaluation", "step": step, "metrics": {"loss": 1.0}}) + "\n"
                )
                write_events(
                    run,
                    [
                        {
                            "time": BEGAN + step,
                            "event": "evaluated",
                            "step": step,
                            "metrics": {"loss": draw.random()},
                        }
                    ],
                )
                with open(run.metrics_file, "a") as file:
                    file.write(written[-1])
            if draw.random() < 0.05:
                for fold in (Curve(run), Totals(run)):
                    fold.refresh().keep()
        torn = step_line(step + 1, attempt)[: draw.randrange(1, 200)]
        with open(run.metrics_file, "a") as file:
            file.write(torn + "\n")
        reached = draw.randrange(step + 1)
    expected = counted(written)
    for curve in (Curve(run), following):
        assert dict(curve.refresh().points) == expected
        assert curve.last is not None and curve.last["step"] == max(expected)
    for fold, file in ((Curve, "curve.json"), (Totals, "totals.json")):
        went_on = fold(run).refresh().state
        (run.path / file).unlink(missing_ok=True)
        assert fold(run).refresh().state == went_on
    measured = [
        record for record in events.read(run.events_file) if record["event"] == "evaluated" and record["step"]
    ]
    best = min(((record["metrics"]["loss"], record["step"]) for record in measured), default=(None, None))
    last = measured[-1]["metrics"]["loss"] if measured else None
    assert Totals(run).refresh().measured("loss", lower=True) == (last, *best)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_of_lines_come_to_what_their_lines_come_to(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long file most lines are not looked at: runs with crashes, lines that are cut, lost or of evaluations."""
    monkeypatch.setattr("launcher.runs.curve.MOST_POINTS", 20)
    monkeypatch.setattr("launcher.runs.tail._BLOCK", 6000)
    draw, run, reached = random.Random(seed), RunDirectory(tmp_path), 0
    looked_at: list[bytes] = []
    take = Curve.take
    monkeypatch.setattr(Curve, "take", lambda self, line: (looked_at.append(line), take(self, line))[1])
    lines: list[str] = []
    for attempt in range(1, 5):
        steps = range(reached + 1, reached + draw.randrange(200, 1500))
        for step in steps:
            if draw.random() < 0.002:
                continue  # lost
            lines.append(step_line(step, attempt, total=draw.random() < 0.9))
            if step % 97 == 0:
                lines.append(
                    json.dumps({"kind": "evaluation", "step": step, "metrics": {"loss": 1.0}}) + "\n"
                )
        lines.append(
            step_line(step + 1, attempt)[: draw.randrange(1, 250)]
        )  # torn: the next line stands behind it
        write_events(run, events_of(steps, attempt))
        reached = draw.randrange(max(1, reached - 50), step + 1)
    run.metrics_file.write_text("".join(lines))
    curve, totals = Curve(run).refresh(), Totals(run).refresh()
    assert len(looked_at) < 0.8 * len(lines)
    for fold in (Curve(run), Totals(run)):
        for line in fold._tail.lines():
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                fold.take(line)
        assert fold.state == (curve if isinstance(fold, Curve) else totals).state


def test_a_step_that_is_run_again_takes_the_later_ones_of_a_thinned_curve(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lines = [step_line(step) for step in range(1, 10_001)] + [
        step_line(step, 2) for step in range(7_001, 7_501)
    ]
    run.metrics_file.write_text("".join(lines))
    losses = counted(lines)
    points = Curve(run).refresh().points
    assert points == [(step, losses[step]) for step in (1, *range(8, 7_500, 8), 7_500)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept, path: kept.write_text(""),
        lambda kept, path: kept.write_text("[]"),
        lambda kept, path: kept.write_text('{"form": 1, "offset": "x", "state": {}}'),
        lambda kept, path: kept.write_text(kept.read_text().replace("3", "4")),
        lambda kept, path: kept.write_text(kept.read_text().replace('"form": 1', '"form": 0')),
        lambda kept, path: path.write_text("".join(step_line(step, 3) for step in range(1, 300))),
        lambda kept, path: path.write_text(step_line(1, 5)),
    ],
    ids=["empty", "a list", "words", "changed", "of another version", "of another file", "of a longer file"],
)
def test_what_was_kept_counts_only_where_it_is_whole_and_of_this_file(
    damage: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    lines = [step_line(step) for step in range(1, 200)]
    run.metrics_file.write_text("".join(lines))
    Curve(run).refresh().keep()
    damage(tmp_path / "curve.json", run.metrics_file)
    expected = counted(run.metrics_file.read_text().splitlines())
    assert dict(Curve(run).refresh().points) == expected


@pytest.mark.parametrize(
    "line",
    [
        b"3",
        b'{"event": 7}',
        b'{"event": "evaluated", "step": "x", "metrics": 3}',
        b'{"event": "started", "time": {}}',
    ],
)
def test_a_line_that_is_no_event_of_ours_keeps_nobody_from_the_others(line: bytes, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.events_file.write_bytes(line + b"\n")
    events.event(run.events_file, "stopped", step=3)
    assert "stopped" in Totals(run).refresh().last


def test_five_hundred_runs_cost_a_few_kilobytes_each(tmp_path: Path) -> None:
    for number in range(500):
        run = RunDirectory(tmp_path / f"run-{number:03d}")
        run.path.mkdir()
        run.plan_file.touch()
        run.metrics_file.write_text("".join(step_line(step) for step in range(1, 61)))
        write_events(run, events_of(range(1, 61)))
        Totals(run).refresh().keep()
    seen: list[dict[str, Any]] = []
    read, peak = cost(lambda: seen.extend(views(runs_below(tmp_path))))
    assert read < 500 * 30_000 and peak < 20 << 20
    assert [one["step"] for one in seen] == [60] * 500


def test_a_summary_of_a_run_that_counted_no_tokens_says_how_long_it_took(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.attempt(1).mkdir(parents=True)
    run.metrics_file.write_text("".join(step_line(step, total=False) for step in range(1, 11)))
    write_events(run, [{"time": 1.0, "event": "started"}, {"time": 61.0, "event": "finished"}])
    assert "  time        1 min 0 s, over 1 attempt" in summary(run, "runs/old")


def test_wall_time_counts_attempts_that_were_cut_short_until_their_last_event(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    moments = [(10.0, "started"), (13.0, "training"), (100.0, "started"), (105.0, "saved")]
    write_events(run, [{"time": moment, "event": name} for moment, name in moments])
    assert Totals(run).refresh().seconds_in_attempts == 3 + 5


def test_a_phase_is_over_when_its_end_is_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.lock():
        for record, phase in (
            ({"event": "started"}, None),
            ({"event": "phase", "phase": "loading"}, "loading"),
            ({"event": "training"}, "training"),
            ({"event": "phase", "phase": "evaluating"}, "evaluating"),
            ({"event": "evaluated", "step": 0, "metrics": {}}, "training"),
        ):
            write_events(run, [{"time": 1.0, **record}])
            assert read_status(run).phase == phase


def test_the_signal_that_came_first_is_the_one_that_is_shown(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    names = [
        ("started", {}),
        ("stopping", {"signal": "SIGTERM"}),
        ("stopping", {"signal": "SIGUSR1"}),
        ("stopped", {"step": 3}),
    ]
    write_events(run, [{"time": 1.0, "event": name, **fields} for name, fields in names])
    assert read_status(run).signal == "SIGTERM"


@pytest.mark.parametrize("seed", range(5))
def test_a_sweep_judges_as_if_it_replayed_every_evaluation(seed: int, tmp_path: Path) -> None:
    """Asked after each evaluation, by a rule that follows the points and by one that reads all of them anew."""
    optuna = pytest.importorskip("optuna")
    draw, clock = random.Random(seed), itertools.count()
    (tmp_path / "points").mkdir()
    (tmp_path / "sweep.json").write_text(json.dumps({"metric": "loss", "halving": {"first": 4, "factor": 2}}))
    runs = [RunDirectory(tmp_path / "points" / f"{number:03d}") for number in range(5)]
    following = Halving.of(runs[0])
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=4, reduction_factor=2)
    study = optuna.create_study(direction="minimize", pruner=pruner)
    trials = {run.path.name: study.ask() for run in runs}
    seen: set[tuple[str, int]] = set()
    steps = dict.fromkeys(trials, 0)
    expected: dict[str, bool] = {}
    for _ in range(120):
        run = draw.choice(runs)
        name = run.path.name
        step = steps[name] = max(0, steps[name] + draw.choice((1, 1, 2, 5, -2)))
        value = draw.choice((draw.random(), draw.random(), draw.random(), float("nan")))
        run.path.mkdir(exist_ok=True)
        events.append(
            run.events_file,
            {"time": next(clock), "event": "evaluated", "step": step, "metrics": {"loss": value}},
        )
        if step and (name, step) not in seen:
            seen.add((name, step))
            trials[name].report(value, step)
            expected[name] = trials[name].should_prune()
        for rule in (following, Halving.of(run)):
            assert rule is not None and rule.gives_up(run) == expected.get(name, False)


def test_a_tail_reads_a_long_file_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b'{"n": %d}\n' % number for number in range(400_000)) + b'{"half')
    tail, number = Tail(path), 0

    def count() -> None:
        nonlocal number
        for _ in tail.lines():
            number += 1

    _, peak = cost(count)
    assert number == 400_000 and peak < 12 << 20 and tail.offset == path.stat().st_size - len('{"half')


def test_events_are_shown_once_and_in_their_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert Watched(run).look(ask=True)["events"] == []
    write_events(
        run,
        [
            {"time": float(number), "event": "saved" if number % 2 else "phase", "step": number}
            for number in range(40)
        ],
    )
    with open(run.events_file, "a") as file:
        file.write('{"time": 40.0, "event": "sav')
    watched = Watched(run)
    assert [event["step"] for event in watched.look(ask=True)["events"]] == list(range(17, 40, 2))
    with open(run.events_file, "a") as file:
        file.write('ed", "step": 40}\n')
    assert [event["step"] for event in watched.look(ask=False)["events"]] == [*range(19, 40, 2), 40]
    assert [event["step"] for event in watched.look(ask=False)["events"]] == [*range(19, 40, 2), 40]


def test_lines_from_the_end_of_what_is_there_when_one_looks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\nthr")
    assert list(lines_backwards(path)) == [b"thr", b"two", b"one"]
    assert list(lines_backwards(path, 8)) == [b"", b"two", b"one"]
    assert list(lines_backwards(tmp_path / "none")) == []


def test_the_place_that_is_kept_is_behind_a_whole_line(tmp_path: Path) -> None:
    class Lines(Fold):
        kept_as, form = "kept.json", 1

        def empty(self) -> dict[str, Any]:
            return {"lines": []}

        def take(self, line: bytes) -> None:
            self.state["lines"].append(line.decode())

    path = tmp_path / "log"
    path.write_text("one\ntw")
    Lines(path).refresh().keep()
    path.write_text("one\ntwo\nthree\n")
    assert Lines(path).refresh().state == {"lines": ["one", "two", "three"]}
