from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from launcher import tasks
from launcher.data.section import Data
from launcher.errors import ConfigurationError, DataError, OutOfMemoryError, StorageError
from launcher.planner.dataset.dataset_size import Items, one_pass
from launcher.runs.processes import alive
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from launcher.tasks.sequence_classification import LabelledColumns
from launcher.training.data import encode
from launcher.training.data.cache_key import cache_root, tokenizer_digest
from launcher.training.data.dataset import Dataset
from launcher.training.data.prepare import prepare
from tests.distributed.data_world import byte_tokenizer, jsonl, plan_of, word_tokenizer
from tests.encoding import arrays_of

TOKENIZER = byte_tokenizer()
TEXTS = [{"text": "the cat sat " * (1 + number % 7) + str(number)} for number in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(
    data: Data,
    role: str = "train",
    num_workers: int = 1,
    tokenizer: Any = None,
    task: str = "causal-lm",
    report: Any = None,
) -> Dataset:
    plan = plan_of(data, task, num_workers=num_workers)
    tokenizer = tokenizer or TOKENIZER
    source = data.train if role == "train" else data.evaluation
    assert source is not None
    chosen = tasks.build(plan, tokenizer)
    return prepare(source, role, plan, chosen, tokenizer, report or (lambda done, total: None))  # type: ignore[arg-type]


def contents(dataset: Dataset) -> list[list[tuple[int, dict[str, list[Any]]]]]:
    return [
        [(s.id, {name: array.tolist() for name, array in s.items()}) for s in dataset.item(i)]
        for i in range(dataset.num_items)
    ]


def text_data(tmp_path: Path, rows: list[Any] = TEXTS, **settings: Any) -> Data:
    columns = LabelledColumns if "label" in settings else CausalColumns
    return columns(train=jsonl(tmp_path / "a.jsonl", rows), text="text", **settings)


def test_what_is_prepared_is_what_the_task_encodes(tmp_path: Path) -> None:
    data = text_data(tmp_path)
    dataset = made(data)
    task = tasks.build(plan_of(data), TOKENIZER)
    for index, row in enumerate(TEXTS):
        [sample] = dataset.item(index)
        expected = arrays_of(task, row, TOKENIZER)
        assert sample.id == index
        assert sample.keys() == expected.keys()
        assert all(
            np.array_equal(sample[name], expected[name]) and sample[name].dtype == expected[name].dtype
            for name in expected
        )
    assert dataset.num_samples == dataset.num_items == 60
    assert dataset.num_tokens == dataset.num_tokens_of(range(60)) == sum(dataset.length(i) for i in range(60))
    assert dataset.num_supervised(range(60)) == dataset.num_tokens - 60 == dataset.report.num_supervised
    assert dataset.report.longest == max(dataset.length(i) for i in range(60))


def test_packing_loses_and_repeats_nothing(tmp_path: Path) -> None:
    plain, packed = made(text_data(tmp_path)), made(text_data(tmp_path, packing=True, max_length=64))
    assert packed.num_items < plain.num_items
    samples = sorted((sample for item in contents(packed) for sample in item), key=lambda sample: sample[0])
    assert samples == [sample for item in contents(plain) for sample in item]
    assert all(
        packed.length(i) == sum(s.length for s in packed.item(i)) <= 64 for i in range(packed.num_items)
    )
    assert packed.report.fill == packed.num_tokens / (64 * packed.num_items)
    assert packed.num_supervised([0, 1]) == sum(
        int((s["targets"] >= 0).sum()) for i in (0, 1) for s in packed.item(i)
    )
    assert packed.num_samples_of([0, 1]) == len(packed.item(0)) + len(packed.item(1))
    assert packed.sample_ids(0).tolist() == [s.id for s in packed.item(0)]
    both = packed.sample_ids(np.array([1, 0]))
    assert both.tolist() == [*packed.sample_ids(1), *packed.sample_ids(0)]


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "FEWEST_ROWS_FOR_WORKERS", 1)
    monkeypatch.setattr(encode, "CHUNK_ROWS", 3)
    rows = [*TEXTS, "{broken", {"text": ""}]
    alone = made(text_data(tmp_path, rows))
    pids = tmp_path / "pids"
    pids.mkdir()
    encoded = CausalLM.encode
    monkeypatch.setattr(CausalLM, "encode", lambda *a: ((pids / str(os.getpid())).touch(), encoded(*a))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    together = made(text_data(tmp_path, rows), num_workers=2)
    assert contents(alone) == contents(together)
    assert alone.report.samples_hash == together.report.samples_hash
    assert alone.report.dropped == together.report.dropped == {"not readable": 1, "empty": 1}
    assert alone.report.examples == together.report.examples
    assert str(os.getpid()) not in {path.name for path in pids.iterdir()}


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "FEWEST_ROWS_FOR_WORKERS", 1)
    monkeypatch.setattr(CausalLM, "encode", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OutOfMemoryError, match=r"data\.num_workers to fewer than 2"):
        made(text_data(tmp_path), num_workers=2)
    assert [p for p in cache_root().iterdir() if p.is_dir()] == []


def test_workers_of_a_killed_process_are_gone(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    script = textwrap.dedent("""
        import sys, time, os
        sys.path[:0] = sys.argv[2:]
        from tests.distributed.data_world import plan_of, byte_tokenizer
        from launcher.data.section import Source
        from launcher import tasks
        from launcher.training.data import encode
        from launcher.training.data.prepare import prepare
        from launcher.tasks.causal_lm import CausalColumns, CausalLM
        encode.FEWEST_ROWS_FOR_WORKERS = 1
        def slow(*a):
            print(os.getpid(), flush=True)
            time.sleep(1000)
        CausalLM.encode = slow
        plan = plan_of(CausalColumns(train=Source(path=sys.argv[1]), text="text"), num_workers=2)
        tokenizer = byte_tokenizer()
        prepare(plan.data.train, "train", plan, tasks.build(plan, tokenizer), tokenizer)
    """)
    paths = [str(Path(__file__).parents[2])]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a.jsonl"), *paths], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    assert worker in workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_second_call_maps_what_the_first_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(text_data(tmp_path))
    monkeypatch.setattr(CausalLM, "encode", lambda *a: pytest.fail("encoded again"))
    second = made(text_data(tmp_path))
    assert (first.report.cached, second.report.cached) == (False, True)
    assert contents(first) == contents(second)
    moved = CausalColumns(train=jsonl(tmp_path / "moved.jsonl", TEXTS), text="text", num_workers=7)
    third = made(moved)
    assert third.report.cached
    assert [file["path"] for file in third.report.files] == [str(tmp_path / "moved.jsonl")]


def test_the_first_row_that_is_dropped_is_named_where_it_lies_now(tmp_path: Path) -> None:
    made(text_data(tmp_path, BAD_ROWS))
    moved = made(CausalColumns(train=jsonl(tmp_path / "moved.jsonl", BAD_ROWS), text="text"))
    assert moved.report.cached and {example["file"] for example in moved.report.examples} == {
        str(tmp_path / "moved.jsonl")
    }


def test_each_reason_has_an_example_however_many_rows_there_are(tmp_path: Path) -> None:
    rows = [{"text": "long " * 50}] * 12 + [{"text": "long " * 50}, {"text": ""}, {"text": "fine"}]
    report = made(text_data(tmp_path, rows, max_length=16)).report
    assert len(report.examples) == 11 and [example["cut"] for example in report.examples] == [True] * 10 + [
        False
    ]
    assert (report.examples[-1]["reason"], report.examples[-1]["line"]) == ("empty", 14)


def test_whatever_changes_the_samples_changes_the_cache(tmp_path: Path) -> None:
    made(text_data(tmp_path))
    variants: list[dict[str, Any]] = [
        {"max_length": 8},
        {"packing": True},
        {"too_long": "drop"},
        {"unusable": "refuse"},
    ]
    assert not any(made(text_data(tmp_path, **settings)).report.cached for settings in variants)
    assert len({made(text_data(tmp_path, **settings)).report.samples_hash for settings in variants[:2]}) == 2
    assert not made(text_data(tmp_path, [*TEXTS[:-1], {"text": "another"}])).report.cached
    assert not made(text_data(tmp_path), tokenizer=byte_tokenizer(bos=True)).report.cached
    limited = CausalColumns(train=text_data(tmp_path).train.model_copy(update={"limit": 5}), text="text")
    assert made(limited).num_samples == 5


def test_a_tokenizers_last_call_does_not_change_its_digest() -> None:
    tokenizer = word_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["the cat", "a"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_digest(tokenizer) != before


def test_a_setting_beside_vocabulary_and_algorithm_makes_other_samples(tmp_path: Path) -> None:
    digests, tokens = [], []
    for place, splits in (("a", False), ("b", False), ("c", True)):
        byte_tokenizer().save_pretrained(tmp_path / place)
        file = tmp_path / place / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": splits}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / place)
        tokens.append(tokenizer("a<|im_end|>")["input_ids"])
        digests.append(tokenizer_digest(tokenizer))
    assert tokens[0] == tokens[1] != tokens[2]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "name", ["input_ids.npy", "targets.npy", "item_offsets.npy", "sample_ids.npy", "meta.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    first = made(text_data(tmp_path))
    expected = contents(first)
    path = first.directory / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage != "missing":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    again = made(text_data(tmp_path))
    assert not again.report.cached
    assert contents(again) == expected


@pytest.mark.parametrize("name", ["input_ids", "targets", "sample_ids", "input_ids_offsets"])
def test_prepared_data_that_changes_under_a_run_is_refused_with_the_place(tmp_path: Path, name: str) -> None:
    """Each sample is held to its hash whenever it is read: one bit of it, of its row number or of its place
    is enough."""
    dataset = made(text_data(tmp_path))
    before = contents(dataset)
    path = dataset.directory / f"{name}.npy"
    # In place, so that the map sees it.
    with open(path, "r+b") as file:
        file.seek(-16, os.SEEK_END)
        last = file.read(1)
        file.seek(-16, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(
        DataError, match=r"changed under the run: the sample of row \d+ is not what was written"
    ) as raised:
        contents(dataset)
    begin, end = (
        int(text.replace(",", ""))
        for text in re.findall(r"input_ids.npy, bytes ([\d,]+) to ([\d,]+)", str(raised.value))[0]
    )
    assert 128 <= begin < end <= (dataset.directory / "input_ids.npy").stat().st_size
    again = made(text_data(tmp_path))
    assert not again.report.cached and contents(again) == before


def test_another_format_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(text_data(tmp_path))
    meta = json.loads((first.directory / "meta.json").read_text())
    (first.directory / "meta.json").write_text(json.dumps({**meta, "format": 0}))
    assert not made(text_data(tmp_path)).report.cached


def _prepare_in_another_process(path: str, results: Any) -> None:
    encoded = CausalLM.encode

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return encoded(*arguments)

    CausalLM.encode = slow  # type: ignore[method-assign]
    calls: list[tuple[int, int]] = []
    plan = plan_of(CausalColumns(train=jsonl(Path(path), TEXTS), text="text"))
    task = tasks.build(plan, TOKENIZER)
    dataset = prepare(
        plan.data.train, "train", plan, task, TOKENIZER, lambda done, total: calls.append((done, total))
    )
    results.put((dataset.report.cached, calls, dataset.num_tokens))


def test_one_process_works_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    # Each writes a file of its own, so that none sees another's half-written one; the contents, and so the
    # cache, are the same.
    processes = [
        context.Process(target=_prepare_in_another_process, args=(str(tmp_path / f"{n}.jsonl"), results))
        for n in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(cached for cached, _, _ in found) == [False, True, True]
    assert len({num_tokens for _, _, num_tokens in found}) == 1
    assert all(done == total == 60 for cached, calls, _ in found if not cached for done, total in calls[-1:])


def test_what_the_report_raises_ends_the_preparation_and_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(text_data(tmp_path), report=stop)
    assert [path for path in cache_root().iterdir() if path.is_dir()] == []
    assert made(text_data(tmp_path)).num_samples == 60


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where a directory should be")
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME"):
        made(text_data(tmp_path))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode.Writer, "append", full)
    with pytest.raises(StorageError, match="No space left on device; set XDG_CACHE_HOME"):
        made(text_data(tmp_path))
    assert [path for path in cache_root().iterdir() if path.is_dir()] == []


BAD_ROWS = [
    {"text": "fine"},
    {"txt": "x"},
    {"text": "  "},
    b'{"text": "\xff"}',
    "{",
    {"text": ["x"]},
    {"text": None},
    {"text": "fine too"},
]


def test_rows_that_cannot_be_used_are_counted_by_reason_and_shown(tmp_path: Path) -> None:
    dataset = made(text_data(tmp_path, BAD_ROWS))
    report = dataset.report
    assert report.dropped == {
        "missing key": 2,
        "empty": 1,
        "not UTF-8": 1,
        "not readable": 1,
        "value that cannot be used": 1,
    }
    assert (report.rows_read, report.rows_used, report.num_dropped) == (8, 2, 6)
    assert [s.id for i in range(2) for s in dataset.item(i)] == [0, 7]
    assert [example["line"] for example in report.examples] == [2, 3, 4, 5, 6, 7]
    assert report.examples[0]["file"] == str(tmp_path / "a.jsonl")
    assert "2 of 8 rows" in report.summary()
    assert (
        "6 dropped (2 missing key, 1 empty, 1 not UTF-8, 1 not readable, 1 value that cannot be used)"
        in report.summary()
    )
    assert json.loads(json.dumps(report.to_dict()))["dropped"] == report.dropped


def test_rows_that_cannot_be_used_are_refused_by_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: missing key .*data\.unusable is 'refuse'"):
        made(text_data(tmp_path, BAD_ROWS, unusable="refuse"))


def test_no_row_that_can_be_used(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"none of 2 rows can be used; 2 missing key, the first at .*line 1 "
        r"\(.*the row has 'txt'; did you mean 'txt'\?\)$",
    ):
        made(text_data(tmp_path, [{"txt": "a"}, {"txt": "b"}]))
    with pytest.raises(DataError, match="none of 0 rows"):
        made(text_data(tmp_path, []))


LONG = [{"text": "short"}, {"text": "long " * 50}]


def test_too_long_is_cut(tmp_path: Path) -> None:
    dataset = made(text_data(tmp_path, LONG, max_length=16))
    assert (dataset.report.num_cut, dataset.report.num_dropped, dataset.num_samples) == (1, 0, 2)
    [sample] = dataset.item(1)
    assert sample.length == 16
    assert sample["targets"][-1] == -100
    assert dataset.report.examples[0]["reason"] == "too long"


def test_too_long_is_dropped(tmp_path: Path) -> None:
    dataset = made(text_data(tmp_path, LONG, max_length=16, too_long="drop"))
    assert dataset.report.dropped == {"too long": 1}
    assert dataset.num_samples == 1


def test_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"line 2: too long \(.* tokens, and max_length is 16\), and data\.too_long is 'refuse'",
    ):
        made(text_data(tmp_path, LONG, max_length=16, too_long="refuse"))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    data = text_data(tmp_path)

    def change(done: int, total: int) -> None:
        jsonl(tmp_path / "a.jsonl", TEXTS[:-1])

    with pytest.raises(
        DataError, match=r"changed while it was read: .*the first difference is between byte 0 and byte"
    ):
        made(data, report=change)


def test_classes_come_from_the_training_rows_and_stay_with_the_cache(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [{"text": "the cat", "label": name} for name in ("b", "a", "c", "a")])
    held_out = jsonl(tmp_path / "b.jsonl", [{"text": "a dog", "label": "c"}, {"text": "a dog", "label": "z"}])
    data = LabelledColumns(train=train, evaluation=held_out, text="text", label="label")
    tokenizer = word_tokenizer()
    for _ in range(2):
        plan = plan_of(data, "sequence-classification")
        task = tasks.build(plan, tokenizer)
        dataset = prepare(train, "train", plan, task, tokenizer)
        assert task.labels == dataset.report.labels == ["a", "b", "c"]
        assert [int(dataset.item(i)[0]["label"][0]) for i in range(4)] == [1, 0, 2, 0]
    # Without the training rows prepared first, and with the classes of a model.
    alone = made(data, "evaluation", tokenizer=tokenizer, task="sequence-classification")
    assert alone.report.labels == ["a", "b", "c"]
    assert alone.report.dropped == {"label that cannot be used": 1}
    task = tasks.build(plan, tokenizer, labels=["z", "c"])
    given = prepare(held_out, "evaluation", plan, task, tokenizer)
    assert [int(given.item(i)[0]["label"][0]) for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("causal-lm", {"packing": True, "max_length": 256}),
        ("causal-lm", {"max_length": 150, "too_long": "drop"}),
        ("causal-lm", {"max_length": 100}),
        ("sequence-classification", {"max_length": 32, "label": "label"}),
    ],
)
def test_the_planner_foresees_what_is_prepared(task: str, settings: dict[str, Any], tmp_path: Path) -> None:
    texts = [" ".join(["word"] * (3 + (7 * number) % 40)) if number % 20 else " " for number in range(3000)]
    tokenizer = TOKENIZER if task == "causal-lm" else word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    data = text_data(
        tmp_path, [{"text": text, "label": number % 3} for number, text in enumerate(texts)], **settings
    )
    seen = one_pass(data.train, data, str(tmp_path / "model"), task)
    dataset = made(data, tokenizer=tokenizer, task=task)
    assert isinstance(seen, Items) and seen.by_tokenizer and seen.num_rows == 3000
    assert seen.num_items == pytest.approx(dataset.num_items, rel=0.05)
    assert seen.mean == pytest.approx(dataset.num_tokens / dataset.num_samples, rel=0.05)


CHAT = [
    {"m": [{"role": "user", "content": "a dog ran"}, {"role": "assistant", "content": "in the park ?"}]},
    {
        "m": [
            {"role": "user", "content": [{"type": "text", "text": "the cat"}]},
            {"role": "assistant", "content": "sat on the mat ."},
        ]
    },
    {"m": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": None}]},
    {"m": [{"role": "user", "content": "no answer"}]},
    {"m": [{"role": "user", "content": "a \ud800"}, {"role": "assistant", "content": "yes"}]},
    {"m": []},
]
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    {"text": "fine", "label": "a"},
    {"text": "too", "label": "b"},
    {"text": " ", "label": "a"},
    {"text": "a \ud800", "label": "a"},
]
PAIR = [{"q": "the cat", "a": "sat"}, {"q": "the cat", "a": " "}, {"q": "", "a": "sat"}, {"q": "the cat"}]


@pytest.mark.parametrize(
    ("rows", "task", "settings"),
    [
        (CHAT, "causal-lm", {"messages": "m"}),
        (PAIR, "causal-lm", {"prompt": "q", "completion": "a"}),
        (TEXT, "causal-lm", {"text": "text"}),
        (
            [*TEXT, {"text": "x"}, {"text": "x", "label": None}, {"text": "x", "label": ""}],
            "sequence-classification",
            {"text": "text"},
        ),
        (
            [{"text": "x", "label": n} for n in ("1.5", 2, "nan", None)],
            "sequence-classification",
            {"text": "text", "problem": "regression"},
        ),
    ],
)
def test_the_planner_leaves_out_what_the_trainer_does(
    rows: list[Any], task: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(PARTS) if task == "causal-lm" else word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    data = tasks.find(task).Columns.model_validate({"train": jsonl(tmp_path / "a.jsonl", rows)} | settings)
    seen = one_pass(data.train, data, str(tmp_path / "model"), task)
    dataset = made(data, tokenizer=tokenizer, task=task)
    assert seen is not None and (seen.num_items, seen.num_rows) == (dataset.num_samples, len(rows))
    # How many tokens a chat's marks are is a rule of thumb.
    assert seen.mean == pytest.approx(
        dataset.num_tokens / dataset.num_samples, rel=0.3 if "messages" in settings else 1e-6
    )


def test_what_is_not_used_goes_when_more_is_prepared_than_the_cache_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE_SIZE", "1kB")
    first = made(text_data(tmp_path))
    second = made(text_data(tmp_path, max_length=20))
    assert first.directory.is_dir() and second.directory.is_dir(), "both are used by this process"
    before, gone = contents(first), first.directory
    assert before
    del first
    third = made(text_data(tmp_path, max_length=30))
    assert not gone.exists() and second.directory.is_dir() and third.directory.is_dir()
    assert contents(made(text_data(tmp_path))) == before, "it is made again when it is needed"


def test_a_bound_that_is_no_size_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE_SIZE", "much")
    with pytest.raises(ConfigurationError, match="LAUNCHER_CACHE_SIZE = 'much'"):
        made(text_data(tmp_path))
    assert not list(cache_root().glob("*/meta.json"))
