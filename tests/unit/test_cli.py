"""The command line: what is listed, what is printed where, and the exit codes."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import __version__
from launcher.cli import commands
from launcher.cli import main as cli
from launcher.cli.app import load
from launcher.errors import CheckpointError

GOOD = "name: run\nmodel: {name: org/model}\ndata: {train: {path: train.jsonl}, text: body}\n"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    columns = ("body", "question", "answer", "premise", "hypothesis", "label", "a", "b")
    (tmp_path / "train.jsonl").write_text(json.dumps(dict.fromkeys(columns, "word")) + "\n")
    (tmp_path / "job.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return tmp_path / "job.yaml"


def call(*arguments: str) -> int:
    """The exit code of one command in this process."""
    try:
        cli.main(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_validate(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("validate", "job.yaml", "--set", "training.seed=3") == 0
    assert capsys.readouterr().out == "job.yaml: run is a valid job (causal-lm)\n"


def test_problems_go_to_stderr_with_exit_code_2(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("validate", "job.yaml", "--set", "precision=fp8", "--set", "wat=1") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: job.yaml: 2 problems\n") and "precision = 'fp8'" in shown.err
    assert "\x1b" not in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vaildate", "job.yaml"], "Did you mean 'validate'"),
        (["validate"], "Missing argument"),
        (["validate", "job.yaml", "--nope"], "No such option"),
        (["plan", "job.yaml", "--nproc", "0"], "greater than or equal to 1"),
        (["--nope"], "No such option"),
        ([], "Usage"),
    ],
)
def test_usage_errors(job: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert call(*arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err + shown.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"launcher {__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands_that_are_there(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert call(flag) == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()]
    assert listed == list(commands.available())
    assert max(map(len, out.splitlines())) <= 100


def test_a_command_without_its_module_is_not_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(commands.COMMANDS, "later", commands.Command("later", "later", "Comes later."))
    assert call("--help") == 0
    assert "later" not in capsys.readouterr().out
    assert call("later") == 2


@pytest.mark.parametrize("name", list(commands.available()))
def test_every_command_loads_and_is_described_in_the_table(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = load(name)
    assert inspect.cleandoc(command.help).splitlines()[0] == commands.COMMANDS[name].help
    assert call(name, "--help") == 0
    assert commands.COMMANDS[name].help in " ".join(capsys.readouterr().out.split())


def test_error_class_gives_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("nothing whole")

    monkeypatch.setattr("launcher.job.load.load", fail)
    assert call("validate", "job.yaml") == CheckpointError.exit_code
    assert capsys.readouterr().err == "error: nothing whole\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x"), 5, "/x: Permission denied"),
    ],
)
def test_what_is_not_ours(
    monkeypatch: pytest.MonkeyPatch,
    job: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("launcher.job.load.load", fail)
    assert call("validate", "job.yaml") == code
    assert said in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, job: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError("no file in it")

    monkeypatch.setattr("launcher.job.load.load", fail)
    with pytest.raises(OSError, match="no file in it"):
        call("validate", "job.yaml")


def on_terminal(*arguments: str, typed: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and output of a command whose three streams are a terminal."""
    ours, theirs = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**kept, **environment}
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    output = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(ours)
    return process.wait(timeout=600), output.decode()


def test_red_only_on_a_terminal_and_without_no_color(job: Path) -> None:
    assert "\x1b[31merror:\x1b[0m" in on_terminal("validate", "none.yaml")[1]
    assert "\x1b" not in on_terminal("validate", "none.yaml", NO_COLOR="1")[1]


def test_plan_table_and_json(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "job.yaml", "--nproc", "2", "--set", "cluster.gpus_per_node=0") == 0
    table = capsys.readouterr().out
    assert "32 = 1 x 16 x 2 (micro-batch x accumulation x ranks)" in table, (
        "no config.json is here: the least"
    )
    assert call("plan", "job.yaml", "--nproc", "2", "--set", "cluster.gpus_per_node=0", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["mesh"]["world_size"] == 2
    assert plan["no_epoch"] is None, "its one row was looked at"
    assert all(decision["key"] in table and decision["reason"] in table for decision in plan["decisions"])


LLAMA = (
    "{model_type: llama, hidden_size: 64, num_hidden_layers: 2, intermediate_size: 128, "
    "num_attention_heads: 4, vocab_size: 100}"
)


@pytest.fixture
def planned(job: Path) -> list[str]:
    """A plan of a tiny model on GPUs that are not here."""
    job.write_text(
        GOOD.replace("{name: org/model}", f"{{name: org/model, weights: random, config: {LLAMA}}}")
    )
    with job.open("a") as file:
        file.write(
            "training: {max_steps: 10}\nbatch: {global_batch_size: 96}\ncluster: {gpu: h100-80gb, "
            "gpus_per_node: 8}\n"
        )
    return ["plan", "job.yaml"]


ONE_PLAN = (
    "is of one plan; leave out --scale, --deadline, --max-gpus, --price and all but one GPU, or leave it out"
)


@pytest.mark.parametrize(
    "several", [["--gpu", "l4,h200"], ["--scale", "8..16"], ["--max-gpus", "8"], ["--deadline", "1d"]]
)
@pytest.mark.parametrize(
    "option", [["--picture", "memory.svg"], ["--explain", "parallel.engine"], ["--nproc", "2"], ["--trace"]]
)
def test_options_of_one_plan_are_refused_beside_several(
    several: list[str], option: list[str], planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*planned, *several, *option) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: {option[0]}")
        and ONE_PLAN in said
        and all(value in said for value in option[1:])
    )
    assert not Path("memory.svg").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--price", "h100-80gb=nan"], "--price = 'h100-80gb=nan': is no price"),
        (["--price", "foo=2"], "--price = 'foo': is not in the table"),
        (["--price", "l40s=2"], "--price = 'l40s': is of a GPU that is not planned for; there are h100-80gb"),
        (["--set", "cluster.gpu=bar"], "cluster.gpu = 'bar': is not in the table"),
        (["--scale", "8..²"], "--scale = '8..²': is no span"),
        (["--nproc", "2"], "--nproc = 2: is of this machine"),
        (
            ["--set", "model.config=null", "--picture", "a.svg"],
            "--picture = 'a.svg': there is no forecast to draw, as no config.json of",
        ),
    ],
)
def test_what_plan_cannot_do_is_refused_by_name(
    options: list[str], said: str, planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*planned, *options) == 2
    assert said in capsys.readouterr().err


def test_one_key_is_explained_as_json(planned: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*planned, "--explain", "parallel.engine", "--json", "--picture", "memory.svg") == 0
    content = json.loads(capsys.readouterr().out)
    assert (
        (content["key"], content["value"]) == ("parallel.engine", "fsdp")
        and content["reason"]
        and "refused" in content
    )
    assert Path("memory.svg").read_text().startswith("<svg")
    assert call(*planned, "--explain", "precision", "--json") == 0
    assert json.loads(capsys.readouterr().out)["refused"] == []


def test_the_price_of_the_gpu_that_the_job_names(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*planned, "--price", "h100-80gb=3", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)["plans"]
    assert row["cost"] == pytest.approx(3 * 8 * row["hours"])


def test_numbers_that_a_scale_leaves_out_are_said(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*planned, "--scale", "12..48", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    [left_out] = content["left_out"]
    assert [row["gpus"] for row in content["plans"]] == [24, 48] and left_out["what"] == "12 GPUs"
    assert call(*planned, "--scale", "12..48") == 0
    assert f"Left out:\n  12 GPUs: {left_out['reason']}\n" in capsys.readouterr().out


def test_a_kind_of_gpu_that_will_not_do_is_in_the_table(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    large = LLAMA.replace("64", "4096").replace("layers: 2", "layers: 32").replace("128", "14336")
    asked = [
        *planned,
        "--set",
        f"model.config={large}",
        "--set",
        "memory.offload=none",
        "--gpu",
        "l4,h200",
        "--max-gpus",
        "2",
    ]
    assert call(*asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        [line.split()[0] for line in lines[1:3]] == ["l4", "h200"]
        and " no " in lines[1]
        and " yes " in lines[2]
    )
    assert any(
        line.startswith("l4: no plan on up to 2 GPUs fits; nothing fits on so few: on 2 x l4 ")
        for line in lines
    )
    assert call(*asked, "--json") == 0
    assert [row["why_not"] is None for row in json.loads(capsys.readouterr().out)["plans"]] == [False, True]


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schema") == 0
    assert set(json.loads(capsys.readouterr().out)["required"]) == {"name", "model", "data"}


def test_init_by_flags_makes_a_valid_job(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model",
        "org/model",
        "--train",
        "train.jsonl",
        "--column",
        "prompt=question",
        "--column",
        "completion=answer",
    ]
    assert call("init", "--out", "new.yaml", *flags) == 0
    text = Path("new.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert json.loads(Path("job.schema.json").read_text())["title"] == "Job"
    assert call("validate", "new.yaml") == 0
    assert "model-train is a valid job" in capsys.readouterr().out


def test_init_for_a_model_of_few_positions(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = job.parent / "encoder"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 64}')
    flags = [
        "--model",
        "./encoder",
        "--task",
        "sequence-classification",
        "--train",
        "train.jsonl",
        "--column",
        "text=a",
        "--column",
        "label=b",
    ]
    assert call("init", "--out", "few.yaml", *flags) == 0
    assert "max_length: 64\n" in (job.parent / "few.yaml").read_text()
    assert call("validate", "few.yaml") == 0


def test_init_for_a_pair(job: Path) -> None:
    flags = [
        "--model",
        "org/model",
        "--task",
        "sequence-classification",
        "--train",
        "train.jsonl",
        "--evaluation",
        "train.jsonl",
    ]
    assert (
        call(
            "init",
            "--out",
            "pair.yaml",
            *flags,
            "--column",
            "text=premise,hypothesis",
            "--column",
            "label=label",
        )
        == 0
    )
    assert call("validate", "pair.yaml") == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "job.yaml", "--train", "train.jsonl", "--column", "text=a"], "is there already"),
        (
            ["--out", "no/job.yaml", "--train", "train.jsonl", "--column", "text=a"],
            "the folder no is not there",
        ),
        (["--train", "train.jsonl", "--column", "question"], "ROLE=COLUMN"),
        (["--train", "train.jsonl", "--column", "question=a"], "ROLE=COLUMN"),
        (["--column", "text=a"], "--train: is missing, and there is no terminal"),
        (["--train", "trian.jsonl", "--column", "text=a"], "the nearest there is train.jsonl"),
    ],
)
def test_init_refused_leaves_nothing_behind(
    job: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = sorted(path.name for path in job.parent.iterdir())
    out = [] if "--out" in flags else ["--out", "new.yaml"]
    assert call("init", "--model", "org/model", *out, *flags) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in job.parent.iterdir()) == before
    assert job.read_text() == GOOD


def test_init_over_a_file_that_is_there(job: Path) -> None:
    assert (
        call("init", "--model", "org/other", "--train", "train.jsonl", "--column", "text=a", "--force") == 0
    )
    assert "org/other" in job.read_text()


def test_init_asks_on_a_terminal(job: Path) -> None:
    code, shown = on_terminal(
        "init", "--out", "asked.yaml", typed="org/model\n\ntrain.jsonl\n\n\nquestion\nanswer\n"
    )
    assert code == 0, shown
    text = Path("asked.yaml").read_text()
    assert "prompt: question" in text and "completion: answer" in text


def test_init_refuses_rows_it_does_not_know(job: Path) -> None:
    code, shown = on_terminal("init", "--out", "asked.yaml", typed="org/model\n\ntrain.jsonl\n\npictures\n")
    assert code == 2 and "write prompt, messages or text" in shown


def test_completion_knows_the_commands(job: Path) -> None:
    environment = {
        **os.environ,
        "_LAUNCHER_COMPLETE": "complete_bash",
        "COMP_WORDS": "launcher va",
        "COMP_CWORD": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "validate" in result.stdout


def test_no_command_catches_errors_itself() -> None:
    for path in (Path(cli.__file__).parent).glob("*.py"):
        if path.name == "main.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
            assert caught not in ("LauncherError", "Exception", "BaseException"), (
                f"{path.name}: main is the one place that does"
            )
