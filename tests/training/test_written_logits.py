"""Logits that were written ahead: a run learns from them what it learns from the teacher itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.errors import ConfigurationError, DataError, LauncherError, StorageError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.distillation import Distillation
from launcher.tasks.written_logits import MANIFEST
from launcher.training.data.logits_writer import Writer
from launcher.training.data.written_logits import WrittenLogits, key_of, samples_of
from launcher.training.inputs import TrainingInputs
from launcher.training.logits_entry import write
from tests.training.pictures import folder_of
from tests.training.plans import deepspeed
from tests.training.plans import plan_of as any_plan
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    errors_of,
    finish,
    model_directory,
    named,
    new_run,
    replan,
    state,
)
from tests.training.test_distillation import classifier
from tests.training.test_distilled_images import model_of, taught, teacher_of
from tests.training.test_resume import compare
from tests.training.test_trainer_images import run_of
from tests.training.test_trainer_tasks import plan_of

pytestmark = pytest.mark.distributed
STEPS = 4
LABELS = {
    "single-label": ["kind 0", "kind 1", "kind 2"],
    "multi-label": ["low", "many"],
    "regression": ["value"],
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_directory(
        tmp_path_factory.mktemp("encoder"), "bert", "AutoModel", num_hidden_layers=2, **still
    )


def asking(plan: Plan, teacher: Path, out: Path, name: str = "scratch") -> RunDirectory:
    """What `launcher predict --logits` leaves to the ranks."""
    data = plan.data.model_copy(update={"evaluation": plan.data.train, "packing": False})
    scratch = new_run(out.parent / name, plan.model_copy(update={"data": data, "distillation": None}))
    request = {"run": None, "model": str(teacher), "step": None, "output": str(out)}
    (scratch.path / "request.json").write_text(json.dumps(request))
    return scratch


def learns(plan: Plan, **distillation: Any) -> Plan:
    return plan.model_copy(update={"distillation": Distillation(own_loss=0.25, **distillation)})


def assert_alike(run: RunDirectory, other: RunDirectory) -> None:
    """The losses of the first step to 1e-6; of the later ones less, as Adam makes much of rounding."""
    losses, others = ([one["loss"] for one in curve(each).values()] for each in (run, other))
    assert len(losses) == STEPS and losses == pytest.approx(others, rel=2e-5)
    assert losses[0] == pytest.approx(others[0], rel=1e-6)


@pytest.mark.parametrize(
    ("problem", "engine"),
    [
        ("single-label", {}),
        pytest.param("single-label", deepspeed(3), marks=pytest.mark.slow),
        pytest.param("multi-label", {}, marks=pytest.mark.very_slow),
        pytest.param("regression", {}, marks=pytest.mark.very_slow),
    ],
)
def test_a_classifier_learns_as_from_the_teacher_itself(
    problem: str, engine: dict[str, Any], encoder: Path, tmp_path: Path
) -> None:
    """Also where the teacher is gone, and the run was stopped in between."""
    if engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    teacher = classifier(tmp_path / "teacher", LABELS[problem], max_position_embeddings=64, pad_token_id=0)
    base = plan_of(encoder, tmp_path, problem, STEPS)
    base = Plan.model_validate(base.model_dump(by_alias=True) | engine)
    finish(asking(base, teacher, tmp_path / "logits"), 2, entry=write)
    settings = {} if problem == "regression" else {"temperature": 1.5}
    known = new_run(tmp_path / "known", learns(base, teacher=str(teacher), **settings))
    finish(known, 2)
    shutil.rmtree(teacher)
    told = learns(base, logits=str(tmp_path / "logits"), **settings)
    run = new_run(tmp_path / "run", told)
    finish(run, 2, stop_at=2)
    finish(run, 2)
    assert_alike(run, known)
    compare(run, known, 1e-4)
    manifest = json.loads((tmp_path / "logits" / MANIFEST).read_text())
    (run.path / "data-logits.json").write_text(json.dumps({"digest": "other", "teacher": {"name": "large"}}))
    with pytest.raises(DataError, match=r"other logits than the run began with \(of large then"):
        TrainingInputs.prepare(run, told)
    assert manifest["num_samples"] == 96 and manifest["teacher"]["name"] == str(teacher)


@pytest.mark.slow
def test_an_image_classifier_learns_as_from_the_teacher_itself(tmp_path: Path) -> None:
    pictures, student = folder_of(tmp_path / "pictures"), model_of(tmp_path / "student")
    teacher = teacher_of(tmp_path / "teacher")
    known = taught(student, teacher, pictures)
    finish(asking(known, teacher, tmp_path / "logits"), 2, entry=write)
    settings = {"logits": str(tmp_path / "logits"), "temperature": 2.0}
    assert_alike(run_of(tmp_path / "known", known, 2), run_of(tmp_path / "run", learns(known, **settings), 2))


@pytest.fixture(scope="module")
def taken(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, TrainingInputs, Path]:
    """A plan that learns from logits of its rows, made up; its inputs, and where the logits are."""
    folder = tmp_path_factory.mktemp("taken")
    plan = learns(plan_of(encoder, folder, "single-label", STEPS), logits=str(folder / "logits"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        without = plan.model_copy(update={"distillation": None})
        bare = TrainingInputs.of(new_run(folder / "bare", without), without)
    samples = {key_of(sample): sample for sample in samples_of(bare.train)}
    writer = Writer(folder / "logits", about(len(samples)), sorted(samples))
    assert writer.begin() == 0
    for number, key in enumerate(samples):
        writer.put(key, np.array([number, 0.5, -1.0], dtype=np.float32))
    writer.finish()
    return plan, bare, folder / "logits"


def about(num_samples: int, **changes: Any) -> dict[str, Any]:
    manifest = {"format": 1, "task": "sequence-classification", "problem": "single-label", "num_outputs": 3}
    manifest |= {"classes": LABELS["single-label"], "teacher": {"name": "large"}, "precision": "fp32"}
    return manifest | {"data": {}, "num_samples": num_samples} | changes


def test_a_batch_has_the_logits_of_its_samples(taken: tuple[Plan, TrainingInputs, Path]) -> None:
    """Filler's too, whose loss weighs nothing."""
    _, inputs, directory = taken
    logits = WrittenLogits.open(directory)
    logits.check(inputs.train, inputs.task)
    logits.suit(inputs.task, inputs.tokenizer)
    samples = list(samples_of(inputs.train))
    rows = logits.of([samples[5:6], [samples[2], samples[5].as_filler()]])["teacher_logits"]
    assert rows.tolist() == [[5.0, 0.5, -1.0], [2.0, 0.5, -1.0], [5.0, 0.5, -1.0]]


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_one_rank(
    taken: tuple[Plan, TrainingInputs, Path], tmp_path: Path
) -> None:
    plan, _, _ = taken
    batch = type(plan.batch).model_validate(batch_of(1, 16))
    alone = plan.model_copy(update={"mesh": any_plan(tmp_path, 1).mesh, "batch": batch})
    whole, stopped, moved = (new_run(tmp_path / name, plan) for name in ("whole", "stopped", "moved"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 2, stop_at=2)
    replan(moved, alone)
    finish(moved, 1)
    compare(moved, whole, 1e-4)


def _cut(directory: Path) -> None:
    (directory / "logits.npy").write_bytes((directory / "logits.npy").read_bytes()[:-4])


def _as_doubles(directory: Path) -> None:
    """As large as before, and of another type."""
    raw = (directory / "logits.npy").read_bytes()
    (directory / "logits.npy").write_bytes(raw.replace(b"'<f4'", b"'<i4'", 1))


def _no_header(directory: Path) -> None:
    raw = (directory / "logits.npy").read_bytes()
    (directory / "logits.npy").write_bytes(b"\0" * 16 + raw[16:])


def _flip(directory: Path) -> None:
    raw = bytearray((directory / "logits.npy").read_bytes())
    raw[-1] ^= 1
    (directory / "logits.npy").write_bytes(raw)


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST).read_text())
        (directory / MANIFEST).write_text(json.dumps(manifest | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "kind", "reason"),
    [
        (lambda path: (path / MANIFEST).unlink(), ConfigurationError, "has no manifest.json"),
        (
            lambda path: (path / MANIFEST).write_text("{"),
            ConfigurationError,
            "is not what was written .Invalid",
        ),
        (_edit(num_samples=0), ConfigurationError, "is not what was written .num_samples"),
        (lambda path: (path / "keys.npy").unlink(), ConfigurationError, "keys.npy is not there, and"),
        (_cut, ConfigurationError, r"logits.npy has 1,\d\d\d bytes, and 1,\d\d\d were written"),
        (_edit(problem="multi-label"), ConfigurationError, "logits of multi-label"),
        (_edit(classes=["kind 0", "kind 2", "kind 1"]), ConfigurationError, "the same, in order"),
        (_edit(classes=["a", "b"]), ConfigurationError, r"logits of 2 classes .a, b., and the model's"),
        (_edit(num_outputs=4), DataError, r"holds float32 \[96, 3\], and float32 \[96, 4\] were written"),
        (_as_doubles, DataError, "holds int32"),
        (_no_header, DataError, "logits.npy: "),
        (_flip, DataError, "are not those that were written; write the logits anew"),
    ],
)
def test_damaged_logits_and_those_of_others_are_refused(
    damage: Callable[[Path], None],
    kind: type[LauncherError],
    reason: str,
    taken: tuple[Plan, TrainingInputs, Path],
    tmp_path: Path,
) -> None:
    _, inputs, directory = taken
    shutil.copytree(directory, tmp_path / "logits")
    damage(tmp_path / "logits")
    with pytest.raises(kind, match=reason) as caught:
        logits = WrittenLogits.open(tmp_path / "logits")
        logits.suit(inputs.task, inputs.tokenizer)
        logits.of([[sample] for sample in samples_of(inputs.train)])
    assert "\n" not in str(caught.value) and str(tmp_path / "logits") in str(caught.value)


def test_rows_without_logits_are_refused_before_the_first_step(
    taken: tuple[Plan, TrainingInputs, Path], tmp_path: Path
) -> None:
    plan, inputs, directory = taken
    source = plan.data.train.model_copy(update={"path": str(tmp_path / "more.jsonl")})
    lines = Path(str(plan.data.train.path)).read_text()
    (tmp_path / "more.jsonl").write_text(lines + '{"text": "w1 w2 w99", "label": "kind 1"}\n')
    more = plan.model_copy(update={"data": plan.data.model_copy(update={"train": source})})
    with pytest.raises(DataError, match="1 of 97 samples have no logits there, the first is of row 96"):
        TrainingInputs.of(new_run(tmp_path / "run", more), more)
    [sample] = inputs.train.item(0)
    sample["input_ids"] = sample["input_ids"][::-1]
    with pytest.raises(DataError, match="there are no logits of row 0"):
        WrittenLogits.open(directory).of([[sample]])


def test_writing_goes_on_where_it_stopped_and_of_the_same_alone(tmp_path: Path) -> None:
    out, rows = tmp_path / "logits", np.arange(6, dtype=np.float32).reshape(2, 3)
    first = Writer(out, about(2), [3, 7])
    assert first.begin() == 0
    first.put(7, rows[1])
    first.keep(1)
    assert Writer(out, about(2, precision="bf16"), [3, 7])._of != first._of
    second = Writer(out, about(2), [3, 7])
    assert second.begin() == 1 and not out.exists()
    second.put(3, rows[0])
    second.finish()
    assert not (tmp_path / "logits.partial").exists()
    np.testing.assert_array_equal(WrittenLogits.open(out).values, rows)
    other = Writer(tmp_path / "other", about(2), [3, 7])
    other.begin()
    other.keep(1)
    assert Writer(tmp_path / "other", about(2), [3, 8]).begin() == 0, "of other samples it begins anew"
    (tmp_path / "mine.partial").mkdir()
    with pytest.raises(StorageError, match="mine: File exists"):
        Writer(tmp_path / "mine", about(2), [3, 7]).begin()
    shutil.rmtree(tmp_path / "other.partial")
    with pytest.raises(StorageError, match="No such file"):
        other.keep(2)
    with pytest.raises(StorageError, match="No such file"):
        other.finish()


@pytest.mark.slow
def test_a_stop_leaves_what_is_done(encoder: Path, tmp_path: Path) -> None:
    teacher = classifier(
        tmp_path / "teacher", LABELS["single-label"], max_position_embeddings=64, pad_token_id=0
    )
    base = plan_of(encoder, tmp_path, "single-label", STEPS)
    finish(asking(base, teacher, tmp_path / "whole", "one"), 2, entry=write)
    stopped = asking(base, teacher, tmp_path / "logits", "two")
    assert not errors_of(stopped, 2, hook=_stop_soon, entry=write)
    assert "the same command goes on there" in named(stopped, "stopped")[0]["line"]
    finish(asking(base, teacher, tmp_path / "logits", "three"), 2, entry=write)
    for name in ("keys.npy", "logits.npy", "checks.npy"):
        assert (tmp_path / "logits" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _stop_soon(rank: int, stop: Any) -> None:
    """A stop after two passes."""
    from launcher.training.writing_logits import Writing

    values, passes = Writing.values, [0]

    def counted(self: Writing, keys: Any) -> Any:
        passes[0] += 1
        if passes[0] == 2:
            stop.requested = True
        return values(self, keys)

    Writing.values = counted  # type: ignore[method-assign]
