"""`launcher run --script`: real scripts, unchanged, on two ranks; and what becomes of a script that ends
badly."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.test_utils
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.processes import alive
from launcher.runs.status import read_status

SCRIPTS = Path(__file__).parent / "scripts"
THEIRS = Path(accelerate.test_utils.__file__).parent / "scripts"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TRAINER = [
    "--per_device_train_batch_size",
    "4",
    "--learning_rate",
    "5e-3",
    "--max_steps",
    "6",
    "--logging_steps",
    "1",
]
TRAINER += ["--report_to", "none", "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3"]
ENGINES = {
    "fsdp": ["--set", "parallel.engine=fsdp"],
    "zero3": ["--set", "parallel.engine=deepspeed"],
    "zero2": ["--set", "parallel.engine=deepspeed", "--set", "parallel.shard=gradients"],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def start(
    run: Path, script: Path, *arguments: str, options: list[str] | None = None
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "run",
        "--script",
        str(script),
        "--nproc",
        "2",
        "--run-dir",
        str(run),
    ]
    command += ["--set", "cluster.gpus_per_node=0", *(options or []), "--", *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out + errors


def run_script(run: Path, script: Path, *arguments: str, options: list[str] | None = None) -> tuple[int, str]:
    code, said = finish(start(run, script, *arguments, options=options))
    assert not any(alive(pid) for pid in pids(RunDirectory(run))), "no rank outlives the launcher"
    return code, said


def pids(run: RunDirectory) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in run.attempts.glob("*/rank-*.json")]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def log(run: Path, rank: int = 0) -> str:
    return (RunDirectory(run).attempt(RunDirectory(run).last_attempt()) / f"rank-{rank}.log").read_text()


@contextlib.contextmanager
def running(run: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The misbehaving script, once both ranks are in it."""
    process = start(run, SCRIPTS / "misbehaving.py", *arguments)
    try:
        wait_for(lambda: len(list(run.glob("ready-*.json"))) == 2, "both ranks in the script")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    set_seed(3)
    bert = AutoConfig.for_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(folder / "with_accelerate")
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_key_value_heads=2, **SIZES)
    ).save_pretrained(folder / "with_trainer")
    return folder


def arguments_of(script: str, models: Path, out: Path) -> list[str]:
    common = ["--model", str(models / script), "--out", str(out)]
    return (
        [*common, *TRAINER, "--output_dir", str(out.with_suffix(""))] if script == "with_trainer" else common
    )


@pytest.fixture(scope="module")
def losses_without_launcher(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[float]]:
    """The losses of a script under plain torchrun, where Accelerate trains whole copies on two CPU ranks."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def losses(script: str) -> list[float]:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
        ]
        command += [str(SCRIPTS / f"{script}.py"), *arguments_of(script, models, folder / f"{script}.json")]
        done = subprocess.run(
            command,
            env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / f"{script}.json").read_text())
        assert (result["distributed"], result["ranks"]) == ("MULTI_CPU", 2)
        measured: list[float] = result["losses"]
        return measured

    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "engine"),
    [
        pytest.param("with_accelerate", "fsdp", marks=pytest.mark.very_slow),
        pytest.param("with_trainer", "zero3", marks=pytest.mark.very_slow),
        pytest.param("with_accelerate", "zero3", marks=pytest.mark.very_slow),
        pytest.param("with_trainer", "fsdp", marks=pytest.mark.very_slow),
        pytest.param("with_accelerate", "zero2", marks=pytest.mark.very_slow),
        pytest.param("with_trainer", "zero2", marks=pytest.mark.very_slow),
    ],
)
def test_an_unchanged_script_is_sharded_and_learns_the_same(
    script: str,
    engine: str,
    models: Path,
    losses_without_launcher: Callable[[str], list[float]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.json"
    arguments = arguments_of(script, models, out)
    code, said = run_script(tmp_path / "run", SCRIPTS / f"{script}.py", *arguments, options=ENGINES[engine])
    assert code == 0, said + log(tmp_path / "run")
    result = json.loads(out.read_text())
    assert (result["distributed"], result["ranks"]) == ("FSDP" if engine == "fsdp" else "DEEPSPEED", 2)
    assert len(result["losses"]) >= 8
    assert result["losses"] == pytest.approx(losses_without_launcher(script), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "ends"),
    [
        pytest.param(
            "test_script",
            ENGINES["zero3"],
            "Shuffled central dataloader passing.",
            marks=pytest.mark.very_slow,
        ),
        pytest.param(
            "test_script",
            ["--set", "parallel.shard=none"],
            "Test reinstantiated state",
            marks=pytest.mark.very_slow,
        ),
        pytest.param(
            "test_ops", ENGINES["fsdp"], "testing sending tensors across devices", marks=pytest.mark.very_slow
        ),
        pytest.param(
            "test_ops",
            ENGINES["zero3"],
            "testing sending tensors across devices",
            marks=pytest.mark.very_slow,
        ),
    ],
)
def test_the_test_scripts_that_accelerate_ships(
    script: str, options: list[str], ends: str, tmp_path: Path
) -> None:
    code, said = run_script(tmp_path / "run", THEIRS / f"{script}.py", options=options)
    assert code == 0, said + log(tmp_path / "run")
    assert ends in log(tmp_path / "run")


def test_arguments_and_environment_reach_the_script_as_they_are(tmp_path: Path) -> None:
    words = ["tell", "a b", 'it\'s "x"', "--nproc", "", "--", "$HOME *", "-h"]
    run = tmp_path / "a run's directory"
    code, said = run_script(run, SCRIPTS / "misbehaving.py", *words, options=["--set", "precision=bf16"])
    assert code == 0, said
    told = json.loads((run / "told-1.json").read_text())
    script = SCRIPTS / "misbehaving.py"
    assert told["arguments"] == [str(script), *words]
    assert (told["path"], told["name"], told["file"]) == (str(SCRIPTS), "__main__", str(script))
    seen = told["seen"]
    assert (seen["LAUNCHER_RUN_DIRECTORY"], seen["LAUNCHER_ATTEMPT"]) == (str(run), "1")
    assert (seen["ACCELERATE_USE_FSDP"], seen["FSDP_VERSION"], seen["ACCELERATE_MIXED_PRECISION"]) == (
        "true",
        "2",
        "bf16",
    )
    written = json.loads((RunDirectory(run).attempt(1) / "accelerate.json").read_text())
    assert written.items() <= seen.items()
    assert RunDirectory(run).finished and read_status(RunDirectory(run)).state == "finished"
    assert "there is nothing to do" in run_script(run, script, *words, options=["--set", "precision=bf16"])[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "failure_class", "cause"),
    [
        ("raise", 10, "script", "ValueError: a bug"),
        pytest.param("exit", 10, "script", "the script left with exit code 3", marks=pytest.mark.very_slow),
        pytest.param("words", 10, "script", "the script left with no data here", marks=pytest.mark.very_slow),
        ("kill", 9, "rank-lost", "killed by signal 9 (SIGKILL)"),
        ("memory", 4, "out-of-memory", "MemoryError"),
        ("disk", 5, "storage", "No space left on device"),
    ],
)
def test_how_a_script_fails_is_named_and_ends_all(
    kind: str, code: int, failure_class: str, cause: str, tmp_path: Path
) -> None:
    returned, said = run_script(tmp_path / "run", SCRIPTS / "misbehaving.py", kind)
    assert returned == code, said
    failure = json.loads((tmp_path / "run" / "attempts" / "0001" / "failure.json").read_text())
    assert (failure["failure_class"], failure["rank"]) == (failure_class, 1)
    assert cause in failure["cause"] and cause in said
    assert f"go on with: launcher resume {tmp_path / 'run'}" in said
    assert not RunDirectory(tmp_path / "run").finished


@pytest.mark.slow
def test_a_script_that_leaves_well_has_finished(tmp_path: Path) -> None:
    assert run_script(tmp_path / "run", SCRIPTS / "misbehaving.py", "well")[0] == 0
    assert RunDirectory(tmp_path / "run").finished


@pytest.mark.slow
def test_ctrl_c_ends_a_script_that_knows_nothing_of_it_and_all_that_it_started(tmp_path: Path) -> None:
    with running(tmp_path / "run", "child") as process:
        children = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("child-*.json")]
        process.send_signal(signal.SIGINT)
        code, said = finish(process)
    assert code == 75, said
    assert "stopped; the script goes on from what it saved itself; go on with: launcher resume" in said
    gone = [*pids(RunDirectory(tmp_path / "run")), *children]
    assert len(gone) == 4
    wait_for(lambda: not any(alive(pid) for pid in gone), "everything gone")


@pytest.mark.slow
def test_a_rank_that_leaves_at_once_has_written_down_that_it_was_stopped(tmp_path: Path) -> None:
    """A script's own handler may run, and the script end, before the thread has had its turn: the run would
    count as finished."""
    code = """
import os, signal, sys, time
from pathlib import Path
from launcher.runs.layout import RunDirectory
from launcher.training.script_entry import Stop

class Slow(Stop):
    def _stop(self, number):
        time.sleep(0.5)
        super()._stop(number)

stop = Slow(RunDirectory(Path(sys.argv[1]))).install()
signal.signal(signal.SIGTERM, lambda number, frame: None)
os.kill(os.getpid(), signal.SIGTERM)
stop.hear_all()
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert [record["signal"] for record in read(RunDirectory(tmp_path).events_file)] == ["SIGTERM"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", pytest.param("ranks", marks=pytest.mark.very_slow)])
def test_a_script_that_handles_sigterm_saves_and_is_started_again(whom: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with running(run.path, "saves on SIGTERM") as process:
        for pid in [process.pid] if whom == "launcher" else pids(run):
            os.kill(pid, signal.SIGTERM)
        code, said = finish(process)
    assert code == 75, said
    assert [json.loads(path.read_text()) for path in run.path.glob("saved-*.json")] == ["SIGTERM", "SIGTERM"]
    assert read_status(run).state == "stopped"
    resumed = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", "resume", str(run.path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert [record["event"] for record in read(run.events_file)][-1] == "finished"
    assert run.last_attempt() == 2
