"""What a look at some rows says of a job before anything is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher import tasks
from launcher.data import formats
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planner.dataset.findings import Findings
from launcher.planner.dataset.usable_rows import look_at_rows
from launcher.planner.search import plan_job
from tests.unit.small_rows import NAMES, WAYS, write_rows

TEXTS = [{"text": f"row {number}", "label": ("no", "yes")[number % 2]} for number in range(40)]


def look(
    folder: Path,
    rows: list[dict[str, Any]] | str,
    task: str = "causal-lm",
    name: str = "rows.jsonl",
    **data: Any,
) -> Findings:
    return look_at_rows(job(folder, rows, task, name, **data))


def job(folder: Path, rows: list[dict[str, Any]] | str, task: str, name: str, **data: Any) -> Job:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    columns = data or {"text": "text"}
    content = {
        "name": "a",
        "model": {"name": "hub/none", "task": task},
        "data": {"train": {"path": str(path)}, **columns},
        "cluster": {"gpus_per_node": 0},
    }
    return Job.model_validate(content)


def test_rows_that_are_as_they_should_be_say_nothing(tmp_path: Path) -> None:
    assert look(tmp_path, TEXTS) == Findings()
    assert look(tmp_path, TEXTS, "sequence-classification", text="text", label="label") == Findings()


WRONG = {
    "causal-lm": {"prompt": "qestion", "completion": "text"},
    "masked-lm": {"text": "txt"},
    "sequence-classification": {"text": "text", "label": "labl"},
    "token-classification": {"words": "wrds", "tags": "label"},
    "question-answering": {"question": "text", "context": "contxt"},
    "sequence-to-sequence": {"source": "text", "target": "label2"},
    "image-classification": {"image": "file_nme"},
    "audio-classification": {"audio": "sond"},
    "speech-recognition": {"audio": "sond"},
    "image-to-text": {"image": "file_nme"},
    "image-text-to-text": {"messages": "mesages"},
}


@pytest.mark.parametrize("task", [name for name in tasks.TASKS if name != "multi-task"])
def test_a_wrong_column_is_a_problem_with_every_task(task: str, tmp_path: Path) -> None:
    findings = look(tmp_path, TEXTS, task, **WRONG[task])
    [problem] = findings.problems
    assert problem.key == "data.train" and problem.value == str(tmp_path / "rows.jsonl")
    assert problem.reason.startswith("none of 40 rows can be used, one of them for: missing key: no ")
    with pytest.raises(ConfigurationError, match="none of 40 rows can be used"):
        plan_job(job(tmp_path, TEXTS, task, "rows.jsonl", **WRONG[task]))


@pytest.mark.parametrize(("task", "way"), WAYS, ids=NAMES)
def test_small_rows_of_every_task_say_nothing(task: str, way: tuple[str, ...], tmp_path: Path) -> None:
    rows = write_rows(tmp_path, way, number=20).read_text()
    assert look(tmp_path, rows, task, **{role: role for role in way}) == Findings()


@pytest.mark.parametrize(("task", "way"), WAYS, ids=NAMES)
def test_an_empty_column_is_a_problem_with_every_task(
    task: str, way: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in write_rows(tmp_path, way).read_text().splitlines()]
    empty = way[-1]
    rows = [row | {empty: type(row[empty])()} for row in rows]
    findings = look(tmp_path, rows, task, **{role: role for role in way})
    if empty == "spans":  # texts without any entity
        assert findings == Findings()
    else:
        assert findings.problems[0].reason.startswith("none of 12 rows can be used, one of them for: ")


@pytest.mark.parametrize(("task", "way"), WAYS, ids=NAMES)
def test_the_nearest_name_is_offered_for_a_wrong_column(
    task: str, way: tuple[str, ...], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path, way).read_text()
    [problem] = look(tmp_path, rows, task, **{role: role for role in way} | {way[0]: f"{way[0]}z"}).problems
    assert problem.reason.endswith(f"; did you mean {way[0]!r}?")


@pytest.mark.parametrize(("task", "way"), [case for case in WAYS if case[1][0] in ("image", "audio")])
def test_files_that_are_not_there_are_a_problem(task: str, way: tuple[str, ...], tmp_path: Path) -> None:
    rows, columns = write_rows(tmp_path, way).read_text(), {role: role for role in way}
    suffix = "png" if way[0] == "image" else "wav"
    (tmp_path / f"3.{suffix}").write_bytes(b"")
    (tmp_path / f"5.{suffix}").unlink()
    [remark] = look(tmp_path, rows, task, **columns).remarks
    assert re.match(
        r"2 of 12 rows cannot be used, one of them for: empty: .*3\.\w+: no bytes in it", remark.reason
    )
    for file in tmp_path.glob(f"*.{suffix}"):
        file.unlink()
    [problem] = look(tmp_path, rows, task, **columns).problems
    hint = r"no such file; paths are relative to the file that names them"
    assert re.match(
        rf"none of 12 rows can be used, one of them for: missing key: .*\d\.\w+: {hint}", problem.reason
    )
    (tmp_path / f"0.{suffix}").mkdir()
    assert "is no file" in look(tmp_path, rows.splitlines()[0] + "\n", task, **columns).problems[0].reason


def test_of_many_files_some_are_looked_for(tmp_path: Path) -> None:
    rows = [{"image": f"{number}.png", "label": "a"} for number in range(2000)]
    [problem] = look(tmp_path, rows, "image-classification", image="image").problems
    assert re.match(r"none of 2\d\d rows that were looked at can be used", problem.reason)


def test_an_answer_that_is_not_in_its_context_is_a_problem(tmp_path: Path) -> None:
    rows = [{"question": "q", "context": "a b", "answers": {"text": ["c"], "answer_start": [0]}}] * 20
    [problem] = look(tmp_path, rows, "question-answering", question="question").problems
    assert "at character 0 stands 'a', not 'c'; it stands nowhere in it" in problem.reason


def test_tags_and_words_of_different_lengths_are_a_problem(tmp_path: Path) -> None:
    rows = [{"words": ["a", "b"], "tags": ["O"]}] * 20
    [problem] = look(tmp_path, rows, "token-classification", words="words", tags="tags").problems
    assert problem.reason.endswith("2 words in 'words' and 1 tags in 'tags'")


def test_words_in_the_place_of_tags_are_doubted(tmp_path: Path) -> None:
    rows = [{"words": [f"w{n}", f"v{n}", f"u{n}"], "tags": ["DET", "NOUN", "VERB"]} for n in range(40)]
    findings = look(tmp_path, rows, "token-classification", words="tags", tags="words", scheme="none")
    [remark] = findings.remarks
    assert (
        remark.reason
        == "120 words in 40 rows have 120 different tags, as 'u0'; are the tags in another column than 'words'?"
    )
    assert (
        look(tmp_path, rows, "token-classification", words="words", tags="tags", scheme="none") == Findings()
    )


def test_numbers_in_the_place_of_a_text_are_doubted(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "id": number} for number in range(20)]
    for task in ("causal-lm", "masked-lm"):
        [remark] = look(tmp_path, rows, task, text="id").remarks
        assert re.fullmatch(
            r"each of 20 rows has a number for a text, as '\d+'; is the text in another column than 'id'\?",
            remark.reason,
        )


def test_the_same_text_twice_is_doubted(tmp_path: Path) -> None:
    rows = [{"en": f"row {number}", "de": f"row {number}"} for number in range(20)]
    [remark] = look(tmp_path, rows, "sequence-to-sequence", source="en", target="de").remarks
    assert (
        remark.reason
        == "each of 20 rows has the same text twice, in 'en' and 'de'; name another column for one"
    )


def test_texts_and_numbers_as_labels_are_doubted(tmp_path: Path) -> None:
    """Labels that come again, and are no classes all the same."""
    rows = [
        {"text": f"row {number}", "label": f"a label {number % 30} of {'many ' * 12}"} for number in range(40)
    ]
    [remark] = look(tmp_path, rows, "sequence-classification", text="text", label="label").remarks
    assert remark.reason.startswith(
        "30 classes in 40 rows have names of 72 characters in the mean; is the label in"
    )
    rows = [{"text": f"row {number}", "label": str(number % 8 / 4)} for number in range(40)]
    [remark] = look(tmp_path, rows, "sequence-classification", text="text", label="label").remarks
    assert re.fullmatch(
        r"the label 'label' holds numbers, as [\d.]+, and each is taken for a class, 8 in 40 rows; to learn "
        r"numbers write data.problem: regression",
        remark.reason,
    )
    rows = [{"text": f"row {number}", "label": 0.25} for number in range(40)]
    [problem] = look(tmp_path, rows, "sequence-classification", text="text", label="label").problems
    assert problem.reason.endswith(
        "0.25 is not the name of a class; to learn numbers write data.problem: regression"
    )


@pytest.mark.parametrize(
    ("names", "given", "reason"),
    [
        (("equivalent", "not_equivalent"), None, "f1 is that of 'not_equivalent', the second of two classes"),
        ((2, 10), None, "f1 is that of '10', the second of two classes"),
        (("equivalent", "not_equivalent"), "Equivalent", None),
        (("yes", "no"), None, None),
        ((True, False), True, None),
        ((0, 1), 0, None),
        (("LABEL_0", "LABEL_1"), None, None),
        (("a", "b", "c"), None, None),
        (("a", "b"), "c", "is none of their classes, 'a' and 'b'"),
    ],
)
def test_of_which_of_two_classes_f1_is_is_said_once(
    names: tuple[Any, ...], given: Any, reason: str | None, tmp_path: Path
) -> None:
    rows = [{"text": f"row {number}", "label": names[number % len(names)]} for number in range(12)]
    keys: dict[str, Any] = {} if given is None else {"positive_label": given}
    keys |= {"text": "text", "label": "label"}
    once = job(tmp_path, rows, "sequence-classification", "rows.jsonl", **keys)
    held_out = once.data.model_copy(update={"evaluation": once.data.train})
    found, twice = look_at_rows(once), look_at_rows(once.model_copy(update={"data": held_out}))
    assert [one.reason[: len(reason or "")] for one in found.remarks] == ([reason] if reason else [])
    assert found == twice


def test_a_table_without_a_header_is_a_problem(tmp_path: Path) -> None:
    table = "".join(f"{row['label']}\t{row['text']}\n" for row in TEXTS)
    [problem] = look(tmp_path, table, name="rows.tsv").problems
    assert "has no column 'text'; it has 'no', 'row 0'" in problem.reason
    assert "name columns by number from 0" in problem.reason


def test_a_header_that_is_taken_for_a_row_is_doubted(tmp_path: Path) -> None:
    table = "sentence,class\n" + "".join(f"{row['text']},{row['label']}\n" for row in TEXTS)
    by_number = {"text": "0", "label": "1"}
    [remark] = look(tmp_path, table, "sequence-classification", "rows.csv", **by_number).remarks
    assert remark.reason.startswith(
        "its first line (sentence, class) reads as a header, and is taken for a row"
    )
    body = table.partition("\n")[2]
    assert look(tmp_path, body, "sequence-classification", "rows.csv", **by_number) == Findings()


def test_a_file_without_rows_is_a_problem(tmp_path: Path) -> None:
    assert look(tmp_path, "").problems == (
        Problem("data.train", str(tmp_path / "rows.jsonl"), "has no rows"),
    )


@pytest.mark.parametrize(
    ("policy", "num_bad", "stops"),
    [
        ("drop-few", 3, False),
        ("drop-few", 21, True),
        ("drop", 39, False),
        ("drop", 40, True),
        ("refuse", 1, True),
    ],
)
def test_some_bad_rows_stop_a_job_as_its_policy_would(
    policy: str, num_bad: int, stops: bool, tmp_path: Path
) -> None:
    rows = [{"text": ""}] * num_bad + TEXTS[num_bad:]
    findings = look(tmp_path, rows, text="text", unusable=policy)
    [told] = findings.problems if stops else findings.remarks
    number = "none of 40 rows can" if num_bad == 40 else f"{num_bad} of 40 rows cannot"
    cure = "; with data.unusable: drop a run uses the others" if (policy, num_bad) == ("drop-few", 21) else ""
    assert told.reason == f"{number} be used, one of them for: empty: 'text' has no text{cure}"
    assert bool(findings.problems) == stops


def test_of_a_large_file_a_share_is_known(tmp_path: Path) -> None:
    """Most of the rows that were looked at: there may be others, so that nobody is stopped."""
    rows = [{"text": "" if number % 4 else "a"} for number in range(2000)]
    findings = look(tmp_path, rows)
    [remark] = findings.remarks
    assert not findings.problems and "rows that were looked at cannot be used" in remark.reason


def words_tokenizer(folder: Path) -> str:
    """A model's directory whose tokenizer makes a token of each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"w": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize(
    ("policies", "num_long", "stops"),
    [
        ({}, 40, None),
        ({"too_long": "drop"}, 0, None),
        ({"too_long": "drop"}, 20, False),
        ({"too_long": "drop"}, 21, True),
        ({"too_long": "drop", "unusable": "drop"}, 39, False),
        ({"too_long": "drop", "unusable": "drop"}, 40, True),
        ({"too_long": "refuse", "unusable": "drop"}, 1, True),
    ],
)
def test_rows_that_are_too_long_stop_a_job_before_it_runs(
    policies: dict[str, str], num_long: int, stops: bool | None, tmp_path: Path
) -> None:
    rows = [{"text": "w " * 30}] * num_long + [{"text": "w w"}] * (40 - num_long)
    columns = {"text": "text", "max_length": 16, **policies}
    assert look(tmp_path, rows, **columns) == Findings(), "there is no tokenizer here"
    of_job = job(tmp_path, rows, "causal-lm", "rows.jsonl", **columns)
    model = of_job.model.model_copy(update={"name": words_tokenizer(tmp_path)})
    findings = look_at_rows(of_job.model_copy(update={"model": model}))
    if stops is None:
        assert findings == Findings()
        return
    [told] = findings.problems if stops else findings.remarks
    number = "none of 40 rows can" if num_long == 40 else f"at least {num_long} of 40 rows cannot"
    reason = "be used, one of them for: too long: at least 30 tokens, and max_length is 16; a larger data.max_length"
    cure = "; with data.unusable: drop a run uses the others" if num_long == 21 else ""
    assert told.reason == f"{number} {reason} keeps more of them{cure}" and bool(findings.problems) == stops


@pytest.mark.parametrize(
    ("task", "data", "tokens", "reason"),
    [
        ("causal-lm", {"prompt": "a", "completion": "b"}, [17, 1], "nothing left to learn"),
        ("causal-lm", {"prompt": "a", "completion": "b"}, [16, 90], None),
        ("causal-lm", {"prompt": "a", "completion": "b", "too_long": "drop"}, [10, 8], "too long"),
        ("causal-lm", {"prompt": "a", "completion": "b", "too_long": "drop"}, [9, 8], None),
        ("sequence-to-sequence", {"source": "a", "target": "b", "max_target_length": 8}, [90, 90], None),
        ("sequence-to-sequence", {"source": "a", "target": "b", "max_target_length": 8, "too_long": "drop"}, [14, 6], None),
        ("sequence-to-sequence", {"source": "a", "target": "b", "max_target_length": 8, "too_long": "drop"}, [14, 7], "too long"),
        ("masked-lm", {"text": "a", "too_long": "drop"}, [14], None),
        ("masked-lm", {"text": "a", "too_long": "drop"}, [15], "too long"),
        ("image-classification", {"image": "a", "max_length": 1}, [], None),
    ],
)  # fmt: skip
def test_a_row_is_too_long_only_where_that_is_certain(
    task: str, data: dict[str, Any], tokens: list[int], reason: str | None
) -> None:
    kind = tasks.find(task)
    section = {"train": {"path": "rows.jsonl"}, "max_length": 16, **data}
    content = {"name": "a", "model": {"name": "hub/none", "task": task}, "data": section}
    content["cluster"] = {"gpus_per_node": 0}
    why = kind(Job.model_validate(content).data).why_too_long(tokens, 2 * len(tokens))
    assert (why and why.reason) == reason


def test_a_text_in_the_place_of_the_label_is_doubted(tmp_path: Path) -> None:
    swapped = {"text": "label", "label": "text"}
    [remark] = look(tmp_path, TEXTS, "sequence-classification", **swapped).remarks
    assert re.fullmatch(
        r"each of 40 rows has a class of its own, as 'row \d+'; is the label in another column than 'text'\? "
        r"'label' has 2 different values",
        remark.reason,
    )
    assert look(tmp_path, TEXTS[:9], "sequence-classification", **swapped) == Findings()
    several = look(tmp_path, TEXTS, "sequence-classification", problem="multi-label", **swapped)
    assert several == Findings(), "a row may have a class of its own beside those it shares"


def test_a_file_that_is_read_as_a_whole_is_not_looked_at_where_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats.Json, "most_bytes", 10)
    findings = look(tmp_path, json.dumps(TEXTS), name="rows.json")
    assert not findings.problems and findings.remarks[0].reason.startswith("its rows were not looked at: ")


def test_data_elsewhere_are_not_looked_at(tmp_path: Path) -> None:
    there = job(tmp_path, TEXTS, "causal-lm", "rows.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    assert look_at_rows(there) == Findings()
    on_the_hub = there.data.model_copy(update={"train": there.data.train.model_copy(update={"path": None})})
    assert look_at_rows(there.model_copy(update={"data": on_the_hub})) == Findings()
