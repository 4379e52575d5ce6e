"""Streamed rows without a model: every row once an epoch, from any place on; windows, positions, faults of files."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import tasks
from launcher.data.formats import format_of
from launcher.data.shards import Offset
from launcher.data.streams import FILE_BITS, Cursor, Files
from launcher.errors import CheckpointError, DataError, OutOfMemoryError, StorageError
from launcher.planner.plan import Length, Plan
from launcher.runs import processes
from launcher.runs.layout import RunDirectory
from launcher.runs.places import here
from launcher.training import exchange
from launcher.training.data import windows as windows_module
from launcher.training.data.order import Order, seed_of
from launcher.training.data.stream import Stream
from launcher.training.data.stream_batches import StreamBatches
from launcher.training.data.windows import Maker, Start, Window
from tests.distributed.data_world import batch_of, byte_tokenizer, plan_of

ENDINGS = st.sampled_from((".jsonl", ".txt", ".parquet"))


def write(path: Path, texts: list[str]) -> Path:
    """Write rows in the format of the file's name; of JSON lines with blank ones between."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=7)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    else:
        rows = (json.dumps({"text": text}) + "\n" + "  \n" * (n % 3 == 0) for n, text in enumerate(texts))
        path.write_text("".join(rows))
    return path


def files_of(folder: Path, sizes: list[int], ending: str, seed: int = 3) -> Files:
    paths = [
        write(folder / f"{n:03}{ending}", [f"file {n} row {row}" for row in range(size)])
        for n, size in enumerate(sizes)
    ]
    return there(paths, seed)


def there(paths: list[Path], seed: int = 3) -> Files:
    order = Order(seed, len(paths))
    return Files(paths, ["text"], lambda epoch: order.indices(epoch * len(paths), len(paths)).tolist())


def windows(files: Files, window: int, start: Cursor) -> Iterator[tuple[Cursor, list[Any]]]:
    """Yield the windows of the rest of an epoch, each with where it begins."""
    epoch = start.epoch
    while start.epoch == epoch:
        ends: list[Cursor] = []
        rows = list(files.read(start, window, ends.append))
        yield start, rows
        assert files.skip(start, window) == ends[0], "whoever leaves a window out is at the same place"
        [start] = ends


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 50), ENDINGS, st.integers(0, 9))
def test_every_row_comes_once_an_epoch_and_from_any_window_on(
    sizes: list[int], window: int, ending: str, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = files_of(Path(folder), sizes, ending, seed)
        expected = sorted((n << FILE_BITS) + row for n, size in enumerate(sizes) for row in range(size))
        for epoch in (0, 1):
            every = list(windows(files, window, Cursor(epoch)))
            assert sorted(row.id for _, rows in every for row in rows) == expected
            assert all(len(rows) == window for _, rows in every[:-1]), "only the last one may be shorter"
            for row in (row for _, rows in every for row in rows):
                number, place = row.id >> FILE_BITS, row.id & ((1 << FILE_BITS) - 1)
                assert row.values == {"text": f"file {number} row {place}"}
                assert Path(row.file).stem == f"{number:03}"
            middle = len(every) // 2
            fresh = there([Path(stamp.path) for stamp in files.stamps], seed)
            again = list(windows(fresh, window, Cursor.of(every[middle][0].to_dict())))
            assert again == every[middle:]


@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".parquet"])
def test_rows_and_lines_are_those_of_the_stored_way(ending: str, tmp_path: Path) -> None:
    files = files_of(tmp_path, [25], ending)
    path = Path(files.stamps[0].path)
    stored = list(format_of(path).read(path, ["text"]))
    streamed = [(row.line, row.values) for _, rows in windows(files, 4, Cursor()) for row in rows]
    assert streamed == stored


def test_files_come_in_another_order_in_each_epoch(tmp_path: Path) -> None:
    files = files_of(tmp_path, [2] * 8, ".txt")
    orders = [
        [row.id >> FILE_BITS for _, rows in windows(files, 3, Cursor(e)) for row in rows] for e in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plan_with(path: Path, window: int = 32, steps: int = 40, batch: Any = None, **changes: Any) -> Plan:
    values = {"train": {"path": str(path)}, "text": "text", "max_length": 64, "streaming": True}
    data = tasks.find("causal-lm").Columns.model_validate(values | {"shuffle_window": window} | changes)
    plan = plan_of(data, batch=batch or batch_of(4, 1, 1))
    training = plan.training.model_copy(update={"max_steps": steps})
    return plan.model_copy(update={"length": Length(value=steps, unit="steps"), "training": training})


def opened(tmp_path: Path, plan: Plan, name: str = "run") -> Stream:
    run = RunDirectory(tmp_path / name)
    run.path.mkdir(exist_ok=True)
    tokenizer = byte_tokenizer()
    stream = Stream.open(run, plan, tasks.build(plan, tokenizer), tokenizer)
    stream.refuses = True
    return stream


def rows_of_step(batches: StreamBatches, step: int) -> list[int]:
    return [s.id for micro in batches.step(step).micro_batches for item in micro for s in item]


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_is_learned_once_an_epoch_and_counted(packing: bool, cache: Path, tmp_path: Path) -> None:
    texts = [f"the cat sat {n}" for n in range(150)]
    texts[10] = texts[140] = " "
    path = write(tmp_path / "rows.jsonl", texts)
    stream = opened(tmp_path, plan_with(path, 40, packing=packing))
    batches = StreamBatches(stream, stream.maker.plan, 0)
    batches.go_to(0, None, "")
    seen: list[int] = []
    step = 0
    while len(seen) < 2 * 148:
        seen += rows_of_step(batches, step)
        step += 1
    expected = [n for n in range(150) if n not in (10, 140)]
    assert sorted(seen[:148]) == expected or packing, "an epoch is over before the next one begins"
    counts = np.bincount(seen, minlength=150)
    assert counts[expected].min() >= 1 and np.ptp(counts[expected]) <= 1
    report = stream.report
    assert report.rows_read >= 300 and report.rows_used + report.num_dropped == report.rows_read
    assert report.dropped["empty"] == 4 + (report.rows_read > 310), "the first of the third epoch, if it came"
    root = stream.maker.root
    assert len([one for one in root.iterdir() if not one.name.startswith(".")]) <= 3, "none is kept"
    stream.close()
    assert not root.exists() and not list(root.parent.glob("*.used"))


def test_rows_move_as_far_as_the_window_lets_them(cache: Path, tmp_path: Path) -> None:
    """Of a uniform permutation of n the expected displacement is (n^2 - 1) / (3n)."""
    n = 64
    path = write(tmp_path / "rows.txt", [f"row {row}" for row in range(n * 20)])
    stream = opened(tmp_path, plan_with(path, n, batch=batch_of(n, 1, 1)))
    batches = StreamBatches(stream, stream.maker.plan, 0)
    batches.go_to(0, None, "")
    moves = []
    for step in range(20):
        batches.step(step)
        window = stream.window(step)
        assert window.dataset is not None
        order = Order(seed_of(17, step), n).indices(0, n)
        ids = window.dataset.sample_ids(order)
        assert sorted(ids.tolist()) == list(range(step * n, (step + 1) * n))
        moves.append(np.abs(ids - step * n - np.arange(n)).mean())
    assert np.mean(moves) == pytest.approx((n * n - 1) / (3 * n), rel=0.1)
    stream.close()


def test_the_order_is_that_of_any_number_of_ranks_and_workers(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [f"a dog ran {n}" for n in range(90)])
    tokenizer = byte_tokenizer()
    plan = plan_with(path, 16, packing=True)
    task = tasks.build(plan, tokenizer)
    hashes = []
    for num_ranks in (1, 3):
        root = tmp_path / f"by-{num_ranks}"
        shares = []
        for rank in range(num_ranks):
            files = Files([path], ["text"], lambda epoch: [0])
            shares.append(Maker(files, plan, task, tokenizer, root).share(Start(), rank, num_ranks))
        for share in shares:
            for number in share:
                if number >= 9:  # into the second epoch
                    break
        made = [Window.open(root / str(number)) for number in range(9)]
        hashes.append([(one.start, one.end, one.report.samples_hash) for one in made])
    assert hashes[0] == hashes[1]
    assert [start.cursor.epoch for start, _, _ in hashes[0]] == [0] * 6 + [1] * 3


def test_a_position_is_gone_on_from_with_one_window_made_again(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [f"one two three {n}" for n in range(200)])
    plan = plan_with(path, 30)
    stream = opened(tmp_path, plan)
    batches = StreamBatches(stream, plan, 0)
    batches.go_to(0, None, "")
    expected = {step: rows_of_step(batches, step) for step in range(11)}
    position = json.loads(json.dumps(batches.position(10)))
    assert position["window"] == 1 and position["item"] == 10 and position["row"] == 30
    with pytest.raises(IndexError, match="a stream is at"):
        batches.step(3)
    stream.close()
    other = opened(tmp_path, plan)
    again = StreamBatches(other, plan, 0)
    again.go_to(10, position, "step-10")
    assert rows_of_step(again, 10) == expected[10]
    assert not other.maker.path(0).exists() or other.leads, "the window before is not asked for"
    assert again.position(10) == position
    assert again.directory == other.maker.path(1) and again.directory.exists(), "what is named is in use"
    with pytest.raises(CheckpointError, match="no position in files"):
        again.go_to(10, {"window": "x"}, "step-10")
    with pytest.raises(DataError, match=r"rows.jsonl, from row 30 \(byte \d+,?\d*\) on: other samples come"):
        again.go_to(10, position | {"samples_hash": "0" * 32}, "step-10")
        again.step(10)
    other.close()


@pytest.mark.parametrize(("ending", "place"), [(".jsonl", r"byte [\d,]+, row 32"), (".parquet", "row 32")])
def test_a_file_that_changes_under_the_run_is_refused_with_its_place(
    ending: str, place: str, cache: Path, tmp_path: Path
) -> None:
    files = files_of(tmp_path, [64], ending)
    path = Path(files.stamps[0].path)
    ends: list[Cursor] = []
    assert len(list(files.read(Cursor(), 32, ends.append))) == 32
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(
        DataError, match=rf"{path} changed under the run: [\d,]+ bytes then, cut off at byte .*{place}"
    ):
        list(files.read(ends[0], 100, ends.append))
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        list(files.read(ends[0], 100, ends.append))
    with pytest.raises(DataError, match="No such file"):
        Files([path], ["text"], lambda epoch: [0])


def test_a_file_written_anew_with_as_many_bytes_is_refused(tmp_path: Path) -> None:
    files = files_of(tmp_path, [9], ".txt")
    path = Path(files.stamps[0].path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match="written anew"):
        files.skip(Cursor(), 3)
    with pytest.raises(ValueError, match="no place in files"):
        Cursor.of({**Cursor(0, 0, Offset()).to_dict(), "row": -1})


def test_files_that_come_or_go_are_refused(cache: Path, tmp_path: Path) -> None:
    for name in "bc":
        write(tmp_path / f"{name}.txt", [f"{name} y z"] * 9)
    plan = plan_with(tmp_path / "*.txt", 4)
    for _ in range(2):
        opened(tmp_path, plan).close()
    write(tmp_path / "a.txt", ["x"])
    with pytest.raises(DataError, match=r"names 3 files, and named 2 .*: /.*/a\.txt came since then"):
        opened(tmp_path, plan)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").rename(tmp_path / "b")
    with pytest.raises(DataError, match=r"names 1 files, and named 2 .*: /.*/b\.txt is no longer there"):
        opened(tmp_path, plan)
    (tmp_path / "b").rename(tmp_path / "b.txt")
    write(tmp_path / "c.txt", ["c y v"] * 9)
    with pytest.raises(
        DataError, match=r"c\.txt changed since the run began: the first difference is between byte 0"
    ):
        opened(tmp_path, plan)


def test_files_that_moved_are_told_by_their_contents(cache: Path, tmp_path: Path) -> None:
    for folder in ("then", "now"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            write(tmp_path / folder / f"{name}.txt", [f"{name} y z"] * 9)
    opened(tmp_path, plan_with(tmp_path / "then" / "*.txt", 4)).close()
    plan = plan_with(tmp_path / "now" / "*.txt", 4)
    opened(tmp_path, plan).close()
    write(tmp_path / "now" / "b.txt", ["b y"] * 9)
    with pytest.raises(DataError, match=r"now/b\.txt changed since the run began: 54 bytes then, 36 now"):
        opened(tmp_path, plan)
    (tmp_path / "now" / "b.txt").unlink()
    with pytest.raises(DataError, match="names 1 other files than the 2 of when the run began"):
        opened(tmp_path, plan)


def test_a_node_with_other_files_is_refused_by_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.txt", ["a dog ran"] * 9)
    plan = plan_with(path, 4)
    opened(tmp_path, plan).close()
    monkeypatch.setenv("RANK", "2")  # the first of another node, with a copy of its own
    write(path, ["a cat ran"] * 9)
    node = os.uname().nodename
    with pytest.raises(DataError, match=rf"rows\.txt changed since the run began: .*\(on {node}\)"):
        opened(tmp_path, plan)
    stream = opened(tmp_path, plan, "other")
    assert not (tmp_path / "other" / "data-train.json").exists(), "the first rank alone writes it"

    def gathered(**changes: str) -> Any:
        """Return what ranks exchange where one on another node has something else."""
        names = ("node", "files", "begin", "samples")

        def gather(own: Any) -> list[Any]:
            told = dict(zip(names, json.loads(json.dumps(own)), strict=True))
            return [list((told | more).values()) for more in ({}, {"files": ""}, {"node": "n2"} | changes)]

        return gather

    for changes, reason in (({"files": "x"}, "other files"), ({"samples": "x"}, "other samples of the same")):
        monkeypatch.setattr(exchange, "all_gather", gathered(**changes))
        with pytest.raises(DataError, match=rf"rows\.txt: node n2 \(rank 2\) has {reason}"):
            stream.compare_ranks()
    monkeypatch.setattr(exchange, "all_gather", gathered())
    stream.compare_ranks()
    stream.close()


def test_rows_of_which_none_or_few_can_be_used_are_refused(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [" "] * 20)
    stream = opened(tmp_path, plan_with(path, 8, unusable="drop"))
    with pytest.raises(
        DataError, match=r"none of 20 rows can be used; the first is .*rows.jsonl, line 1: empty"
    ):
        stream.first()
    stream.close()
    path = write(tmp_path / "half.jsonl", [" "] * 14 + ["a dog"] * 8)
    stream = opened(tmp_path, plan_with(path, 8), "half")
    stream.first()
    with pytest.raises(DataError, match=r"14 of 22 rows \(63.6%\) would be dropped"):
        stream.window(2)
    stream.close()
    path = write(tmp_path / "many.jsonl", ([" "] * 11 + ["a dog"] * 9) * 60)
    stream = opened(tmp_path, plan_with(path, 512), "many")
    stream.first()
    with pytest.raises(DataError, match=r"of 1,024 rows \(.*%\) would be dropped"):
        stream.window(1)
    stream.close()
    stream = opened(tmp_path, plan_with(path, 8, unusable="refuse"), "refuse")
    with pytest.raises(DataError, match=r"data\.unusable is 'refuse'"):
        stream.first()
    assert not list(stream.maker.root.iterdir()), "nothing half made is left"
    stream.close()


def test_a_few_bad_rows_at_the_beginning_end_nothing(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [" "] * 5 + ["a dog ran"] * 30)
    stream = opened(tmp_path, plan_with(path, 8))
    assert stream.first().num_items == 3
    for number in range(1, 5):  # to the end of the epoch
        stream.window(number)
    stream.close()


def test_a_process_that_was_killed_or_cannot_write_is_named(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", ["a dog ran"] * 20)
    stream = opened(tmp_path, plan_with(path, 4))
    stream.first()
    stream.worker._process.kill()
    stream.worker._process.join()
    with pytest.raises(OutOfMemoryError, match=r"a smaller data\.shuffle_window"):
        stream.window(2)
    stream.close()
    stream.maker.root.parent.mkdir(parents=True, exist_ok=True)
    stream.maker.root.write_text("in the way")
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME"):
        stream.maker.make(Start())


def test_a_window_that_is_damaged_is_named(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", ["a dog ran"] * 20)
    stream = opened(tmp_path, plan_with(path, 4))
    stream.first()
    for number, name in ((1, "input_ids.npy"), (2, "window.json"), (3, "meta.json")):
        stream.worker.need(number)
        directory = stream.maker.path(number)
        while not directory.exists():
            time.sleep(0.005)
        os.truncate(directory / name, 9)
        with pytest.raises(StorageError, match=rf"{directory}, a window .* is not what was written"):
            stream.window(number)
        with pytest.raises(StorageError, match="is not what was written"):
            stream.maker.make(Start(number))
    stream.close()


def test_the_process_outlives_signals_that_all_processes_get(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", ["a dog ran"] * 40)
    stream = opened(tmp_path, plan_with(path, 4))
    stream.first()
    for number in processes.STOP_SIGNALS:
        os.kill(stream.worker._process.pid, number)
    assert [stream.window(number).num_items for number in range(1, 5)] == [4] * 4
    process = stream.worker._process
    del stream
    gc.collect()
    process.join(5)
    assert process.exitcode == -signal.SIGKILL, "nobody has to wait for it"


def test_sigterm_alone_ends_the_worker_of_a_pool() -> None:
    context = multiprocessing.get_context("fork")
    begun, theirs = context.Pipe()

    def work(parent: int) -> None:
        processes.begin_worker(parent, terminates=True)
        theirs.send(True)
        time.sleep(60)

    worker = context.Process(target=work, args=(os.getpid(),), daemon=True)
    worker.start()
    assert begun.recv() and worker.pid is not None
    for number in (*set(processes.STOP_SIGNALS) - {signal.SIGTERM}, signal.SIGTERM):
        assert worker.exitcode is None
        os.kill(worker.pid, number)
    worker.join()
    assert worker.exitcode == -signal.SIGTERM


def test_a_fault_in_the_process_is_in_the_log_with_its_traceback(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def faulty(*arguments: Any) -> Any:
        raise ZeroDivisionError("of a tokenizer")

    monkeypatch.setattr(windows_module, "encode_chunk", faulty)
    stream = opened(tmp_path, plan_with(write(tmp_path / "rows.txt", ["a dog ran"]), 4))
    with pytest.raises(RuntimeError, match="ZeroDivisionError in the process that tokenises: of a tokenizer"):
        stream.first()
    stream.close()
    assert "in faulty" in capfd.readouterr().err


def test_who_waits_for_a_window_says_how_far_it_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_chunk, told = windows_module.encode_chunk, []
    moved = here.moved

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return encode_chunk(*arguments)

    def noted(done: int) -> None:
        moved(done)
        told.append(here.read(0, "", 0))

    monkeypatch.setattr(windows_module, "encode_chunk", slow)
    monkeypatch.setattr(here, "moved", noted)
    stream = opened(tmp_path, plan_with(write(tmp_path / "rows.txt", ["a dog ran"] * 600), 600))
    stream.first()
    assert told[0].place == "preparing" and (told[0].done, told[0].total) == (256, 600)
    assert told[0].detail == str(stream.maker.path(0)) and here.read(0, "", 0).place != "preparing"
    stream.close()
