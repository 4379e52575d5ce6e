"""`launcher help`: every topic that it names is answered, and the manual page is that of the commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from launcher import errors, tasks
from launcher.cli import man_page
from launcher.cli import topics as lookup
from launcher.cli.commands import available
from launcher.cli.help import complete
from launcher.errors import ConfigurationError
from launcher.job.describe import docstring, expected_of, keys, section_of
from tests.unit.test_cli import call

ROOT = Path(__file__).parents[2]
MAN_PAGE = ROOT / "docs" / "man" / "launcher.1"


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_every_page_of_the_index_is_a_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("help") == 0
    listed = capsys.readouterr().out
    for name, page in lookup.pages().items():
        assert re.search(rf"^ {name}\s", listed, re.MULTILINE), name
        assert lookup.find(name)[0].text == page.text
    pages = {f"docs/{page.file}" for page in lookup.pages().values()}
    hidden = {"README", "architecture", "log", "log-2026-11"}
    on_disk = {*ROOT.glob("docs/*.md"), *ROOT.glob("docs/reference/*.md")}
    assert pages == {str(path.relative_to(ROOT)) for path in on_disk if path.stem not in hidden}


def test_every_key_is_a_topic() -> None:
    for key in keys():
        path = key.path
        answers = [one_line(entry.text) for entry in lookup.parts(path, "job-file")]
        assert answers, path
        if section_of(key.field) is None:
            assert any(one_line(docstring(key.section, key.name)) in answer for answer in answers), path
            assert any(expected_of(key.field) in answer for answer in answers), path


def test_every_word_that_a_key_takes_is_a_topic() -> None:
    for key in keys():
        if get_origin(key.field.annotation) is Literal:
            for word in get_args(key.field.annotation):
                assert lookup.parts(str(word)), f"{key.path}: {word}"
    for word in (*tasks.TASKS, "adamw", "adafactor", "muon"):
        assert lookup.parts(word), word


def test_every_variable_is_a_topic() -> None:
    """All that the code names, whoever sets them."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "launcher").rglob("*.py"))
    variables = {
        *re.findall(r"\bLAUNCHER_[A-Z_]+\b", code),
        *re.findall(r"XDG_(?:CACHE|STATE|CONFIG)_HOME", code),
    }
    assert len(variables) > 10
    for variable in variables:
        assert [entry.kind for entry in lookup.find(variable)] == ["variable"], variable


@pytest.mark.parametrize("error", errors.leaves(), ids=lambda error: error.__name__)
def test_every_exit_code_is_a_topic(error: type[errors.LauncherError]) -> None:
    for topic in (str(error.exit_code), f"exit code {error.exit_code}", error.__name__, error.failure_class):
        assert any(f"Exit code {error.exit_code}:" in entry.text for entry in lookup.parts(topic)), topic


def test_every_symptom_and_term_is_a_topic() -> None:
    counted = dict.fromkeys(("symptom", "term"), 0)
    for entry in lookup.entries():
        if entry.kind in counted:
            counted[entry.kind] += 1
            assert entry in lookup.find(entry.names[0]), entry.names
    page = lookup.pages()["symptoms"].text
    assert counted["symptom"] == len(re.findall(r"^\| ", page, re.MULTILINE)) - 2 * page.count("| --- |\n")
    assert counted["term"] == len(re.findall(r"^\*\*", lookup.pages()["glossary"].text, re.MULTILINE))


@pytest.mark.parametrize(
    ("topic", "shown"),
    [
        ("optimizer", "training.optimizer: one of adamw"),
        ("training", "training.learning_rate: "),
        ("Micro Batch", "Micro-batch. The samples"),
        ("data packing", "share a row of max_length tokens"),
        ("global batch", "All samples of one optimizer step"),
        ("files open", "Cure: ulimit -n 4096"),
        ("data", "See also: launcher help job-file data"),
        ("slurm", "a sweep"),
        ("bench", "Usage: launcher bench"),
        ("muon", "training.optimizer: one of adamw"),
        ("cosine", "training.schedule: one of"),
        ("launcher_price", "h100-80gb=2.5"),
    ],
)
def test_a_topic_is_answered(
    topic: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert call("help", *topic.split()) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topic", "nearest"),
    [
        ("sulrm", "slurm"),
        ("training.optimiser", "training.optimizer"),
        ("data.max_lenght", "data.max_length"),
        ("rank-losst", "rank-lost"),
        ("exprot", "export"),
    ],
)
def test_a_wrong_topic_names_the_nearest(topic: str, nearest: str) -> None:
    with pytest.raises(
        ConfigurationError, match=re.escape(f"the nearest is {nearest}; `launcher help` lists")
    ):
        lookup.find(topic)


def test_a_topic_like_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("help", "qqqqqqqqqq") == 2
    assert capsys.readouterr().err.endswith("no such topic; `launcher help` lists them\n")


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for topic in ("", "slurm", "symptoms", "training", "report"):
        assert call("help", *topic.split()) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= columns, topic
        assert ".md" not in re.sub(r"[\w/]+\.md", "", shown) and "](" not in shown, "links are words"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("help", "--json") == 0
    assert json.loads(capsys.readouterr().out)["topics"]["slurm"].startswith("submitting")
    assert call("help", "9", "--json") == 0
    assert [one["kind"] for one in json.loads(capsys.readouterr().out)["answers"]] == ["exit code"]
    assert call("help", "bench", "--json") == 2


def test_topics_are_completed() -> None:
    assert complete("sl") == ["slurm"]
    assert complete("training.opt") == ["training.optimizer"]
    assert {*lookup.pages(), *available(), "rank-lost", "75"} <= set(complete(""))


def test_the_manual_page_is_up_to_date() -> None:
    assert man_page.page() == MAN_PAGE.read_text(encoding="utf-8"), "run `make docs`"


def test_the_manual_page_has_every_command_and_option() -> None:
    text = MAN_PAGE.read_text(encoding="utf-8").replace("\\-", "-")
    for name in available():
        assert re.search(rf"^\.SS launcher {name}$", text, re.MULTILINE), name
    assert ".SS launcher checkpoint average" in text and "\n.TP\n\\fB--keep-last" in text
    assert text.count(".SH EXIT STATUS") == 1 and "\\fB130\\fR" in text


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_the_manual_page_is_set_without_a_warning() -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", "-rLL=80n", "-P-cbou", str(MAN_PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "launcher checkpoint average" in done.stdout
