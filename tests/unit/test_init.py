"""`launcher init`: it opens the data, offers columns, checks each answer at once, and loses none."""

from __future__ import annotations

import io
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import tasks
from launcher.cli import completion
from launcher.cli.dialog import Dialog
from launcher.cli.init import free_place
from launcher.cli.init_answers import in_a_line
from launcher.cli.init_questions import Questions
from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.init import put, unfinished
from launcher.job.load import load
from launcher.planner.draft import Draft
from launcher.training.demo import models
from tests.unit.small_rows import NAMES, WAYS, write_rows

LABELLED = [{"text": f"a text of row {number}", "label": ("x", "y")[number % 2]} for number in range(20)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(LABELLED)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    return tmp_path


def write(rows: list[dict[str, Any]], name: str = "train.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def call(*arguments: str) -> int:
    """The exit code of one command in this process."""
    try:
        main(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def typing(*answers: str) -> Dialog:
    """A dialog with somebody who types these answers, and then leaves."""
    left = iter(answers)

    def read(question: str) -> str:
        print(question)
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return Dialog(True, read)


def ask(*answers: str, out: str = "job.yaml", **flags: str) -> dict[str, Any]:
    """The content that somebody's answers make."""
    return Questions(typing(*answers), Path(out), flags).content({})


@pytest.mark.parametrize(("name", "way"), WAYS, ids=NAMES)
def test_what_is_offered_makes_a_job_that_validates(
    name: str, way: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, way)
    assert call("init", "--yes", "--model", "org/model", "--task", name, "--train", "train.jsonl") == 0
    assert call("validate", "job.yaml") == 0
    assert f"is a valid job ({name})" in capsys.readouterr().out
    job = load("job.yaml")
    assert {role: getattr(job.data, role) for role in way} == {role: role for role in way}


@pytest.mark.parametrize(("name", "way"), WAYS, ids=NAMES)
def test_each_way_of_columns_may_be_named_by_flags(name: str, way: tuple[str, ...], tmp_path: Path) -> None:
    write_rows(tmp_path, way, "my_")
    columns = [part for role in way for part in ("--column", f"{role}=my_{role}")]
    assert call("init", "--model", "org/model", "--task", name, "--train", "train.jsonl", *columns) == 0
    job = load("job.yaml")
    assert job.model.task == name
    assert {role: getattr(job.data, role) for role in way} == {role: f"my_{role}" for role in way}


@pytest.mark.parametrize(("name", "way"), WAYS, ids=NAMES)
def test_the_task_is_suggested_by_the_columns(name: str, way: tuple[str, ...], tmp_path: Path) -> None:
    draft = Draft(tmp_path)
    draft.put("data.train.path", write_rows(tmp_path, way).name)
    likely = draft.likely_tasks()
    # Of text alone a causal LM may learn as well as a masked one, and of messages without images as well as one
    # that sees; the registry has it first.
    any_may = name == "masked-lm" or way == ("messages",)
    assert likely[0] == ("causal-lm" if any_may else name) and sorted(likely) == sorted(tasks.names())


def test_tasks_of_installed_packages_are_offered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = metadata.EntryPoints([metadata.EntryPoint("own", "package:Own", tasks.GROUP)])
    monkeypatch.setattr(metadata, "entry_points", lambda **selected: own)
    assert tasks.names() == [*tasks.TASKS, "own"]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_told_in_a_line(name: str) -> None:
    assert 10 < len(in_a_line(tasks.find(name))) < 75


def test_the_file_is_shown_and_its_columns_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    content = ask("train.jsonl", "", "", "", "", "bert", *[""] * 6)
    assert content == {
        "name": "bert-train",
        "model": {"task": "sequence-classification", "name": "bert"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "label": "label", "max_length": 64},
        "batch": {"global_batch_size": 16},
        "training": {"epochs": 3, "learning_rate": 1e-4},
    }
    shown = capsys.readouterr().out
    assert "  4 steps are few: at the usual 2e-05 they would learn little\n" in shown
    assert (
        "train.jsonl: 20 rows\n  text   text          'a text of row 0'\n  label  a few values  'x'\n"
        in shown
    )
    assert "Task [sequence-classification]: \n" in shown and "Column of the label [label]: \n" in shown
    assert all(f"  {name}" in shown for name in tasks.TASKS)
    assert "99% up to" in shown and "(by their characters)" in shown


def test_each_answer_is_checked_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        *("trian.jsonl", "bert", "train.jsonl", "tset.jsonl", "none"),
        *("sequence", "?", "sequence-classification", "txt", "text", "labl", ""),
        *("./brt", "./bert", "9999", "many", "128", "0", "2", "lots", "8", "-1", "1e-3"),
        *("?", "moon", "slurm", "none", "2", "100000", "4", "h100", "h100-80gb", "long", "8h", "a b", "mine"),
    ]
    content = ask(*answers)
    shown = capsys.readouterr().out
    for reason in (
        "no such file; did you mean train.jsonl?",
        "bert is a directory; name its files by a pattern such as bert/*.jsonl",
        "--evaluation = 'tset.jsonl': no such file",
        "no such task; there are audio-classification",
        "the nearest is sequence-classification",
        "What the model learns to do.",
        "data.text = 'txt': no such column; there are text, label; the nearest is text",
        "data.label = 'labl': no such column; there are text, label; the nearest is label",
        "model.name = './brt': no such directory; the nearest there is bert",
        "data.max_length = 9999: a bert model has no positions beyond 512",
        "data.max_length = 'many': write a whole number",
        "training.epochs = 0: write a number above 0",
        "model.adapter.rank = 'lots': write a whole number",
        "training.learning_rate = -1: write a number above 0",
        "slurm adds the section `cluster`: nodes, GPUs, time limit.",
        "--where = 'moon': write one of here, slurm",
        "cluster.nodes = 'none':",
        "cluster.gpus_per_node = 100000:",
        "cluster.gpu = 'h100': is not in the table; the nearest: h100-80gb",
        "cluster.time_limit = 'long': write a time",
        "name = 'a b':",
    ):
        assert reason in shown, reason
    assert content["cluster"] == {"nodes": 2, "gpus_per_node": 4, "gpu": "h100-80gb", "time_limit": "8h"}
    assert content["model"]["adapter"] == {"rank": 8} and content["training"]["learning_rate"] == 1e-3
    assert content["data"]["max_length"] == 128 and content["name"] == "mine"


@pytest.mark.parametrize("number", [1, 4, 6, 9, 11])
def test_no_answer_is_lost_where_the_answers_end(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["train.jsonl", "none", "causal-lm", "text", "text", "./bert", "96", "5", "all", "3e-4", "here"]
    with pytest.raises(EOFError):
        ask(*answers[:number])
    earlier = yaml.safe_load(unfinished(Path("job.yaml")).read_text())
    capsys.readouterr()
    again = Questions(typing(*[""] * number, *answers[number:], ""), Path("job.yaml"), {})
    content = again.content(earlier)
    assert content["data"] == {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 96}
    assert (
        content["training"] == {"epochs": 5, "learning_rate": 3e-4} and content["model"]["name"] == "./bert"
    )
    assert "train.jsonl]: " in capsys.readouterr().out


def test_answers_are_kept_beside_the_file_and_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EOFError):
        ask("train.jsonl", "none", "sequence-classification", "", "", "./bert", out="mine.yaml")
    assert not Path("mine.yaml").exists()
    assert call("init", "--out", "mine.yaml", "--yes") == 0
    assert "going on with the answers in mine.unfinished.yaml" in capsys.readouterr().err
    assert load("mine.yaml").model.task == "sequence-classification"
    assert not Path("mine.unfinished.yaml").exists()


def test_a_file_that_is_there_is_not_written_over_unasked() -> None:
    Path("job.yaml").write_text("mine")
    assert free_place(typing(""), Path("job.yaml"), False) == (Path("job-2.yaml"), False)
    assert free_place(typing("job.yaml", "other.yaml"), Path("job.yaml"), False) == (
        Path("other.yaml"),
        False,
    )
    assert free_place(typing("y"), Path("job.yaml"), False) == (Path("job.yaml"), True)
    assert free_place(typing(), Path("new.yaml"), False) == (Path("new.yaml"), False)
    with pytest.raises(ConfigurationError, match="is there already; name another file, or --force"):
        free_place(Dialog(False), Path("job.yaml"), False)


def test_swapped_columns_are_doubted_before_they_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    content = ask("train.jsonl", "", "", "label", "text", "n", "text", "label", "bert", *[""] * 6)
    shown = capsys.readouterr().out
    assert "each of 20 rows has a class of its own" in shown and "'label' has 2 different values" in shown
    assert "Take these columns all the same? y or n [n]: " in shown
    assert content["data"]["label"] == "label"
    content = ask("train.jsonl", "", "", "label", "text", "maybe", "y", "bert", *[""] * 6)
    assert content["data"]["label"] == "text" and "write y or n" in capsys.readouterr().out


def test_columns_that_no_row_can_use_are_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    write([{"words": ["a", "b"], "tags": ["O"], "right": ["O", "O"]}] * 8)
    ask(
        "train.jsonl",
        "",
        "token-classification",
        "",
        "words",
        "tags",
        "",
        "words",
        "right",
        "bert",
        *[""] * 6,
    )
    assert (
        "none of 8 rows can be used, one of them for: label that cannot be used: 2 words"
        in capsys.readouterr().out
    )


def test_a_table_without_a_header_has_columns_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.tsv").write_text("".join(f"{row['label']}\t{row['text']}\n" for row in LABELLED))
    content = ask("train.tsv", "", "", "", "", "bert", *[""] * 6)
    assert content["data"]["text"] == "1" and content["data"]["label"] == "0"
    assert "20 rows; it has no header, so columns are named by number" in capsys.readouterr().out


def test_a_pair_is_offered_and_may_be_typed() -> None:
    write([{"premise": f"a {n}", "hypothesis": f"b {n}", "label": n % 2} for n in range(20)])
    content = ask("train.jsonl", "", "", "", "", "bert", *[""] * 6)
    assert content["data"]["text"] == ["premise", "hypothesis"]
    content = ask("train.jsonl", "", "", "hypothesis, premise", "", "bert", *[""] * 6)
    assert content["data"]["text"] == ["hypothesis", "premise"]


@pytest.mark.parametrize(
    ("rows", "task", "settings"),
    [
        (
            [{"text": f"t {n}", "label": n / 3} for n in range(20)],
            "sequence-classification",
            "problem: regression",
        ),
        (
            [{"text": f"t {n}", "labels": ["a", "b"][: 1 + n % 2]} for n in range(20)],
            "sequence-classification",
            "problem: multi-label",
        ),
        (
            [{"words": ["a", f"w{n}"], "pos_tags": ["DET", "NOUN"]} for n in range(20)],
            "token-classification",
            "scheme: none",
        ),
        (
            [{"words": ["a", f"w{n}"], "tags": ["O", "S-PER"]} for n in range(20)],
            "token-classification",
            "rows_scheme: BIOES",
        ),
        (
            [{"question": "q?", "context": "c d", "answers": [], "is_impossible": True}] * 4
            + [
                {"question": f"q{n}?", "context": f"c {n}", "answers": [{"text": "c", "answer_start": 0}]}
                for n in range(9)
            ],
            "question-answering",
            "unanswerable: true",
        ),
        (
            [
                {"question": f"q{n}?", "context": f"c {n}", "answers": "c", "answer_start": 0}
                for n in range(9)
            ],
            "question-answering",
            "answer_start: answer_start",
        ),
    ],
)
def test_keys_that_the_rows_need_are_set_too(rows: list[dict[str, Any]], task: str, settings: str) -> None:
    write(rows)
    assert call("init", "--yes", "--model", "org/model", "--train", "train.jsonl", "--task", task) == 0
    assert settings in Path("job.yaml").read_text()
    assert call("validate", "job.yaml") == 0


def test_a_held_out_file_beside_is_offered() -> None:
    write(LABELLED, "valid.jsonl")
    write(LABELLED, "contest.jsonl")
    content = ask("train.jsonl", "", "", "", "", "bert", *[""] * 6)
    assert content["data"]["evaluation"] == {"path": "valid.jsonl"}
    content = ask("train.jsonl", "none", "", "", "", "bert", *[""] * 6)
    assert "evaluation" not in content["data"]


def test_rows_that_were_cut_off_the_training_file_are_not_offered_to_measure_on() -> None:
    write(LABELLED[:15], "train-train.jsonl")
    write(LABELLED[15:], "train-evaluation.jsonl")
    draft = Draft(Path())
    draft.put("data.train.path", "train.jsonl")
    assert draft.held_out() is None, "its rows would be learned too"
    draft.put("data.train.path", "train-train.jsonl")
    assert draft.held_out() == "train-evaluation.jsonl"


@pytest.fixture
def packaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models in Python packages, of which one is installed."""
    inside = folder / "packages/some_package/model"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    monkeypatch.syspath_prepend(str(folder / "packages"))
    known = {
        "minilm-l6": models.Package("some_package", "some-package==1", "model"),
        "smollm2-135m": models.Package("no_such_package", "no-such-package==2", "model"),
    }
    monkeypatch.setattr(models, "PACKAGES", known)
    return inside


def test_a_model_in_a_package_is_known_by_its_name(
    packaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = ask("train.jsonl", "", "", "", "", "smollm2-135m", "minilm-l6", *[""] * 6)
    assert content["model"]["name"] == str(packaged)
    shown = capsys.readouterr().out
    assert "its package is not installed; run: " in shown and "no-such-package==2" in shown
    assert f"minilm-l6 is in {packaged}" in shown and "fetches it" not in shown
    assert completion.models_to_train("mini") == ["minilm-l6"]
    assert completion.models_to_train("smol") == [] and "minilm-l6" in completion.models_to_train("")
    arguments = ("--train", "train.jsonl", "--model", "minilm-l6", "--out", "other.yaml")
    assert call("init", "--yes", *arguments) == 0
    assert load("other.yaml").model.name == str(packaged)


def test_a_model_that_is_not_here_is_kept_or_another_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    answers = ("train.jsonl", "", "", "", "", "org/model")
    assert ask(*answers, "", *[""] * 6)["model"]["name"] == "org/model"
    assert "Keep it, or name another model [org/model]: " in capsys.readouterr().out
    assert ask(*answers, "bert", *[""] * 6)["model"]["name"] == "bert"


def test_the_tab_key_is_promised_where_it_names_something(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ("train.jsonl", "", "", "", "", "bert", *[""] * 6)
    ask(*answers)
    assert "the tab key names those on this machine" in capsys.readouterr().out
    monkeypatch.setattr(completion, "models_to_train", lambda incomplete: [])
    ask(*answers)
    shown = capsys.readouterr().out
    assert "a small one on the hub" in shown and "tab key" not in shown


def test_held_out_rows_without_the_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write([{"text": f"a {n}"} for n in range(20)], "test.jsonl")
    content = ask("train.jsonl", "", "", "", "", "bert", *[""] * 6)
    assert "evaluation" not in content["data"]
    shown = capsys.readouterr().out
    assert "none of 20 rows can be used, one of them for: missing key: no 'label'" in shown
    assert "so that file is left out; another one can be named as data.evaluation" in shown


def test_files_are_named_as_a_job_file_in_another_folder_sees_them(folder: Path) -> None:
    (folder / "jobs").mkdir()
    content = ask("train.jsonl", "../train.jsonl", "", "", "", "", "../bert", *[""] * 6, out="jobs/job.yaml")
    assert content["data"]["train"] == {"path": "../train.jsonl"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--max-length", "many"], "data.max_length = 'many'"),
        (["--epochs", "0"], "training.epochs = 0"),
        (["--adapter", "x"], "model.adapter.rank = 'x'"),
        (["--learning-rate", "no"], "training.learning_rate = False"),
        (["--where", "moon"], "--where = 'moon': write one of here, slurm"),
        (["--gpu", "h1000"], "cluster.gpu = 'h1000': is not in the table"),
        (["--nodes", "none"], "cluster.nodes = 'none'"),
        (["--gpus-per-node", "-1"], "cluster.gpus_per_node = -1"),
        (["--time-limit", "long"], "cluster.time_limit = 'long'"),
        (["--name", "a b"], "name = 'a b'"),
        (["--task", "sequence"], "the nearest is sequence-classification"),
        (["--evaluation", "gone.csv"], "--evaluation = 'gone.csv'"),
        (["--column", "label=labl", "--column", "text=text"], "missing key: no 'labl'"),
    ],
)
def test_a_flag_that_cannot_be_used_is_refused(
    flags: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert call("init", "--yes", "--model", "./bert", "--train", "train.jsonl", *flags) == 2
    assert reason in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_file_may_be_named_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    columns = ["--column", "label=label", "--column", "text=text"]
    assert call("init", "train.jsonl", "--yes", "--model", "./bert", *columns) == 0
    assert str(load("job.yaml").data.train.path).endswith("train.jsonl")
    assert call("init", "train.jsonl", "--train", "other.jsonl", "--yes", "--force") == 2
    assert "--train = 'other.jsonl': train.jsonl is named as well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "task", "adapter", "rate"),
    [
        (600, "sequence-classification", "all", 1e-4),
        (4000, "sequence-classification", "all", 2e-5),
        (600, "causal-lm", "all", 2e-5),
        (600, "sequence-classification", "8", 2e-4),
    ],
)
def test_few_steps_of_a_new_head_have_a_larger_rate(rows: int, task: str, adapter: str, rate: float) -> None:
    write([{"text": f"a text of row {number}", "label": "xy"[number % 2]} for number in range(rows)])
    flags = ["--train", "train.jsonl", "--task", task, "--model", "./bert", "--adapter", adapter]
    label = [] if task == "causal-lm" else ["--column", "label=label"]
    assert call("init", "--yes", "--column", "text=text", *label, *flags) == 0
    assert load("job.yaml").training.learning_rate == rate


def test_every_answer_has_a_flag() -> None:
    flags = "--task causal-lm --column text=text --max-length 96 --epochs 2 --adapter 8 --learning-rate 1e-4"
    flags += " --where slurm --nodes 2-4 --gpus-per-node 8 --gpu h100-80gb --time-limit 2h --name mine"
    assert call("init", "--model", "./bert", "--train", "train.jsonl", *flags.split()) == 0
    job = load("job.yaml")
    assert (job.name, job.model.task, job.data.max_length) == ("mine", "causal-lm", 96)
    assert job.model.adapter is not None and job.model.adapter.rank == 8
    assert (job.training.epochs, job.training.learning_rate) == (2, 1e-4)
    cluster = job.cluster
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu, cluster.time_limit) == (
        "2-4",
        8,
        "h100-80gb",
        7200,
    )


def test_answers_that_are_taken_back_leave_no_empty_section() -> None:
    content: dict[str, Any] = {}
    put(content, "data.train.path", "a")
    put(content, "data.train.path", None)
    assert content == {}


def test_the_schema_is_written_beside(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("init", "--out", "new.yaml", "--model", "org/model", "--train", "train.jsonl") == 0
    assert Path("new.yaml").read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert json.loads(Path("job.schema.json").read_text())["title"] == "Job"
    assert (
        "next:\n  launcher validate new.yaml\n  launcher plan new.yaml\n  launcher run"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--out", "there.yaml", "--train", "train.jsonl"],
            "is there already; name another file, or --force",
        ),
        (["--out", "no/job.yaml", "--train", "train.jsonl"], "the folder no is not there"),
        (["--train", "train.jsonl", "--column", "question"], "ROLE=COLUMN, where ROLE is text or label"),
        (["--train", "train.jsonl", "--column", "question=a"], "ROLE=COLUMN"),
        ([], "--train: is missing, and there is no terminal to ask on"),
        (["--train", "trian.jsonl"], "did you mean train.jsonl?"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    flags: list[str],
    reason: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    Path("there.yaml").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    assert call("init", "--model", "org/model", *flags) == 2
    assert reason in capsys.readouterr().err
    assert (
        sorted(path.name for path in folder.iterdir()) == before and Path("there.yaml").read_text() == "mine"
    )


def test_a_file_that_is_there_is_written_over_where_that_is_asked_for() -> None:
    Path("job.yaml").write_text("mine")
    assert call("init", "--model", "org/other", "--train", "train.jsonl", "--force") == 0
    assert load("job.yaml").model.name == "org/other"


def test_a_share_of_the_rows_is_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "org/model", "--train", "train.jsonl", "--evaluation", "10%")
    assert call("init", "--yes", *flags) == 0
    data = load("job.yaml").data
    assert data.evaluation is not None
    files = [Path(str(source.path)) for source in (data.train, data.evaluation)]
    assert [(one.name, len(one.read_text().splitlines())) for one in files] == [
        ("train-train.jsonl", 18),
        ("train-evaluation.jsonl", 2),
    ]
    # Refused for another answer, or given again, it takes the same two files.
    assert call("init", "--yes", "--out", "other.yaml", *flags, "--epochs", "many") == 2
    assert call("init", "--yes", "--out", "other.yaml", *flags) == 0
    assert load("other.yaml").data == data
    assert call("init", "--yes", "--out", "third.yaml", *flags[:-1], "20%") == 2
    error = capsys.readouterr().err
    assert "data.train.path = 'train-train.jsonl': is there already" in error
    assert "data.evaluation.path = 'train-evaluation.jsonl': is there already" in error


def test_a_share_with_answers_that_were_kept_is_of_the_whole_file() -> None:
    flags = ("--yes", "--model", "org/model", "--evaluation", "10%")
    assert call("init", *flags, "--train", "train.jsonl") == 0
    Path("job.yaml").rename("other.unfinished.yaml")
    assert call("init", *flags, "--out", "other.yaml") == 0
    assert Path(str(load("other.yaml").data.train.path)).name == "train-train.jsonl"
