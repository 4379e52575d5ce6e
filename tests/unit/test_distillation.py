"""A teacher in a job file: what is refused before anything starts, with what works in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.adapter import Adapter
from launcher.job.load import load
from launcher.launch.evaluation import Request
from launcher.launch.prediction import Logits
from launcher.launch.redecide import decide_again
from launcher.planner.changes import changes
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.written_states import TaughtAhead
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.planner.target import target_here
from launcher.runs.layout import RunDirectory
from launcher.sweep.sweep import as_yaml
from launcher.tasks.distillation import SOURCE
from tests.unit.checkpoint_files import make_run, write_checkpoint
from tests.unit.test_planning_decide import CPU, H100
from tests.unit.test_suitability import LLAMA, model

TEACHER = {"teacher": "large", "temperature": 2.0}
CLASSES = {"model__task": "sequence-classification", "data__label": "label"}


def write(folder: Path, kind: str = "llama", **keys: Any) -> Path:
    """A job in a folder with a small model, a large one, and rows."""
    model(folder / "small", LLAMA | {"model_type": kind})
    model(folder / "large", LLAMA | {"num_hidden_layers": 4})
    (folder / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n' * 64)
    content: dict[str, Any] = {
        "name": "a",
        "model": {"name": "small"},
        "data": {"train": {"path": "rows.jsonl"}, "text": "text", "max_length": 32},
        "distillation": TEACHER,
        "cluster": {"gpus_per_node": 0, "ranks_per_node": 2},
        "precision": "fp32",
    }
    for key, value in keys.items():
        section, _, last = key.partition("__")
        content[section] = content[section] | {last: value} if last else value
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return folder / "job.yaml"


def refusal(path: Path) -> tuple[str, str]:
    with pytest.raises(ConfigurationError) as caught:
        plan_job(load(path), hardware=CPU)
    [problem] = caught.value.problems
    return problem.key, problem.reason


def test_the_plan_names_the_teacher_by_its_absolute_path_and_keeps_to_it(tmp_path: Path) -> None:
    plan = plan_job(load(write(tmp_path)), hardware=CPU)
    assert plan.distillation is not None and plan.distillation.teacher == str(tmp_path / "large")
    assert (plan.layout, plan.head, plan.distillation.own_loss) == ("packed", "chunked", 0.5)
    other = plan.model_copy(
        update={"distillation": plan.distillation.model_copy(update={"temperature": 1.0})}
    )
    [change] = changes(plan, other)
    assert change.key == "distillation.temperature" and not change.allowed


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        (
            {"distillation": {"teacher": "large", "own_loss": 1.0}},
            "distillation.own_loss",
            "at least 0, below 1",
        ),
        ({"distillation": {"teacher": "large", "temperature": 0}}, "distillation.temperature", "above 0"),
        ({"distillation": {"teacher": "./nowhere"}}, "distillation.teacher", "no such directory"),
        ({"distillation": {"teacher": "run"}}, "distillation.teacher", "has not begun yet"),
        (
            {"distillation": {"own_loss": 0.5}},
            "distillation",
            "logits that were written ahead: neither is there",
        ),
        ({"distillation": {"teacher": "large", "logits": "run"}}, "distillation", "both are there"),
        (
            CLASSES | {"distillation": {"logits": "rum"}},
            "distillation.logits",
            "no such directory; the nearest there is run",
        ),
        (
            {"distillation": {"logits": "run", "hidden_states": {}}},
            "distillation.hidden_states",
            "have none of it; leave it out, or name a teacher",
        ),
        (
            CLASSES | {"distillation": {"logits": "run", "hidden_states": {}}},
            "distillation.hidden_states",
            "have none of it; leave it out, or name a teacher",
        ),
        (
            CLASSES | {"distillation": {"logits": "run", "checkpoint": 4}},
            "distillation.checkpoint",
            "have none of it",
        ),
        (
            CLASSES | {"distillation": {"logits": "run", "revision": "main"}},
            "distillation.revision",
            "have none of it",
        ),
        (
            {
                "model__task": "image-classification",
                "data": {"train": {"path": "."}, "augmentation": {"horizontal_flip": 0.5}},
                "distillation": {"logits": "run"},
            },
            "data.augmentation",
            "altered images are not those that logits were written of",
        ),
        ({"distillation": {"teacher": "lora"}}, "distillation.teacher", "export it merged"),
        (
            {
                "model__task": "token-classification",
                "data__tags": "tags",
                "data__text": None,
                "data__words": "w",
            },
            "distillation",
            "a token-classification task learns from no teacher; causal-lm, image-classification, sequence-classification do",
        ),
        (
            {
                "model__task": "image-classification",
                "data": {"train": {"path": "."}},
                "distillation": {"teacher": "large", "hidden_states": {}},
            },
            "distillation.hidden_states",
            "compared token by token, and an image has none",
        ),
        (
            {"model__task": "sequence-classification", "data__label": "label", "data__problem": "regression"},
            "distillation.temperature",
            "a number has no temperature",
        ),
    ],
)
def test_what_cannot_be_is_refused_on_reading(
    keys: dict[str, Any], key: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    where, why = refusal(write(tmp_path, **keys))
    assert where == key and reason in why, (where, why)


def test_a_teacher_with_another_tokenizer_is_refused_by_the_plan(tmp_path: Path) -> None:
    path = write(tmp_path)
    model(tmp_path / "large", LLAMA | {"vocab_size": 8}, added=("<x>", "<y>"))
    key, reason = refusal(path)
    assert key == "distillation.teacher" and "8 tokens and the model's 6" in reason


def test_a_teacher_that_is_too_short_is_refused_by_the_plan(tmp_path: Path) -> None:
    path = write(tmp_path)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 6}
    model(tmp_path / "large", {"model_type": "gpt2", **sizes})
    key, reason = refusal(path)
    assert key == "distillation.teacher" and "no positions beyond 16" in reason


@pytest.mark.parametrize(
    ("layers", "key", "reason"),
    [({3: 4}, 3, "the model has layers 0 to 2"), ({2: 5}, 5, "the teacher has layers 0 to 4")],
)
def test_layers_that_are_not_there_are_refused_by_the_plan(
    layers: dict[int, int], key: int, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path, distillation=TEACHER | {"hidden_states": {"layers": layers}})
    with pytest.raises(ConfigurationError) as caught:
        plan_job(load(path), hardware=CPU)
    [problem] = caught.value.problems
    assert (problem.key, problem.value) == ("distillation.hidden_states.layers", key)
    assert reason in problem.reason


def test_a_teacher_without_classes_is_refused_by_the_plan(tmp_path: Path) -> None:
    keys = {"model__task": "sequence-classification", "data__label": "label"}
    path = write(tmp_path, "bert", **keys)
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"]})
    )
    key, reason = refusal(path)
    assert key == "distillation.teacher" and "no classification head" in reason


def test_hidden_states_of_two_stacks_are_refused_by_the_plan(tmp_path: Path) -> None:
    path = write(tmp_path, distillation=TEACHER | {"hidden_states": {}})
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    key, reason = refusal(path)
    assert key == "distillation.hidden_states" and "two stacks of layers" in reason


def test_hidden_states_are_in_the_plan_and_its_memory(tmp_path: Path) -> None:
    plans = []
    for width, hidden in ((64, False), (64, True), (128, True)):
        folder = tmp_path / f"{width}-{hidden}"
        folder.mkdir()
        path = write(folder, distillation=TEACHER | ({"hidden_states": {"layers": {2: 4}}} if hidden else {}))
        model(
            folder / "large", LLAMA | {"num_hidden_layers": 4, "hidden_size": width, "head_dim": width // 4}
        )
        plans.append(plan_job(load(path), hardware=CPU))
    assert plans[1].distillation and plans[1].distillation.hidden_states
    assert Plan.model_validate_json(plans[1].model_dump_json()).distillation == plans[1].distillation
    without, alike, other = (Estimator(plan, Profiles().find(plan)) for plan in plans)  # type: ignore[arg-type]
    assert alike.footprint().phase("steady step").peak > without.footprint().phase("steady step").peak
    assert other.checkpoint_bytes - alike.checkpoint_bytes == 3 * 4 * 64 * 128, "the projection and its state"


def test_a_way_is_taken_in_which_both_read_the_same_batches(tmp_path: Path) -> None:
    path = write(tmp_path)
    sizes = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 6}
    (tmp_path / "large" / "config.json").write_text(json.dumps({"model_type": "bloom", **sizes}))
    plan = plan_job(load(path), hardware=CPU)
    assert (plan.layout, plan.attention, plan.head) == ("padded", "eager", "chunked")


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (
            "longrope",
            "single samples with sdpa attention, single samples with eager attention where that has",
        ),
        ("dynamic", "its rotary frequencies hang on the longest sample so far"),
    ],
)
def test_models_that_cannot_share_batches_are_refused_with_what_they_can(
    rope: str, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    growing = {"rope_parameters": {"rope_type": rope, "original_max_position_embeddings": 16}}
    model(tmp_path / "large", LLAMA | growing)
    key, why = refusal(path)
    assert key == "distillation.teacher" and reason in why, why


def test_a_model_whose_head_is_no_matrix_is_refused(tmp_path: Path) -> None:
    key, reason = refusal(write(tmp_path, "falcon_h1"))
    assert key == "distillation" and "a falcon_h1 model's own head is not only a matrix" in reason


def big(folder: Path, steps: dict[int, float], task: str = "causal-lm", **checkpoint: Any) -> Path:
    """A run of a larger model with checkpoints, by step their loss; the job that learns from it."""
    job = write(folder, distillation={"teacher": "runs/big"})
    run = make_run(folder / "runs" / "big")
    shutil.copytree(folder / "large", run.path / "model")
    alone = {key: value for key, value in yaml.safe_load(job.read_text()).items() if key != "distillation"}
    alone["data"]["evaluation"] = {"path": "rows.jsonl"}
    (folder / "big.yaml").write_text(yaml.safe_dump(alone | {"checkpoint": checkpoint}))
    plan = plan_job(load(folder / "big.yaml"), hardware=CPU)
    run.plan_file.write_text(plan.model_copy(update={"task": task}).to_json())
    for step, value in steps.items():
        write_checkpoint(run, step, metrics={"loss": value})
    return job


def test_a_student_is_measured_though_its_teacher_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: CPU))
    job = big(tmp_path, {2: 3.0})
    run = make_run(tmp_path / "runs" / "student")
    plan = plan_job(load(job), hardware=CPU)
    run.plan_file.write_text(plan.to_json())
    run.job_file.write_text(as_yaml(load(job)))
    shutil.rmtree(tmp_path / "runs" / "big" / "checkpoints")
    for gone in ("its checkpoints", "the whole run"):
        with pytest.raises(ConfigurationError, match=r"distillation\.teacher"):
            plan_job(load(run.job_file), hardware=CPU)
        measured = Request.of(str(run.path), None, None, None, []).plan
        assert measured == plan.model_copy(
            update={"distillation": None, "decisions": measured.decisions, "refused": measured.refused}
        ), gone
        assert Request.of(str(tmp_path / "small"), job, None, None, []).plan.distillation is None
        shutil.rmtree(tmp_path / "runs" / "big", ignore_errors=True)


@pytest.mark.parametrize(("kept", "step"), [({}, 6), ({"keep_best": 2}, 4)])
def test_a_run_teaches_by_its_best_checkpoint_or_its_newest(
    kept: dict[str, Any], step: int, tmp_path: Path
) -> None:
    job = big(tmp_path, {2: 3.0, 4: 1.0, 6: 2.0}, **kept)
    plan = plan_job(load(job), hardware=CPU)
    assert plan.distillation is not None
    assert plan.distillation.teacher == str(tmp_path / "runs" / "big" / "model")
    assert plan.distillation.checkpoint == step
    write_checkpoint(RunDirectory(tmp_path / "runs" / "big"), 8, metrics={"loss": 0.5})
    again = decide_again(load(job), None, plan, local=True)
    assert again.distillation == plan.distillation, "a run that goes on has the teacher that it began with"
    asked = plan_job(load(job, ["distillation.checkpoint=2"]), hardware=CPU)
    assert asked.distillation is not None and asked.distillation.checkpoint == 2


def test_a_run_goes_on_without_the_checkpoint_that_it_has_written_out(tmp_path: Path) -> None:
    job = big(tmp_path, {2: 1.0, 4: 2.0})
    plan, run = plan_job(load(job), hardware=CPU), tmp_path / "learns"
    assert plan.distillation is not None and plan.distillation.checkpoint == 4
    shutil.copytree(tmp_path / "large", run / "teacher")
    shutil.rmtree(RunDirectory(tmp_path / "runs" / "big").checkpoints)
    asked = load(job, ["training.learning_rate=1e-3"])
    with pytest.raises(ConfigurationError, match="no whole checkpoint"):
        decide_again(asked, 1, plan, True, run)  # what lies there is of nobody knows what
    (run / "teacher" / SOURCE).write_text(json.dumps(plan.distillation.source))
    again = decide_again(asked, 1, plan, True, run)
    assert again.distillation == plan.distillation and again.training.learning_rate == 1e-3
    with pytest.raises(ConfigurationError, match="no whole checkpoint"):
        decide_again(load(job, ["distillation.checkpoint=2"]), 1, plan, True, run)


@pytest.mark.parametrize(
    ("steps", "overrides", "key", "reason"),
    [
        ({}, [], "teacher", "has no whole checkpoint yet"),
        ({2: 1.0}, ["distillation.checkpoint=3"], "checkpoint", "has no such checkpoint; it has 2"),
        ({2: 1.0}, ["distillation.teacher=large", "distillation.checkpoint=2"], "checkpoint", "is no run"),
    ],
)
def test_a_run_that_cannot_teach_is_refused(
    steps: dict[int, float], overrides: list[str], key: str, reason: str, tmp_path: Path
) -> None:
    job = big(tmp_path, steps)
    with pytest.raises(ConfigurationError) as caught:
        plan_job(load(job, overrides), hardware=CPU)
    [problem] = caught.value.problems
    assert problem.key == f"distillation.{key}" and reason in problem.reason


def test_a_run_of_another_task_or_of_a_damaged_plan_teaches_nothing(tmp_path: Path) -> None:
    job = big(tmp_path, {2: 1.0}, task="masked-lm")
    key, reason = refusal(job)
    assert key == "distillation.teacher" and "is a run of masked-lm" in reason
    file = tmp_path / "runs" / "big" / "plan.json"
    values = json.loads(file.read_text()) | {"task": "causal-lm"}
    values["model"] |= {"adapter": {"method": "prompt-tuning"}}
    file.write_text(json.dumps(values))
    key, reason = refusal(job)
    assert key == "distillation.teacher" and "virtual tokens, which are no part of the weights" in reason
    file.write_text("{}")
    assert refusal(job)[0] == "distillation.teacher"


def logits_of(folder: Path, **changes: Any) -> Path:
    """A directory as `launcher predict --logits` writes it, whose arrays are of zeros."""
    (folder / "logits").mkdir()
    files = {"keys.npy": 640, "logits.npy": 896, "checks.npy": 640}
    for name, size in files.items():
        (folder / "logits" / name).write_bytes(b"\0" * size)
    manifest = {
        "format": 1,
        "task": "sequence-classification",
        "problem": "single-label",
        "classes": ["x", "y"],
    }
    manifest |= {"num_outputs": 2, "num_samples": 64, "teacher": {"name": "large"}, "precision": "fp32"}
    manifest |= {"data": {}, "files": files, "digest": "0"} | changes
    (folder / "logits" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "logits"


def test_of_logits_that_were_written_ahead_no_teacher_is_planned(tmp_path: Path) -> None:
    path = write(tmp_path, "bert", **CLASSES, distillation={"logits": "logits"})
    logits_of(tmp_path)
    plan = plan_job(load(path), hardware=CPU)
    assert plan.distillation is not None and plan.distillation.logits == str(tmp_path / "logits")
    assert Plan.model_validate_json(plan.to_json()) == plan
    without = plan.model_copy(update={"distillation": None})
    assert Profiles().find(plan) == Profiles().find(without)
    shutil.rmtree(tmp_path / "logits")
    assert load(path, ["distillation=null"]).distillation is None, "to write them again is no fault"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "its manifest.json is not what was written (format: "),
        ({"task": "image-classification"}, "logits of image-classification, and the model does"),
        ({"problem": "multi-label"}, "logits of multi-label (data.problem), and the job has single-label"),
        ({"files": {"keys.npy": 641}}, "keys.npy has 640 bytes, and 641 were written; write the logits anew"),
        ({"files": {"tokens.npy": 641}}, "tokens.npy is not there, and 641 were written"),
    ],
)
def test_logits_of_something_else_are_refused_by_the_plan(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "bert", **CLASSES, distillation={"logits": "logits"})
    logits_of(tmp_path, **changes)
    key, why = refusal(path)
    assert key == "distillation.logits" and reason in why


def states_of(folder: Path, **changes: Any) -> Path:
    """A directory as `launcher predict --logits` writes it of a language model, whose arrays are of zeros."""
    hidden = {"width": 16, "num_tokens": 100, "has_bias": True, "scale": 1.0, "softcap": None}
    hidden |= {"matrix_hash": "0", "num_ids": 6, "vocabulary_hash": "0"} | changes.pop("hidden", {})
    sizes = {"keys": 640, "checks": 640, "ends": 640, "states": 6528, "matrix": 640, "bias": 152}
    of_task = {"task": "causal-lm", "problem": None, "classes": None, "num_outputs": 8, "hidden": hidden}
    directory = logits_of(folder, **of_task | {"files": {}} | changes)
    (directory / "logits.npy").unlink()
    for name, size in sizes.items():
        (directory / f"{name}.npy").write_bytes(b"\0" * size)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = {f"{name}.npy": size for name, size in sizes.items()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_of_written_states_the_output_matrix_is_planned(tmp_path: Path) -> None:
    """In every phase of its shards, in the loss whole; and of the states those of a micro-batch."""
    path = write(tmp_path, distillation={"logits": "logits", "temperature": 2.0})
    states_of(tmp_path)
    plan = plan_job(load(path), hardware=CPU)
    [decision] = [one for one in plan.decisions if one.key == "distillation.logits"]
    assert decision.reason == "hidden states of 100 tokens and an output matrix, 9.24 kB, of large"
    other = plan_job(load(path, ["precision=bf16"]), hardware=CPU)
    assert any(
        "computed in fp32, as a teacher in this run's bf16 is not" in one.reason for one in other.decisions
    )
    without = plan.model_copy(update={"distillation": None})
    program, own = Profiles().find(plan), Profiles().find(without)
    assert isinstance(program, TaughtAhead) and program.student == own and program.itemsize == 4
    told, plain = Estimator(plan, program), Estimator(without, own)  # type: ignore[arg-type]
    assert told.teacher is not None
    shard = 4 * (4 * 16 + 4)
    assert told.teacher.state_bytes == shard and told.checkpoint_bytes == plain.checkpoint_bytes
    for phase, before in zip(told.footprint().phases, plain.footprint().phases, strict=True):
        assert phase.parts["teacher"] == shard
        if phase.name in ("loading", "evaluating", "resuming"):
            assert phase.peak - before.peak == shard
        else:
            whole, chunk = 2 * shard, 12 * 8 * plan.data.max_length * plan.batch.micro_batch_size
            assert phase.peak - before.peak >= min(whole, chunk)
    on_gpus = plan_job(load(path, ["cluster.gpus_per_node=2", "cluster.ranks_per_node=2"]), hardware=H100)
    alone = on_gpus.model_copy(update={"distillation": None})
    known, bare = (forecast_of(one, target_here(one, H100), Profiles()) for one in (on_gpus, alone))
    assert known is not None and bare is not None and not known.traced
    assert known.speed is not None and bare.speed is not None and known.speed.compute > bare.speed.compute
    shutil.rmtree(tmp_path / "logits")
    unknown = Profiles().find(plan)
    assert isinstance(unknown, Unknown)
    assert "of the logits written ahead: has no manifest.json" in unknown.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": {"num_ids": 7}}, "written with a tokenizer of 7 tokens, and the model's has 6"),
        ({"data": {"longest": 33}}, "written of samples of up to 33 tokens, and data.max_length is 32"),
        ({"precision": "fp8"}, "its manifest.json is not what was written (precision: "),
        ({"hidden": {"width": 0}}, "its manifest.json is not what was written (hidden: width: "),
        (
            {"task": "sequence-classification"},
            "logits of sequence-classification, and the model does causal-lm",
        ),
    ],
)
def test_states_that_do_not_suit_are_refused_by_the_plan(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path, distillation={"logits": "logits"})
    states_of(tmp_path, **changes)
    key, why = refusal(path)
    assert key == "distillation.logits" and reason in why, why


def test_longer_samples_are_no_fault_where_rows_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, distillation={"logits": "logits"})
    states_of(tmp_path, data={"longest": 33})
    assert plan_job(load(path, ["data.too_long=drop"]), hardware=CPU).distillation is not None


def test_a_date_left_open_is_the_one_with_which_states_were_written(tmp_path: Path) -> None:
    path = write(tmp_path, data__text=None, data__messages="messages", distillation={"logits": "logits"})
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    states_of(tmp_path, data={"longest": 8, "read_as": {"date": "2020-02-29"}})
    plan = plan_job(load(path), hardware=CPU)
    assert plan.data.date == "2020-02-29"  # type: ignore[attr-defined]
    assert any(one.reason == "as distillation.logits were written" for one in plan.decisions)


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        ({}, "--logits", "is there already; name another directory, or remove it"),
        ({"out": "nowhere/logits"}, "--logits", "nowhere is not there"),
        ({"task": "masked-lm"}, "--logits", "nothing learns from logits of a masked-lm task; of causal-lm,"),
        ({"method": "prompt-tuning"}, "--logits", "virtual tokens, which no student has before its rows"),
    ],
)
def test_logits_that_nobody_could_learn_from_are_not_written(
    options: dict[str, Any], key: str, reason: str, tmp_path: Path
) -> None:
    plan = plan_job(load(write(tmp_path, "bert", **CLASSES, distillation=None)), hardware=CPU)
    plan = plan.model_copy(update={"task": options.get("task", plan.task)})
    teacher = "large" if "method" not in options else None  # None: the run's own model
    if teacher is None:
        prompted = plan.model.model_copy(update={"adapter": Adapter(method=options["method"])})
        plan = plan.model_copy(update={"model": prompted})
    out = options.get("out", "new" if options else "large")
    with pytest.raises(ConfigurationError) as caught:
        Logits(Request(plan, None, teacher, None), tmp_path / out).run(None)  # type: ignore[arg-type]
    [problem] = caught.value.problems
    assert problem.key == key and reason in problem.reason


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ([], ["--input: is missing: name a file, or write --logits DIR", "--output: is missing"]),
        (
            ["--logits", "out", "--input", "rows.jsonl", "--probabilities", "--top-k", "2"],
            ["--input = 'rows.jsonl': does not go with --logits", "--probabilities", "--top-k = '2'"],
        ),
    ],
)
def test_rows_or_logits_are_asked_for(
    arguments: list[str], problems: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", "run", *arguments])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert all(problem in told for problem in problems), told
