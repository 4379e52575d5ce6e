"""A new run, one that goes on, and one that may not."""

from __future__ import annotations

import datetime
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.cli.run import own_directory
from launcher.errors import ConfigurationError, OutOfMemoryError, RunInUseError
from launcher.launch import plan_file, redecide, run_setup
from launcher.launch.plan_file import write_plan
from launcher.launch.run_setup import expectation, fit_to_nodes, open_run, reopen
from launcher.launch.slurm import submit_run
from launcher.planner import fastest
from launcher.planner.hardware import detect
from launcher.planner.memory.decoders import Llama
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import Plan
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory

SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file with everything that it names, and a machine of two cores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 131,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    content = {
        "name": "tiny",
        "model": {"name": "./model"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 64},
        "batch": {"global_batch_size": 12},
        "training": {"max_steps": 6},
        "cluster": {"gpus_per_node": 0, "ranks_per_node": 2},
        "trackers": [],
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def events(run: RunDirectory) -> list[str]:
    return [record["event"] for record in read(run.events_file)]


def test_a_new_run_holds_its_job_and_its_plan(job: Path, tmp_path: Path) -> None:
    run, plan = open_run(job, ["training.seed=5"], None, None)
    assert run.path == tmp_path / "runs" / "tiny"
    assert Plan.read(run.plan_file) == plan
    stored = yaml.safe_load(run.job_file.read_text())
    assert stored["training"]["seed"] == 5
    assert stored["data"]["train"]["path"] == str(tmp_path / "train.jsonl"), "it means the same from anywhere"
    assert events(run) == ["planned"]


def test_going_on_takes_the_stored_plan_as_it_is(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = open_run(job, [], None, None)

    def never(*arguments: Any) -> Plan:
        raise AssertionError("nothing changed, so nothing is decided again")

    monkeypatch.setattr(run_setup, "plan_job", never)
    monkeypatch.setattr(redecide, "plan_job", never)
    assert open_run(job, [], None, None)[1] == plan
    assert open_run(job, [], 2, None)[1] == plan
    assert reopen(run, [], None) == plan
    assert events(run) == ["planned"]


def test_what_was_decided_stays_when_something_else_changes(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = open_run(job, [], None, None)
    monkeypatch.setattr(fastest, "samples_per_pass", lambda plan: 1)
    assert (
        open_run(job, [], None, job.parent / "other")[1].batch.micro_batch_size
        == 1
        < plan.batch.micro_batch_size
    )
    changed = reopen(run, ["checkpoint.keep_last=5"], None)
    assert changed.batch == plan.batch and changed.precision == plan.precision
    assert changed.checkpoint.keep_last == 5
    assert Plan.read(run.plan_file) == changed
    assert events(run) == ["planned", "plan_changed"]
    assert reopen(run, [], None) == changed, "the change stays"


def test_the_date_of_a_chat_stays(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["data.text=null", "data.messages=messages"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (job.parent / "train.jsonl").write_text(json.dumps({"text": "a", "messages": turns}) + "\n")
    before = datetime.date.today()
    run, plan = open_run(job, asked, None, None)
    assert before.isoformat() <= plan.data.date <= datetime.date.today().isoformat(), "at midnight either"
    assert "data.date" in {decision.key for decision in plan.decisions}

    class Later(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2100, 1, 1)

    monkeypatch.setattr("launcher.tasks.causal_lm.datetime.date", Later)
    assert reopen(run, ["training.max_steps=9"], None).data.date == plan.data.date
    assert open_run(job, asked, None, job.parent / "other")[1].data.date == "2100-01-01"
    assert (
        open_run(job, [*asked, "data.date=2026-02-28"], None, job.parent / "asked")[1].data.date
        == "2026-02-28"
    )
    learn(run)
    with pytest.raises(ConfigurationError, match=r"data\.date.*begin another run"):
        reopen(run, ["data.date=2026-02-28"], None)
    assert open_run(job, [], None, job.parent / "text")[1].data.date is None, "nothing else writes one"


def test_the_cut_that_was_chosen_stays(job: Path) -> None:
    """Figures of the machine that were measured since would have another one chosen."""
    run, plan = open_run(job, [], 2, None)
    cut = plan.mesh.model_copy(update={"reshard_after_forward": False})
    write_plan(run, plan.model_copy(update={"sharding": "gradients", "mesh": cut}))
    changed = reopen(run, ["checkpoint.keep_last=5"], None)
    assert (
        changed.sharding == "gradients"
        and not changed.mesh.reshard_after_forward
        and changed.checkpoint.keep_last == 5
    )
    copies = reopen(run, ["parallel.replicate=2"], None)
    assert copies.mesh.dp_replicate == 2, "what is asked for goes before what was chosen"


def test_an_engine_that_was_chosen_stays_until_something_else_is_asked_for(job: Path) -> None:
    """As where FSDP did not fit and ZeRO did: memory that is free today would have another one chosen."""
    run, plan = open_run(job, [], 2, None)
    chosen = open_run(job, ["parallel.engine=deepspeed", "parallel.shard=gradients"], 2, Path("other"))[1]
    write_plan(run, chosen)
    changed = reopen(run, ["checkpoint.keep_last=5"], None)
    assert (changed.engine, changed.sharding) == (
        "deepspeed",
        "gradients",
    ) and changed.checkpoint.keep_last == 5
    asked = reopen(run, ["parallel.engine=fsdp"], None)
    assert (asked.engine, asked.sharding) == ("fsdp", "full")
    write_plan(run, plan)
    assert reopen(run, ["parallel.engine=auto", "parallel.shard=optimizer"], None).engine == "deepspeed"


def test_another_number_of_ranks(job: Path) -> None:
    run, _ = open_run(job, [], None, None)
    plan = reopen(run, [], 3)
    assert (plan.mesh.world_size, plan.batch.global_batch_size) == (3, 12)
    changed = [
        change["key"]
        for record in read(run.events_file)
        if record["event"] == "plan_changed"
        for change in record["changes"]
    ]
    assert "mesh.world_size" in changed


def learn(run: RunDirectory) -> None:
    """Write down a step of a run, as its trainer would."""
    run.metrics_file.write_text(json.dumps({"step": 1, "loss": 2.5, "time": 0.0}) + "\n")


def test_a_classifier_of_before_balanced_passes_goes_on_with_other_ranks(job: Path) -> None:
    """How a step's samples are dealt decides rounding alone."""
    config = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 48,
        "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (job.parent / "model" / "config.json").write_text(json.dumps(config))
    (job.parent / "train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    content = yaml.safe_load(job.read_text()) | {
        "model": {"name": "./model", "task": "sequence-classification"}
    }
    content["data"]["label"] = "label"
    job.write_text(yaml.safe_dump(content))
    run, plan = open_run(job, [], 2, None)
    assert plan.batch.balanced
    write_plan(run, plan.model_copy(update={"batch": plan.batch.model_copy(update={"balanced": False})}))
    learn(run)
    assert not reopen(run, [], 2).batch.balanced, "as it was, to the bit"
    assert reopen(run, [], 3).batch.balanced


def test_what_has_learned_nothing_is_begun_anew_in_place(job: Path) -> None:
    """A wrong column is mended in the job file, and the same command begins the run that it did not."""
    run, _ = open_run(job, ["training.seed=5", "training.learning_rate=3"], None, None)
    mended, plan = open_run(job, ["training.seed=6"], None, None)
    assert mended.path == run.path and Plan.read(run.plan_file) == plan and plan.training.seed == 6
    [record] = [record for record in read(run.events_file) if record["event"] == "plan_changed"]
    assert {change["key"] for change in record["changes"]} == {"training.learning_rate", "training.seed"}
    learn(run)
    with pytest.raises(ConfigurationError, match=r"this run was begun otherwise"):
        open_run(job, ["training.seed=7"], None, None)


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_is_not_told_to_stop_where_it_has_been(
    job: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = open_run(job, [], None, None)
    run.checkpoint(3).mkdir(parents=True)
    (run.checkpoint(3) / "manifest.json").touch()
    with pytest.raises(SystemExit) as caught:
        main(["resume", "tiny", "--stop-at", str(step)])
    assert caught.value.code == ConfigurationError.exit_code
    reason = "the run goes on from step 3; name a later one"
    assert f"--stop-at = {step}: {reason}" in capsys.readouterr().err


def test_two_that_begin_again_at_once_have_two_directories(job: Path) -> None:
    first = open_run(job, [], None, None)[0].path
    chosen = [own_directory(True, job, [], None, None) for _ in range(2)]
    opened = [open_run(job, [], None, path, again=True)[0] for path in chosen]
    assert chosen[0] == chosen[1] and [run.path.name for run in opened] == [
        f"{first.name}-2",
        f"{first.name}-3",
    ]
    assert all(run.plan_file.is_file() for run in opened)


def test_the_same_job_again_has_a_directory_of_its_own(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_run(job, [], None, None)[0].path
    taken = [own_directory(True, job, [], None, None)]
    (tmp_path / "runs" / f"{first.name}-2").mkdir(parents=True)
    (tmp_path / "runs" / f"{first.name}-2" / "plan.json").write_text("{}")
    taken.append(own_directory(True, job, ["name=other"], None, None))
    taken.append(own_directory(True, job, [], None, None))
    assert taken == [Path(f"runs/{first.name}-2"), Path("runs/other"), Path(f"runs/{first.name}-3")]
    assert own_directory(False, job, [], None, None) is None
    with pytest.raises(SystemExit):
        main(["run", str(job), "--again", "--run-dir", "elsewhere"])
    assert "--run-dir = 'elsewhere': names the directory, and --again" in capsys.readouterr().err


def test_what_would_be_another_run_is_refused_and_changes_nothing(job: Path) -> None:
    run, plan = open_run(job, [], None, None)
    learn(run)
    with pytest.raises(ConfigurationError) as caught:
        open_run(job, ["training.learning_rate=1", "data.max_length=32"], None, None)
    assert [problem.key for problem in caught.value.problems] == ["data.max_length", "training.learning_rate"]
    with pytest.raises(ConfigurationError, match=r"max_length = 32: was"):
        submit_run.preview(job, ["cluster.gpus_per_node=0", "data.max_length=32"], None, None)
    with pytest.raises(ConfigurationError, match=r"max_steps = 1: the run is at step"):
        learned = run.checkpoint(6)
        learned.mkdir(parents=True)
        (learned / "manifest.json").touch()
        submit_run.preview(job, ["cluster.gpus_per_node=0", "training.max_steps=1"], None, None)
    assert Plan.read(run.plan_file) == plan and events(run) == ["planned"]


def test_more_steps_have_a_finished_run_go_on(job: Path) -> None:
    run, _ = open_run(job, [], None, None)
    run.finished_file.touch()
    reopen(run, ["checkpoint.keep_last=5"], None)
    assert run.finished
    reopen(run, ["training.max_steps=8"], None)
    assert not run.finished


def test_a_run_is_not_told_to_end_before_where_it_is(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a finished one queued, with nothing to do."""
    run, plan = open_run(job, [], None, None)
    run.checkpoint(6).mkdir(parents=True)
    (run.checkpoint(6) / "manifest.json").touch()
    run.finished_file.touch()
    with pytest.raises(ConfigurationError, match=r"max_steps = 4.*at step 6 already.*--again"):
        open_run(job, ["training.max_steps=4"], None, None)
    assert run.finished and Plan.read(run.plan_file) == plan
    monkeypatch.setattr(submit_run, "find_sbatch", lambda: None)
    with pytest.raises(ConfigurationError, match=r"is finished at step.*--again"):
        submit_run.hand_over(job, ["cluster.gpus_per_node=0"], None, None)
    with pytest.raises(ConfigurationError, match=r"is finished at step.*--again"):
        submit_run.preview(job, ["cluster.gpus_per_node=0"], None, None)
    script, longer = submit_run.preview(job, ["cluster.gpus_per_node=0", "training.max_steps=8"], None, None)
    assert "#SBATCH" in script and longer.training.max_steps == 8
    with pytest.raises(ConfigurationError, match=r"is finished at step"):
        submit_run.resubmit(run, [])


def test_a_directory_with_other_things_is_no_run(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds other things"):
        open_run(job, [], None, tmp_path)
    with pytest.raises(ConfigurationError, match="holds other things"):
        open_run(job, [], None, job)
    (tmp_path / "empty").mkdir()
    assert open_run(job, [], None, tmp_path / "empty")[0].plan_file.exists()


def test_a_run_that_another_launcher_begins_just_now(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in use, and no directory with other things; once the other one has written its plan, that is kept."""
    run = RunDirectory(job.parent / "begun")
    run.path.mkdir()
    with run.lock():
        run.forecast_file.write_text("{}")
        run.job_file.with_name(".job.yaml.0123abcd").touch()
        (run.path / plan_file.COPY).touch()
        with pytest.raises(RunInUseError):
            open_run(job, [], None, run.path)
    decide = run_setup.decide_for

    def decide_later(*arguments: Any) -> Plan:
        plan = decide(*arguments)
        monkeypatch.setattr(run_setup, "decide_for", decide)
        open_run(job, [], None, run.path)
        return plan

    monkeypatch.setattr(run_setup, "decide_for", decide_later)
    open_run(job, [], None, run.path)
    assert events(run) == ["planned"]


def test_a_run_under_way_is_left_alone(job: Path) -> None:
    run, plan = open_run(job, [], None, None)
    with run.lock(), pytest.raises(RunInUseError):
        reopen(run, ["checkpoint.keep_last=5"], None)
    assert Plan.read(run.plan_file) == plan


def test_gpus_that_are_gone_are_no_reason_for_the_cpu(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = open_run(job, ["cluster.gpus_per_node=auto"], None, None)
    on_gpus = plan.model_copy(update={"mesh": plan.mesh.model_copy(update={"device": "cuda"})})
    write_plan(run, on_gpus)
    monkeypatch.setattr(detect, "find_gpus", lambda: ((), "no driver"))
    with pytest.raises(ConfigurationError, match=r"cluster\.gpus_per_node=0"):
        reopen(run, [], None)
    assert reopen(run, ["cluster.gpus_per_node=0"], None).mesh.device == "cpu"


def test_a_run_that_goes_on_elsewise_is_foreseen_anew(job: Path) -> None:
    """What was foreseen of one rank says nothing of two; of a plan that nothing is known of, nothing stays."""
    (job.parent / "model" / "config.json").write_text(json.dumps(SMALL))
    run, plan = open_run(job, [], 1, None)
    first = json.loads(run.forecast_file.read_text())
    assert first["digest"] == plan.digest() and expectation(run) == first["line"]
    open_run(job, [], None, None)
    assert json.loads(run.forecast_file.read_text()) == first, "the same plan, the same word"
    changed = open_run(job, [], 2, None)[1]
    second = json.loads(run.forecast_file.read_text())
    assert second["digest"] == changed.digest() != plan.digest() and second["phases"] != first["phases"]
    (job.parent / "model" / "config.json").write_text(json.dumps(SMALL | {"model_type": "unheard"}))
    open_run(job, [], 1, None)
    assert not run.forecast_file.exists() and expectation(run) == ""


def test_with_a_trace_a_run_is_what_the_plan_with_a_trace_shows(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the formulas know the model it is not asked for; where not, decisions, forecast and refusal are
    by it."""
    asked: list[str] = []

    class Traced(Profiles):
        def _profile(self, plan: Plan, key: str, kind: str) -> Program | Unknown:
            asked.append(plan.activation_checkpointing)
            return Llama(SMALL)

    trace = Traced()

    (job.parent / "model" / "config.json").write_text(json.dumps(SMALL))
    open_run(job, [], 1, Path("known"), profiles=trace)
    assert asked == []
    (job.parent / "model" / "config.json").write_text(json.dumps(SMALL | {"model_type": "unheard"}))
    assert not open_run(job, [], 1, Path("unknown"))[0].forecast_file.exists()
    run, plan = open_run(job, [], 1, Path("traced"), profiles=trace)
    assert asked and json.loads(run.forecast_file.read_text())["traced"] is True
    (reason,) = [d.reason for d in plan.decisions if d.key == "memory.activation_checkpointing"]
    assert "by its class's profile" in reason
    monkeypatch.setattr(detect.Hardware, "detect", classmethod(lambda cls: detect.Hardware(2, 1 << 18)))
    with pytest.raises(OutOfMemoryError, match="--force"):
        open_run(job, [], 1, Path("large"), profiles=trace)


def test_a_plan_changed_by_hand_is_refused_by_key_with_the_way_on(job: Path, tmp_path: Path) -> None:
    run, plan = open_run(job, [], 2, tmp_path / "run")
    text = run.plan_file.read_text()
    content = json.loads(text)
    content["training"]["learning_rate"] = 5.0
    content["checkpoint"]["keep_last"] = 7
    run.plan_file.write_text(json.dumps(content))
    for go_on in (
        lambda: reopen(run, [], None),
        lambda: open_run(job, [], 2, run.path),
        lambda: fit_to_nodes(run, 1),
    ):
        with pytest.raises(ConfigurationError, match="was changed by hand") as caught:
            go_on()
        assert {problem.key: problem.value for problem in caught.value.problems} == {
            "plan.json: training.learning_rate": 5.0,
            "plan.json: checkpoint.keep_last": 7,
        }
        assert "--set KEY=VALUE" in str(caught.value) and "launcher wrote 2" in str(caught.value)
    run.plan_file.write_text(json.dumps(json.loads(text)))
    assert reopen(run, [], None) == plan, "white space is no change"


def test_a_crash_between_the_copy_and_the_plan_is_no_change_by_hand(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = open_run(job, [], 2, tmp_path / "run")
    before = run.plan_file.read_text()
    reopen(run, ["checkpoint.keep_last=5"], None)
    run.plan_file.write_text(before)  # the new copy is there, the new plan is not
    assert reopen(run, [], None).checkpoint.keep_last in (plan.checkpoint.keep_last, 5)
    (run.path / plan_file.COPY).unlink()
    run.plan_file.write_text(plan.model_copy(update={"grace_seconds": 1.0}).to_json())
    reopen(run, [], None)  # a run of before there was a copy


@pytest.mark.parametrize("text", ["{}", "[]", "\0", "[" * 100_000, '{"format": 1, "mesh": 3}', "\xff"])
def test_what_is_no_plan_is_said_to_be_none(job: Path, tmp_path: Path, text: str) -> None:
    run, _ = open_run(job, [], 2, tmp_path / "run")
    run.plan_file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match="no plan that launcher wrote"):
        reopen(run, [], None)


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_is_as_private_as_the_umask_says_or_open_to_the_group(
    job: Path, tmp_path: Path, shared: bool
) -> None:
    before = os.umask(0o077)
    try:
        run, _ = open_run(
            job, [f"cluster.share_with_group={str(shared).lower()}"], 2, tmp_path / "runs" / "mine"
        )
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (run.path, *run.path.rglob("*"))}
        assert modes == ({0o750, 0o640} if shared else {0o700, 0o600})
        reopen(run, ["cluster.share_with_group=true"], None)
        assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (run.path, *run.path.rglob("*"))} == {
            0o050,
            0o040,
        }
    finally:
        os.umask(before)


def test_answers_are_written_as_they_were_where_the_job_leaves_that_open(job: Path) -> None:
    """A run of before 2026-11-30 has launcher's own settings in its plan; now what is left out is the model's."""
    (job.parent / "pairs.jsonl").write_text('{"q": "a", "a": "b"}\n' * 4)
    rows = ["data.train.path=pairs.jsonl", "data.evaluation.path=pairs.jsonl", "data.text=null"]
    generate = [*rows, "data.prompt=q", "data.completion=a", "evaluation.generate.max_new_tokens=8"]
    run, plan = open_run(job, generate, None, None)
    assert plan.evaluation is not None and plan.evaluation.generate is not None
    assert plan.evaluation.generate.num_beams is None
    before = plan.evaluation.generate.model_copy(update={"num_beams": 1, "max_new_tokens": 4})
    evaluation = plan.evaluation.model_copy(update={"generate": before})
    write_plan(run, plan.model_copy(update={"evaluation": evaluation}))
    resumed = reopen(run, ["training.max_steps=9"], None)
    assert resumed.evaluation is not None and resumed.evaluation.generate is not None
    now = resumed.evaluation.generate
    assert (now.num_beams, now.max_new_tokens) == (1, 8), "what the job says wins"
