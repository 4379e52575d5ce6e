"""The command line: what is listed, what is printed where, and the exit codes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import __version__
from launcher.cli import commands
from launcher.cli import main as cli
from launcher.cli.app import load
from launcher.cli.plan import profiles_for
from launcher.errors import CheckpointError
from launcher.planner.hardware.detect import Hardware

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
    first, note = capsys.readouterr().out.splitlines()
    assert first == "job.yaml: run is a valid job (causal-lm)"
    assert note.startswith("note: data.evaluation: no held-out rows: ") and "launcher data split" in note
    held_out = ("--set", "data.evaluation.path=train.jsonl")
    assert call("validate", "job.yaml", *held_out) == 0 and "note" not in capsys.readouterr().out


def test_validate_as_json(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("validate", "job.yaml", "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    (note,) = seen.pop("notes")
    assert seen == {"job": "job.yaml", "name": "run", "task": "causal-lm"}
    assert note.startswith("data.evaluation: no held-out rows")


def test_validate_says_that_a_tracker_is_not_here(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.planner.dataset.suitability.find_spec", lambda name: None)
    assert call("validate", "job.yaml", "--set", "trackers=[wandb]") == 0
    assert "note: trackers = 'wandb': its package is not installed here" in capsys.readouterr().out


def test_a_config_is_fetched_where_that_is_asked_for(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fetch(name: str, file: str, revision: str | None) -> None:
        raise OSError(f"no {file} of {name} in {revision}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    assert call("plan", "job.yaml") == 0
    shown = capsys.readouterr().out
    assert "fetch it (`launcher plan --fetch`, or `hf download org/model config.json`)" in shown
    assert call("plan", "job.yaml", "--fetch", "--set", "model.revision=v2") == 2
    said = "model.name = 'org/model': its config.json cannot be fetched: OSError: no config.json of org"
    assert said in capsys.readouterr().err


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


def test_an_error_is_not_broken_inside_words_on_a_terminal(job: Path) -> None:
    command = ("validate", "job.yaml", "--set", "training.optimizer=none")
    whole, folded = (on_terminal(*command, NO_COLOR="1", COLUMNS=columns)[1] for columns in ("1000", "40"))
    words = max(map(len, whole.split()))
    assert (
        all(len(line) <= max(40, words) for line in folded.splitlines()) and whole.split() == folded.split()
    )
    assert len(folded.splitlines()) > len(whole.splitlines())


def test_plan_table_and_json(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "job.yaml", "--nproc", "2", "--set", "cluster.gpus_per_node=0") == 0
    assert " without a choice on CPU ranks, which --all shows\n" in capsys.readouterr().out
    assert call("plan", "job.yaml", "--nproc", "2", "--set", "cluster.gpus_per_node=0", "--all") == 0
    table = capsys.readouterr().out
    assert "32 = 1 x 16 x 2 (micro-batch x accumulation x ranks)" in table, (
        "no config.json is here: the least"
    )
    assert call("plan", "job.yaml", "--nproc", "2", "--set", "cluster.gpus_per_node=0", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["mesh"]["world_size"] == 2
    assert plan["no_epoch"] is None, "its one row was looked at"
    assert all(decision["key"] in table and decision["reason"] in table for decision in plan["decisions"])


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ((), "3 epochs = 3 steps of 32 rows; saved every 15 min"),
        (("training.epochs=1", "checkpoint.every=1 epoch"), "1 epoch = 1 step of 32 rows; saved every epoch"),
        (
            ("data.evaluation.path=train.jsonl", "training.evaluate_every=2 steps"),
            "3 epochs = 3 steps of 32 rows; saved every 15 min, measured every 2 steps",
        ),
        (("training.epochs=null", "training.max_steps=5"), "5 steps; saved every 15 min"),
    ],
)
def test_a_plan_says_how_many_steps_its_epochs_are(
    job: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], length: str
) -> None:
    (job.parent / "train.jsonl").write_text('{"text": "some words", "label": "a"}\n' * 32)
    settings = ["model.task=sequence-classification", "data.text=text", "data.label=label"]
    settings += ["cluster.gpus_per_node=0", "training.epochs=3"]
    given = [part for setting in (*settings, *overrides) for part in ("--set", setting)]
    assert call("plan", "job.yaml", *given) == 0
    assert f"length   {length}\n" in capsys.readouterr().out


def test_submit_takes_ranks_and_says_its_size_and_all_problems_at_once(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpu = ("--set", "cluster.gpus_per_node=0")
    assert call("submit", "job.yaml", "--dry-run", *on_cpu, "--nproc", "2") == 0
    shown = capsys.readouterr()
    assert shown.err.endswith("not submitted; it would run on 1 node x 2 ranks\n")
    assert shown.out.startswith("#!") and "not submitted" not in shown.out
    assert call("submit", "job.yaml", "--dry-run", *on_cpu, "--set", "cluster.nodes=2") == 0
    assert "2 nodes x 1 rank\n" in capsys.readouterr().err
    both = ("--set", "training.epochs=1", "--set", "training.max_steps=3")
    assert call("submit", "job.yaml", "--set", "cluster.interface=lo", "--set", "cluster.nodes=2", *both) == 2
    reasons = capsys.readouterr().err
    assert "3 problems" in reasons
    for key in ("training.max_steps = 3", "cluster.gpus_per_node = 'auto'", "cluster.interface = 'lo'"):
        assert key in reasons
    assert call("submit", "job.yaml", "--set", "cluster.gpus_per_node=many") == 2
    assert capsys.readouterr().err.count("cluster.gpus_per_node") == 1, "one key has one reason"


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


def test_an_adapter_is_named_and_its_section_explained(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*planned, "--set", "model.adapter={rank: 8, alpha: 16}", "--set", "model.weights=pretrained"]
    assert call(*asked) == 0
    adapter = "adapter  LoRA, rank 8, on all-linear; whole beside it: lm_head.*"
    assert call(*asked, "--set", "model.adapter.train_also=[lm_head.*]") == 0
    assert adapter in capsys.readouterr().out.splitlines()
    assert call(*asked, "--explain", "model.adapter") == 0
    explained = capsys.readouterr().out
    assert explained.startswith("model.adapter = rank 8; alpha 16.0; left as they are: method, ")
    assert explained.endswith("the job sets it\n")
    assert call(*asked, "--explain", "batch") == 0
    assert "batch = global_batch_size 96; left as they are: " in capsys.readouterr().out
    assert call(*asked, "--explain", "checkpoint.every") == 0
    assert call(*asked, "--explain", "model.adaptor") == 2


def test_the_price_of_the_gpu_that_the_job_names(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*planned, "--price", "h100-80gb=3", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)["plans"]
    assert row["cost"] == pytest.approx(3 * 8 * row["hours"])


def test_prices_of_several_gpus_stand_with_commas(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*planned, "--gpu", "h100-80gb,l4", "--json", "--price"]
    assert call(*asked, "h100-80gb=3,l4=1") == 0
    assert all(row["cost"] for row in json.loads(capsys.readouterr().out)["plans"])
    assert call(*asked, "h100-80gb=3,l4") == 2
    assert "--price = 'l4': is no price" in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_lines_of_a_plan_break_between_words(planned: list[str], job: Path, width: int) -> None:
    code, text = on_terminal(*planned, COLUMNS=str(width))
    decided = text.split("Decided here")[1].split("Memory of a rank")[0].splitlines()[1:]
    assert code == 0 and all(len(line) <= width for line in decided)
    whole = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", *planned], capture_output=True, text=True, check=True
    ).stdout
    words = whole.split("Decided here")[1].split("Memory of a rank")[0].splitlines()[1:]
    assert " ".join(decided).split() == " ".join(words).split()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_leaves_out_what_had_no_choice(
    ranks: int, job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "detect", lambda: Hardware(2, 1 << 34))
    job.write_text(
        GOOD.replace("{name: org/model}", f"{{name: org/model, weights: random, config: {LLAMA}}}")
    )
    no_choice = ["cluster.gpus_per_node", "cluster.ranks_per_node", "memory.offload"]
    no_choice += ["cluster.threads_per_rank", "parallel.engine", "parallel.shard"] if ranks == 1 else []
    for option in ([], ["--all"]):
        assert call("plan", "job.yaml", "--nproc", str(ranks), *option) == 0
        text = capsys.readouterr().out
        shown = [line.split()[0] for line in text.split("leaves it open:\n")[1].splitlines() if line]
        assert all((key in shown) == bool(option) for key in no_choice)
        assert "precision" in shown and ("parallel.engine" in shown) == (ranks == 2 or bool(option))
        where = "one CPU rank" if ranks == 1 else "CPU ranks"
        line = f"\n  and {len(no_choice)} without a choice on {where}, which --all shows\n"
        assert (line in text) == (not option)
    for key in no_choice:
        assert call("plan", "job.yaml", "--nproc", str(ranks), "--explain", key) == 0


def test_the_seconds_of_a_trace_are_counted_on_a_terminal_alone(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with profiles_for(True).waiting("tracing it ..."):
        assert capsys.readouterr() == ("", "tracing it ...\n")
    assert capsys.readouterr() == ("", "")
    program = (
        "from launcher.cli.plan import profiles_for\nwith profiles_for(True).waiting('tracing it ...'): pass"
    )
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    assert done.stdout == b""
    assert b"tracing it ...\r\n" in (shown := os.read(ours, 4096)) and b"0:00:00" in shown
    os.close(ours)


def test_a_plan_of_gpus_shows_offloading(planned: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*planned) == 0
    text = capsys.readouterr().out
    assert "  memory.offload " in text and "without a choice" not in text
    assert "a run's `peak` counts" not in text


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


def answering(answers: list[bytes], *arguments: str) -> tuple[int, str]:
    """Exit code and output of a command on a terminal, where each answer is typed once a question stands there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    left, output, seen = list(answers), b"", 0
    try:
        while select.select([ours], [], [], 240)[0]:
            try:
                output += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if output.endswith((b"]: ", b"sounds: ", b"hub: ")) and len(output) > seen and left:
                time.sleep(0.1)  # until readline has the terminal
                os.write(ours, left.pop(0))
                seen = len(output)
        return process.wait(timeout=60), output.decode()
    finally:
        process.kill()
        os.close(ours)


def test_init_on_a_terminal_completes_files_and_keeps_answers(job: Path) -> None:
    """The tab key completes a file's name, and Ctrl-D in the middle loses nothing."""
    answers = [b"tr\t\n", b"\n", b"causal-lm\n", b"\n", b"\n", b"\n", b"\x04"]
    code, shown = answering(answers, "init", "--out", "asked.yaml")
    assert code == 130, shown
    assert "train.jsonl: 1 rows" in shown
    assert (
        "the answers so far are in asked.unfinished.yaml; go on with: launcher init --out asked.yaml" in shown
    )
    assert not Path("asked.yaml").exists()
    assert "task: causal-lm" in Path("asked.unfinished.yaml").read_text()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there are GPUs here")
@pytest.mark.parametrize("command", ["plan", "render --out out"])
def test_of_gpus_that_nobody_named_it_is_said_what_was_assumed(
    command: str, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *out = command.split()
    sizes = "hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 99"
    config = f"model.config={{model_type: llama, {sizes}, max_position_embeddings: 2048}}"
    flags = [*out, "--set", config, "--set", "cluster.gpus_per_node=8"]
    assert call(name, "job.yaml", *flags) == 0
    shown = capsys.readouterr()
    assert (
        "warning: the memory of the GPUs that it will run on is not known here; name them: cluster.gpu"
        in shown.err
    )
    assert "memory.activation_checkpointing = full" in shown.err
    if name == "plan":
        assert "8 ranks on cuda" in shown.out and "Memory of a rank" in shown.out
    assert call(name, "job.yaml", *flags, "--set", "cluster.gpu=h100-80gb") == 0
    assert "warning:" not in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "cursor", "offered"),
    [
        ("launcher validate ", 2, {"job.yaml", "models/", "runs/"}),
        ("launcher init --train ", 3, {"train.jsonl", "models/", "runs/"}),
        ("launcher init --model mo", 3, {"models/tiny"}),
        ("launcher init --task seq", 3, {"sequence-classification", "sequence-to-sequence"}),
        ("launcher init --gpu h100", 3, {"h100-80gb", "h100-pcie", "h100-nvl"}),
        ("launcher status ", 2, {"small"}),
        ("launcher evaluate mo", 2, {"models/tiny"}),
        ("launcher predict small --input t", 4, {"train.jsonl"}),
        ("launcher run job.yaml --set training.opt", 4, {"training.optimizer="}),
    ],
)
def test_completion_knows_files_and_names(
    words: str, cursor: int, offered: set[str], job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job.parent / "models/tiny").mkdir(parents=True)
    (job.parent / "models/tiny/config.json").write_text("{}")
    (job.parent / "runs/small").mkdir(parents=True)
    (job.parent / "runs/small/plan.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(job.parent / "none"))
    completion = {"_LAUNCHER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(cursor)}
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main"],
        env={**os.environ, **completion},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert set(result.stdout.split()) == offered, result.stderr


def test_no_command_catches_errors_itself() -> None:
    for path in (Path(cli.__file__).parent).glob("*.py"):
        if path.name == "main.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
            assert caught not in ("LauncherError", "Exception", "BaseException"), (
                f"{path.name}: main is the one place that does"
            )
