"""A script of the user's own, before it starts: what is checked, planned, written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.app import SCRIPT_ARGUMENTS, load
from launcher.errors import ConfigurationError
from launcher.job.script_job import OWN, unused
from launcher.job.script_job import load as load_job
from launcher.launch import local
from launcher.launch.attempt_end import End
from launcher.launch.command import agent_command, environment
from launcher.launch.evaluation import Request
from launcher.launch.run_setup import open_run, reopen
from launcher.launch.screen import Watcher
from launcher.launch.script_run import script_command
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.script_plan import plan
from launcher.render.script_files import accelerate_config, deepspeed_config, files
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory
from launcher.runs.wording import shown

CPU = ["cluster.gpus_per_node=0"]
HERE = Hardware(num_cores=4, memory_bytes=8 << 30, cpu_flags=frozenset(), gpus=(), gpu_note="no driver")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("print(1)\n")
    return tmp_path / "train.py"


def planned(script: Path, *overrides: str, nproc: int = 2) -> Plan:
    return plan(load_job(None, [*CPU, *overrides], script), (str(script), "--lr", "1"), nproc, HERE)


def opened(
    script: Path, *arguments: str, overrides: list[str] | None = None, job: Path | None = None
) -> tuple[RunDirectory, Plan]:
    return open_run(job, [*CPU, *(overrides or [])], 2, None, script_command(script, arguments))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("trian.py", None, "no such file; the nearest there is train.py"),
        (".", None, "a directory; name the script in it"),
        ("bad.py", b"def (", "not Python: invalid syntax (line 1)"),
        ("image.png", b"\x89PNG\r\n\x00\x1a", "not Python: "),
        ("latin.py", b"x = '\xe9'\n", "not Python: "),
    ],
)
def test_what_is_no_script_is_refused_in_one_line(
    script: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        script_command(Path(name), [])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.problems[0].key == "--script"


def test_a_script_is_named_from_anywhere_with_its_arguments_as_they_are(script: Path) -> None:
    assert script_command(Path("train.py"), ["a b", "--", ""]) == (str(script), "a b", "--", "")


@pytest.mark.parametrize(
    ("file", "name"),
    [("train.py", "train"), ("my run (2).py", "my-run-2-"), ("_x.py", "x"), ("ü.py", "script")],
)
def test_without_a_job_the_run_has_the_scripts_name(tmp_path: Path, file: str, name: str) -> None:
    assert load_job(None, [], tmp_path / file).name == name


def test_a_script_is_submitted_by_the_sites_profile(script: Path, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("cluster: {account: physics, mem: 200G}\n")
    (tmp_path / "job.yaml").write_text(
        "cluster: {profile: ./site.yaml, gpus_per_node: 0, sbatch: {mem-per-cpu: 4G}}\n"
    )
    options = plan(load_job(tmp_path / "job.yaml", [], script), (str(script),), 2, HERE).slurm.options
    assert options == {"account": "physics", "mem-per-cpu": "4G"}
    with pytest.raises(ConfigurationError, match="no profile of that name"):
        load_job(None, ["cluster.profile=nowhere"], script)


def test_a_job_may_leave_out_what_the_script_brings(script: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("parallel: {engine: deepspeed}\ncluster: {gpus_per_node: 0}\n")
    job = load_job(tmp_path / "job.yaml", ["name=other"], script)
    assert (job.name, job.parallel.engine, job.model.name) == ("other", "deepspeed", OWN)
    assert unused(job) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("paralel: {engine: fsdp}", "paralel"),
        ("parallel: {engine: horovod}", "parallel.engine = 'horovod'"),
        ("parallel: {engine: fsdp}\nparallel: {shard: none}", "written twice"),
        ("data: {trian: {}}", "data.trian"),
        ("model: 7", "model"),
        ("cluster: {gpus_per_node: 2, ranks_per_node: 3}", "cluster.ranks_per_node = 3"),
        ("model: {name: ./nowhere}", "no such directory"),
        ("- a", "a job file is a mapping"),
    ],
)
def test_a_job_is_checked_as_any_other(script: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_job(tmp_path / "job.yaml", [], script)
    assert said in str(caught.value)


def test_what_a_job_says_and_the_script_decides_is_listed(script: Path, tmp_path: Path) -> None:
    text = (
        "data: {train: {path: gone.jsonl}, text: a}\ntraining: {epochs: 1, max_steps: 2}\nmodel: {name: "
        "org/model, task: causal-lm}\n"
    )
    (tmp_path / "job.yaml").write_text(text)
    job = load_job(tmp_path / "job.yaml", CPU, script)
    assert unused(job) == ["data", "training", "model.task"]
    decided = {decision.key: decision.value for decision in plan(job, ("x",), 2, HERE).decisions}
    assert decided["data"] == decided["training"] == "not used"


def test_any_number_of_ranks_is_planned_and_precision_is_the_scripts(script: Path) -> None:
    made = planned(script, nproc=3)
    assert (made.mesh.world_size, made.engine, made.sharding, made.precision) == (3, "fsdp", "full", "fp32")
    assert made.script == (str(script), "--lr", "1")
    assert planned(script, "precision=bf16").precision == "bf16"
    assert planned(script, "memory.activation_checkpointing=full").activation_checkpointing == "full"
    assert Plan.model_validate_json(made.to_json()) == made
    assert not any(
        decision.key.startswith(("batch", "training", "trackers", "model")) for decision in made.decisions
    )


def test_accelerate_is_told_of_fsdp_on_cpus_too(script: Path) -> None:
    config = accelerate_config(planned(script), "/x/ds_config.json")
    assert (config["distributed_type"], config["use_cpu"], config["num_processes"]) == ("FSDP", True, 2)
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert accelerate_config(planned(script, "parallel.shard=none"), "")["distributed_type"] == "MULTI_CPU"


def test_deepspeed_is_left_what_the_script_decides(script: Path) -> None:
    made = planned(script, "parallel.engine=deepspeed", "parallel.shard=gradients", "precision=bf16")
    config = deepspeed_config(made)
    left = {key for key, value in config.items() if value == "auto"}
    assert left == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    }
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert config["zero_optimization"]["stage"] == 2 and "auto" not in config["zero_optimization"].values()
    assert "optimizer" not in config and "scheduler" not in config
    written = files(made, "/runs/a b")
    assert json.loads(written["ds_config.json"]) == config
    assert (
        yaml.safe_load(written["accelerate.yaml"])["deepspeed_config"]["deepspeed_config_file"]
        == "/runs/a b/ds_config.json"
    )
    assert set(files(planned(script), "/runs")) == {"accelerate.yaml"}


def test_a_run_holds_the_script_and_no_placeholder(script: Path) -> None:
    run, made = opened(script, "--lr", "1 2", overrides=["parallel.engine=deepspeed"])
    assert run.path.name == "train" and made.script == (str(script), "--lr", "1 2")
    text = run.job_file.read_text()
    assert OWN not in text and "data" not in yaml.safe_load(text)
    assert json.loads((run.path / "rendered" / "ds_config.json").read_text())["train_batch_size"] == "auto"
    assert reopen(run, [], None) == made
    assert opened(script, "--lr", "1 2", overrides=["parallel.engine=deepspeed"])[1] == made
    changed = reopen(run, ["parallel.shard=gradients"], 3)
    assert (changed.script, changed.mesh.world_size, changed.zero.stage if changed.zero else 0) == (
        made.script,
        3,
        2,
    )
    assert (
        json.loads((run.path / "rendered" / "ds_config.json").read_text())["zero_optimization"]["stage"] == 2
    )


def test_another_script_or_other_arguments_are_another_run(script: Path) -> None:
    run, made = opened(script, "a")
    for arguments in (["b"], []):
        with pytest.raises(
            ConfigurationError, match=r"this run was begun with .*train\.py a; write that again"
        ):
            opened(script, *arguments)
    assert Plan.read(run.plan_file) == made


def test_neither_job_nor_script_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--script"):
        open_run(None, [], None, None)


def test_the_command_runs_the_script_and_the_environment_names_the_run(script: Path, tmp_path: Path) -> None:
    run, made = opened(script, "--lr", "a b")
    entry = [
        "-m",
        "launcher.training.script_entry",
        str(run.path),
        "--attempt",
        "4",
        "--",
        str(script),
        "--lr",
        "a b",
    ]
    assert agent_command(run, made, 4)[-len(entry) :] == entry
    seen = environment(run, made, 4)
    assert (seen["LAUNCHER_RUN_DIRECTORY"], seen["LAUNCHER_ATTEMPT"]) == (str(run.path), "4")
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["ACCELERATE_TORCH_DEVICE"]) == ("", "cpu")


def test_a_scripts_run_is_not_measured_by_us(script: Path) -> None:
    run, _ = opened(script)
    with pytest.raises(ConfigurationError, match="alone knows how to measure"):
        Request.of(str(run.path), None, None, None, [])


class Heard(Watcher):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_a_script_that_every_rank_ended_well_is_finished(script: Path) -> None:
    run, made = opened(script)
    run.attempt(1).mkdir(parents=True)
    assert local.outcome(run, made, 1, End(0), Heard(), False) == 0
    assert run.finished


def test_a_script_that_was_asked_to_stop_has_stopped_whatever_its_code(script: Path) -> None:
    run, made = opened(script)
    run.attempt(1).mkdir(parents=True)
    heard = Heard()
    event(run.events_file, "stopping", signal="SIGTERM")
    assert local.outcome(run, made, 1, End(0, "", "SIGTERM", {"stopping"}), heard, False) == 75
    assert not run.finished
    assert heard.lines[0].startswith(
        "stopped; the script goes on from what it saved itself; go on with: launcher resume "
    )


def test_memory_that_is_not_ours_to_plan_gets_no_advice_on_batches(script: Path) -> None:
    run, made = opened(script)
    failure = Failure(0.0, 1, "host", 1, "out-of-memory", 4, "MemoryError")
    assert local.going_on(run, made, failure) == (f"launcher resume {shown(run.path)}", "")


@pytest.mark.parametrize(
    ("words", "job", "arguments"),
    [
        (["--script", "t.py"], None, []),
        (["--script=t.py", "--", "job.yaml", "--nproc", "3"], None, ["job.yaml", "--nproc", "3"]),
        (["job.yaml", "--script", "t.py", "--nproc", "2", "--", "--", "-h"], "job.yaml", ["--", "-h"]),
        (["job.yaml"], "job.yaml", None),
    ],
)
def test_what_stands_behind_two_dashes_is_the_scripts(
    words: list[str], job: str | None, arguments: list[str] | None
) -> None:
    context: Any = load("run").make_context("run", words)
    assert context.params["job"] == (None if job is None else Path(job))
    assert context.meta.get(SCRIPT_ARGUMENTS) == arguments


@pytest.mark.parametrize(
    "words", [["job.yaml", "--", "--lr"], ["--script", "t.py", "--lr", "3"], [], ["--", "job.yaml", "more"]]
)
def test_arguments_without_a_script_or_without_dashes_are_refused(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"unexpected extra argument|No such option|Missing parameter"):
        load("run").make_context("run", words)
