"""What is started and said, without starting it. The processes are tested in tests/distributed/test_local.py."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigurationError
from launcher.launch import command as commands
from launcher.launch import gpu_env, local, malloc_env
from launcher.launch.attempt_end import End
from launcher.launch.command import agent_command, environment, public, write_command
from launcher.launch.local import attempt_directory
from launcher.launch.screen import Watcher
from launcher.launch.stop_signals import Signals
from launcher.planner.changes import changes, check
from launcher.planner.plan import Plan
from launcher.runs.events import append, event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory
from launcher.runs.wording import shown
from tests.training.plans import plan_of


def plan(**changed: Any) -> Plan:
    """For two ranks, three threads each; `changed` by dotted names with `__` for the dots."""
    batch = {"global_batch_size": 12, "micro_batch_size": 6, "accumulation_steps": 1, "data_parallel_size": 2}
    return plan_of(Path("none"), 2, **{"batch": batch, "mesh__threads_per_rank": 3, **changed})


class Heard(Watcher):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_the_command_is_torchruns_over_the_entry_point(run: RunDirectory) -> None:
    command = agent_command(run, plan(), 3, stop_at=7)
    assert command[-7:] == [
        "-m",
        "launcher.training.entry",
        str(run.path),
        "--attempt",
        "3",
        "--stop-at",
        "7",
    ]
    assert {"--nproc-per-node=2", "--rdzv-backend=launcher", "--max-restarts=0"} <= set(command)
    assert not [word for word in command if run.run_id() in word], "the process table is everybody's"
    assert "--stop-at" not in agent_command(run, plan(), 3)


def test_a_run_that_hung_fails_by_its_own_class_whatever_the_killed_ranks_say(run: RunDirectory) -> None:
    heard = Heard()
    run.attempt(1).mkdir(parents=True)
    line = "no step for 61 s after step 12: rank 1 on n2 is stopped (SIGSTOP); rank 0 waits in all_gather"
    hung = Failure(1.0, 1, "n2", 7, "hung", 13, line)
    assert local.outcome(run, plan(), 1, End(-9, forced="hung", hung=hung), heard, False) == 13
    assert heard.lines[0].startswith(f"hung: rank 1 on n2 after step 0: {line}; go on with: launcher resume ")


def test_a_stop_says_whether_it_saved(run: RunDirectory) -> None:
    heard = Heard()
    append(run.metrics_file, {"kind": "train", "step": 7, "loss": 1.0})
    event(run.events_file, "stopped", step=7)
    assert local.outcome(run, plan(), 1, End(0, events={"stopped"}), heard, False) == 75
    event(
        run.events_file,
        "stopped",
        step=4,
        reason="no save was begun: 2 s of grace were left",
        num_steps_lost=3,
    )
    assert local.outcome(run, plan(), 1, End(0, events={"stopped"}), heard, False) == 75
    assert heard.lines[0].startswith("stopped after step 7, saved; go on with: launcher resume ")
    assert heard.lines[1].startswith(
        "stopped; no save was begun: 2 s of grace were left; the newest checkpoint is of step 4, 3 "
        "steps before; go on with: "
    )


def test_ranks_get_the_threads_of_the_plan(run: RunDirectory) -> None:
    assert environment(run, plan(), 1)["OMP_NUM_THREADS"] == "3"


def test_a_plan_of_cpus_sees_no_gpu(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's own environment says; a plan of GPUs leaves it as it is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert environment(run, plan(), 1)["CUDA_VISIBLE_DEVICES"] == ""
    gpu = plan().model_copy(update={"mesh": plan().mesh.model_copy(update={"device": "cuda"})})
    assert environment(run, gpu, 1)["CUDA_VISIBLE_DEVICES"] == "1,2"


def test_ranks_on_gpus_have_an_allocator_that_grows_and_a_flight_recorder(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in gpu_env.variables(run.path, {}):
        monkeypatch.delenv(name, raising=False)
    gpu = plan().model_copy(update={"mesh": plan().mesh.model_copy(update={"device": "cuda"})})
    seen = environment(run, gpu, 3)
    assert seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert seen["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert seen["TORCH_FR_DUMP_TEMP_FILE"] == f"{run.attempt(3)}/nccl-rank-"
    assert "TORCH_NCCL_DEBUG_INFO_PIPE_FILE" not in seen, "no pipe can be made where there is no directory"
    run.attempt(3).mkdir(parents=True)
    pipe = environment(run, gpu, 3)["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"]
    assert pipe == f"{run.attempt(3)}/nccl-rank-" and not list(run.attempt(3).iterdir())
    assert not set(gpu_env.variables(run.path, {})) & set(environment(run, plan(), 3))
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    seen = environment(run, gpu, 3)
    assert seen["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert not {"PYTORCH_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE"} & set(seen), "by their former names"


def test_compiled_layers_are_kept_in_the_cache(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    compiled = plan().model_copy(update={"model": plan().model.model_copy(update={"compile": True})})
    monkeypatch.setattr(commands, "cpu_flags", lambda: frozenset({"avx2"}))
    first = environment(run, compiled, 1)["TORCHINDUCTOR_CACHE_DIR"]
    assert first.startswith("/cache/launcher/compiled/")
    monkeypatch.setattr(commands, "cpu_flags", lambda: frozenset({"avx2", "amx_bf16"}))
    assert environment(run, compiled, 1)["TORCHINDUCTOR_CACHE_DIR"] != first, "another processor"
    assert "TORCHINDUCTOR_CACHE_DIR" not in environment(run, plan(), 1)


def test_ranks_on_the_cpu_give_memory_back_unless_told_otherwise(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert environment(run, plan(), 1)["MALLOC_MMAP_THRESHOLD_"] == "2097152"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    assert environment(run, plan(), 1)["MALLOC_MMAP_THRESHOLD_"] == "4096"


@pytest.mark.parametrize(
    ("forecast", "kept"),
    [
        ('{"memory_bytes": 3000, "phases": {"a": {"live": 10}, "b": {"live": 1000}}}', True),
        ('{"memory_bytes": 2999, "phases": {"a": {"live": 10}, "b": {"live": 1000}}}', False),
        ('{"memory_bytes": 0, "phases": {"b": {"live": 1000}}}', False),
        ('{"memory_bytes": 3000, "phases": {}}', False),
        ("{", False),
    ],
)
def test_ranks_on_the_cpu_keep_memory_where_there_is_room(
    forecast: str, kept: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in malloc_env.ROOMY:
        monkeypatch.delenv(name, raising=False)
    run.path.mkdir(exist_ok=True)
    run.forecast_file.write_text(forecast)
    made = environment(run, plan(), 1)
    assert {name: made[name] for name in malloc_env.ROOMY if name in made} == (
        malloc_env.ROOMY if kept else malloc_env.LEAN
    )
    gpu = plan().model_copy(update={"mesh": plan().mesh.model_copy(update={"device": "cuda"})})
    assert not set(malloc_env.ROOMY) & set(environment(run, gpu, 1))


def test_no_secret_reaches_command_json(tmp_path: Path) -> None:
    variables = {
        "HF_TOKEN": "hunter2",
        "HF_HOME": "/cache",
        "SLURM_JWT": "hunter2",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "MY_PASSWORD": "hunter2",
        "HF_ENDPOINT": "https://me:hunter2@hub.example",
        "TOKENIZERS_PARALLELISM": "false",
        "UNRELATED": "x",
        "PATH": "/bin",
    }
    assert public(variables) == {
        "HF_ENDPOINT": "https://***@hub.example",
        "HF_HOME": "/cache",
        "PATH": "/bin",
        "TOKENIZERS_PARALLELISM": "false",
    }
    write_command(tmp_path / "command.json", ["a", "b c"], variables)
    text = (tmp_path / "command.json").read_text()
    assert json.loads(text)["command"] == ["a", "b c"] and "hunter2" not in text


def test_attempts_are_numbered(run: RunDirectory) -> None:
    assert [attempt_directory(run)[0] for _ in range(3)] == [1, 2, 3]
    assert run.attempt(3).is_dir()


@pytest.mark.parametrize(
    ("events", "end", "code"),
    [
        ({"finished"}, End(0), 0),
        ({"finished"}, End(1), 0),
        ({"stopped"}, End(0), 75),
        ({"stopped"}, End(-9, "exit"), 75),
        (set(), End(0, signal_name="SIGTERM"), 75),
        (set(), End(-9, "second interrupt", "SIGINT"), 130),
        (set(), End(-9, "grace", "SIGTERM"), 130),
        (set(), End(0), 1),
        (set(), End(1), 1),
        (set(), End(-9), 9),
    ],
)
def test_outcomes(run: RunDirectory, events: set[str], end: End, code: int) -> None:
    number, directory = attempt_directory(run)
    end.events = events
    heard = Heard()
    assert local.outcome(run, plan(), number, end, heard, False) == code
    assert (directory / "failure.json").exists() == (code not in (0, 75))
    assert code == 0 or "launcher resume" in heard.lines[-1]


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "30 s of grace (cluster.grace)"), (4.0, "4 s of grace (what Slurm leaves)")]
)
def test_ranks_that_used_up_their_grace_are_told_whose_it_was(
    seconds: float | None, said: str, run: RunDirectory
) -> None:
    number, _ = attempt_directory(run)
    heard = Heard()
    local.outcome(run, plan(), number, End(-9, "grace", "SIGTERM", grace_seconds=seconds), heard, False)
    assert said in heard.lines[-1]


def test_an_agent_that_could_not_start_is_quoted(run: RunDirectory) -> None:
    number, directory = attempt_directory(run)
    (directory / "agent.log").write_text("Traceback\nModuleNotFoundError: No module named 'torch'\n\n")
    heard = Heard()
    local.outcome(run, plan(), number, End(1), heard, False)
    assert "No module named 'torch'" in heard.lines[-1]


def failure_of(failure_class: str) -> Failure:
    return Failure(0.0, 0, "h", 1, failure_class, 1, "c")


@pytest.mark.parametrize(
    ("changed", "failure_class", "end"),
    [
        ({}, "storage", ""),
        ({}, "out-of-memory", " --set batch.micro_batch_size=3"),
        ({"batch__micro_batch_size": 1}, "out-of-memory", " --set memory.activation_checkpointing=full"),
        ({"batch__micro_batch_size": 1, "activation_checkpointing": "full"}, "out-of-memory", ""),
    ],
)
def test_the_command_to_go_on(
    run: RunDirectory, changed: dict[str, Any], failure_class: str, end: str
) -> None:
    assert local.going_on(run, plan(**changed), failure_of(failure_class)) == (
        f"launcher resume {run.path}{end}",
        "",
    )


@pytest.mark.parametrize("failure_class", ["data", "configuration"])
def test_what_comes_again_until_it_is_mended_is_not_gone_on_with(
    run: RunDirectory, failure_class: str
) -> None:
    assert local.going_on(run, plan(), failure_of(failure_class)) == (
        "", "nothing was learned yet: mend it, and launcher run begins the job anew"
    )  # fmt: skip
    run.metrics_file.write_text('{"step": 1, "loss": 2.5, "time": 0.0}\n')
    assert local.going_on(run, plan(), failure_of(failure_class)) == (f"launcher resume {run.path}", "")


def test_paths_are_shown_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "a b") == "'runs/a b'"
    assert shown(tmp_path) == str(tmp_path)
    assert shown(Path("/elsewhere/x")) == "/elsewhere/x"


def test_a_key_press_that_arrives_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = Signals()
    signals.received = [(signal.SIGINT, 1.0), (signal.SIGINT, 1.2)]
    assert not signals.insisted()
    signals.received.append((signal.SIGINT, 2.0))
    assert signals.insisted()
    signals.received = [(signal.SIGTERM, 1.0), (signal.SIGTERM, 5.0)]
    assert not signals.insisted()


def test_signals_are_caught_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals().caught() as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.first is not None and signals.first[0] == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ({"precision": "bf16"}, {"precision"}),
        (
            {"mesh__world_size": 4, "mesh__dp_shard": 4, "batch__data_parallel_size": 4},
            {"mesh.world_size", "mesh.dp_shard", "batch.data_parallel_size"},
        ),
        ({"length": {"value": 20, "unit": "steps"}}, {"length.value"}),
        ({"checkpoint": {"keep_last": 9}}, {"checkpoint.keep_last"}),
        ({"training__max_steps": 9}, {"training.max_steps"}),
        ({"data__unusable": "drop"}, {"data.unusable"}),
    ],
)
def test_how_it_runs_may_change(changed: dict[str, Any], keys: set[str]) -> None:
    assert {change.key for change in check(plan(), plan(**changed))} == keys


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"batch__global_batch_size": 24}, "batch.global_batch_size"),
        ({"model__name": "other"}, "model.name"),
        ({"data__train": {"path": "/other"}}, "data.train.path"),
        ({"data__max_length": 99}, "data.max_length"),
        ({"data__packing": True}, "data.packing"),
        ({"training__seed": 1}, "training.seed"),
        ({"training__optimizer": "sgd"}, "training.optimizer"),
        ({"training__learning_rate": 1.0}, "training.learning_rate"),
    ],
)
def test_what_is_learned_may_not(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError, match="when the run began") as caught:
        check(plan(), plan(**changed))
    assert [problem.key for problem in caught.value.problems] == [key]


def test_an_adapter_may_not_change() -> None:
    began = plan(model__adapter={"rank": 8})
    assert changes(began, Plan.model_validate_json(began.to_json())) == []
    for changed, key in ({"rank": 4}, "rank"), ({"rank": 8, "targets": ["q_proj"]}, "targets"):
        with pytest.raises(ConfigurationError, match="when the run began") as caught:
            check(began, plan(model__adapter=changed))
        assert [problem.key for problem in caught.value.problems] == [f"model.adapter.{key}"]
    with pytest.raises(ConfigurationError, match="when the run began"):
        check(began, plan())


def test_equal_plans_have_no_changes() -> None:
    assert changes(plan(), plan()) == []
