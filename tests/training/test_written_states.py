"""Hidden states of a causal LM that were written ahead: a run learns from them as from the teacher itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.errors import ConfigurationError, DataError, LauncherError, StorageError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.distillation import Distillation
from launcher.tasks.written_logits import MANIFEST, TEACHER_STATES
from launcher.training import distillation, loss
from launcher.training.checkpoint.export import export
from launcher.training.data.logits_writer import Writer
from launcher.training.data.written_logits import (
    WrittenLogits,
    key_of,
    num_supervised,
    read_as,
    samples_of,
    vocabulary_of,
)
from launcher.training.inputs import TrainingInputs
from launcher.training.logits_entry import write
from launcher.training.loss import LogitTransform
from launcher.training.model.forward import decoder_inputs
from launcher.training.written_states import OutputMatrix, load_matrix
from tests.tiers import slow_but
from tests.training.batches import batch_of_samples
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    errors_of,
    finish,
    model_directory,
    named,
    new_run,
    plan_for,
    replan,
    state,
    texts,
    tokenizer,
    write_rows,
)
from tests.training.test_resume import compare
from tests.training.test_written_logits import _stop_soon, asking
from tests.training.tiny import model_of

pytestmark = pytest.mark.distributed
NUM_STEPS = 4
SETTINGS = {"temperature": 2.0, "own_loss": 0.3}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("student"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model of another family, whose embedding has more rows than the student's."""
    sizes = {"hidden_size": 64, "vocab_size": 140, "seed": 1, "num_hidden_layers": 4}
    return model_directory(tmp_path_factory.mktemp("teacher"), "qwen3", **sizes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return causal_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def written(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The teacher's states, written by two ranks."""
    folder = tmp_path_factory.mktemp("written")
    plan = plan_for(student, rows, 2, NUM_STEPS, batch=batch_of(2, 2))
    finish(asking(plan, teacher, folder / "logits"), 2, entry=write)
    return folder / "logits"


def plan(student: Path, rows: dict[str, Any], world_size: int = 1, **changes: Any) -> Plan:
    section = {key: str(changes.pop(key)) for key in ("teacher", "logits") if key in changes}
    return plan_for(student, rows, world_size, NUM_STEPS, distillation=section | SETTINGS, **changes)


def assert_alike(run: RunDirectory, known: RunDirectory) -> None:
    """Loss and gradient norm of the first step to 1e-6; of the later ones less, as Adam makes much of
    rounding."""
    for name in ("loss", "grad_norm"):
        values, others = ([one[name] for one in curve(each).values()] for each in (run, known))
        assert len(values) == NUM_STEPS and values == pytest.approx(others, rel=2e-5)
        assert values[0] == pytest.approx(others[0], rel=1e-6)


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"batch": batch_of(1, 4)}),
    "FSDP, 2 ranks": (2, {"batch": batch_of(2, 1, 2)}),
    "FSDP, 2 copies": (2, {"batch": batch_of(2, 2), "mesh__dp_replicate": 2, "mesh__dp_shard": 1}),
    "padded": (2, {"batch": batch_of(2, 2), "layout": "padded", "attention": "sdpa"}),
    "ZeRO-3, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(3)}),
    "ZeRO-2, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(2)}),
}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    slow_but({"1 rank", "FSDP, 2 ranks"}, WAYS, {"FSDP, 2 copies", "ZeRO-2, 2 ranks"}),
)
def test_a_run_learns_as_from_the_teacher_itself(
    world_size: int,
    changes: dict[str, Any],
    student: Path,
    teacher: Path,
    rows: dict[str, Any],
    written: Path,
    tmp_path: Path,
) -> None:
    if "zero" in changes:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    known = new_run(tmp_path / "known", plan(student, rows, world_size, teacher=teacher, **changes))
    run = new_run(tmp_path / "run", plan(student, rows, world_size, logits=written, **changes))
    finish(known, world_size)
    finish(run, world_size)
    assert_alike(run, known)
    compare(run, known, 1e-4)


def answers(folder: Path) -> dict[str, Any]:
    """Rows of a prompt and a completion, of which only the completion is supervised; some are cut."""
    pairs = zip(texts(24, seed=3), texts(24, seed=4), strict=True)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    columns = {"prompt": "prompt", "completion": "completion"}
    return {"train": write_rows(folder / "pairs.jsonl", rows), **columns, "max_length": 48, "num_workers": 1}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a soft cap": ("gemma2", {"final_logit_softcapping": 5.0}),
    "a scale": ("granite", {}),
    "a bias": ("phi", {}),
    "tied": ("llama", {}),
}


@pytest.mark.parametrize(("family", "changes"), slow_but({"a soft cap"}, FAMILIES))
def test_the_products_are_the_logits_of_the_models_own_class(
    family: str, changes: dict[str, Any], student: Path, tmp_path: Path
) -> None:
    """Of each sample alone, at its supervised tokens, to the rounding of fp32."""
    teacher = model_directory(tmp_path / "teacher", family, seed=5, **changes)
    asked = plan_for(student, answers(tmp_path), 1, NUM_STEPS)
    finish(asking(asked, teacher, tmp_path / "logits"), 1, entry=write)
    told = plan_for(
        student, answers(tmp_path), 1, NUM_STEPS, distillation={"logits": str(tmp_path / "logits")}
    )
    inputs = TrainingInputs.of(new_run(tmp_path / "run", told), told)
    assert inputs.logits is not None and inputs.logits.manifest.num_samples == 24
    matrix = load_matrix(told, str(tmp_path / "logits"))
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()
    for sample in samples_of(inputs.train):
        states = inputs.logits.of([[sample, sample.as_filler()]])[TEACHER_STATES]
        assert 0 < len(states) == num_supervised(sample) < sample.length
        with torch.no_grad():
            own = model(torch.tensor(sample["input_ids"], dtype=torch.int64)[None]).logits[0]
            product = matrix.logits(states)
        own = own[torch.tensor(sample["targets"] != -100)]
        torch.testing.assert_close(product, own, rtol=0, atol=5e-6 * max(1.0, float(own.abs().max())))


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_in_chunks_the_loss_is_that_with_the_teacher(
    family: str, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients to the bit, in passes of several chunks."""
    monkeypatch.setattr(loss, "chunk_length", lambda vocabulary, cuda: 7)
    changes: dict[str, Any] = {"final_logit_softcapping": 5.0} if family == "gemma2" else {}
    frozen = model_of(family, seed=7, attn_implementation="eager", **changes).eval()
    model = model_of("llama").train()
    settings = Distillation(teacher="any", **SETTINGS)
    generator = torch.Generator().manual_seed(3)
    samples = [torch.randint(3, 131, (length,), generator=generator) for length in (11, 4, 18)]
    batch = batch_of_samples(samples, "padded")
    with torch.no_grad():
        every = frozen.base_model(**decoder_inputs(batch)).last_hidden_state.flatten(0, 1)
    states = every[batch["targets"] != -100]
    head = frozen.get_output_embeddings()
    matrix = OutputMatrix(LogitTransform.of(frozen.config), head.weight.detach(), head.bias)
    results = []
    for output in (
        distillation.causal_lm(model, batch, frozen, settings),
        distillation.from_states(model, batch | {TEACHER_STATES: states}, matrix, settings),
    ):
        output.loss_sum.backward()
        gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        model.zero_grad()
        results.append((output.loss_sum.detach(), gradients))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks(
    student: Path, rows: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    whole, stopped, moved = (
        new_run(tmp_path / name, plan(student, rows, 2, logits=written, batch=batch_of(2, 3)))
        for name in ("whole", "stopped", "moved")
    )
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    assert not [key for key in state(whole) if "matrix" in key], "a checkpoint holds nothing of the teacher"
    finish(moved, 2, stop_at=2)
    replan(moved, plan(student, rows, 3, logits=written, batch=batch_of(3, 2)))
    finish(moved, 3)
    compare(moved, whole, 1e-4)


@pytest.mark.slow
def test_a_run_writes_what_its_export_does(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    """In bf16, stopped once, and going on with one rank."""
    base = plan_for(teacher, rows, 2, 2, batch=batch_of(2, 2), precision="bf16")
    large = new_run(tmp_path / "large", base)
    finish(large, 2)
    export(large, tmp_path / "exported", 2)
    finish(asking(base, tmp_path / "exported", tmp_path / "known", "one"), 2, entry=write)
    stopped = asking(base, teacher, tmp_path / "logits", "two")
    request = {"run": str(large.path), "model": None, "step": 2, "output": str(tmp_path / "logits")}
    (stopped.path / "request.json").write_text(json.dumps(request))
    assert not errors_of(stopped, 2, hook=_stop_soon, entry=write)
    assert "the same command goes on there" in named(stopped, "stopped")[0]["line"]
    alone = asking(plan_for(teacher, rows, 1, 2, precision="bf16"), teacher, tmp_path / "logits", "three")
    (alone.path / "request.json").write_text(json.dumps(request))
    finish(alone, 1, entry=write)
    known, own = (WrittenLogits.open(tmp_path / name) for name in ("known", "logits"))
    assert own.values.dtype == np.uint16 and json.loads((alone.path / "logits.json").read_text())["step"] == 2
    np.testing.assert_array_equal(own.keys, known.keys)
    for name in ("matrix", "ends"):
        assert (tmp_path / "known" / f"{name}.npy").read_bytes() == (
            tmp_path / "logits" / f"{name}.npy"
        ).read_bytes()
    states, others = (
        torch.from_numpy(one.values.copy()).view(torch.bfloat16).float() for one in (own, known)
    )
    torch.testing.assert_close(states, others, rtol=0.05, atol=0.05)


@pytest.mark.very_slow
def test_in_bf16_the_losses_are_those_with_the_teacher(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    """To what its rounding leaves, as the teacher read other samples in the same pass."""
    changes = {"precision": "bf16", "batch": batch_of(2, 2)}
    finish(asking(plan_for(student, rows, 2, **changes), teacher, tmp_path / "logits"), 2, entry=write)
    known = new_run(tmp_path / "known", plan(student, rows, 2, teacher=teacher, **changes))
    run = new_run(tmp_path / "run", plan(student, rows, 2, logits=tmp_path / "logits", **changes))
    finish(known, 2)
    finish(run, 2)
    losses, others = ([one["loss"] for one in curve(each).values()] for each in (run, known))
    assert losses == pytest.approx(others, rel=2e-3)


def inputs_of(plan: Plan, folder: Path) -> TrainingInputs:
    return TrainingInputs.of(new_run(folder / "run", plan), plan)


def made_up(plan: Plan, folder: Path) -> Path:
    """States of a plan's samples, all zeros, in `folder`/made-up."""
    inputs = inputs_of(plan, folder / "bare")
    samples = {key_of(sample): sample for sample in samples_of(inputs.train)}
    keys = sorted(samples)
    counts = [num_supervised(samples[key]) for key in keys]
    num_ids, vocabulary_hash = vocabulary_of(inputs.tokenizer)
    hidden = {"width": 4, "num_tokens": sum(counts), "has_bias": False, "scale": 1.0, "softcap": None}
    hidden |= {"matrix_hash": "", "num_ids": num_ids, "vocabulary_hash": vocabulary_hash}
    report = inputs.train.report
    data = {"source": report.source_hash, "longest": report.longest, "read_as": read_as(inputs.task)}
    about = {"format": 1, "task": "causal-lm", "problem": None, "classes": None, "num_outputs": 8}
    about |= {"hidden": hidden, "num_samples": len(keys), "teacher": {"name": "large"}, "precision": "fp32"}
    writer = Writer(folder / "made-up", about | {"data": data}, keys, counts)
    writer.begin()
    for key, count in zip(keys, counts, strict=True):
        writer.put(key, np.zeros((count, 4), dtype=np.float32))
    writer.put_matrix("matrix", torch.zeros(8, 4))
    writer.finish()
    return folder / "made-up"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"prompt": "completion", "completion": "prompt"},
            r"24 of 24 samples have no logits there.*data.prompt was prompt, and is completion; data.compl",
        ),
        (
            {"max_length": 60},
            r"\d of 24 samples have no logits there.*.data.max_length was 48, and is 60.; write",
        ),
        ({"max_length": 40}, "written of samples of up to 48 tokens, and data.max_length is 40"),
        ({"max_length": 40, "too_long": "drop"}, None),
        ({"packing": True}, None),
    ],
)
def test_rows_that_are_read_otherwise_are_refused_with_what_differs(
    changes: dict[str, Any], reason: str | None, student: Path, tmp_path: Path
) -> None:
    """Samples are compared: a key alone is no fault, if those that are left are the same."""
    data = answers(tmp_path)
    logits = made_up(plan_for(student, data, 1, NUM_STEPS), tmp_path)
    changed = plan(student, data | changes, logits=logits)
    if reason is None:
        assert inputs_of(changed, tmp_path).logits is not None
        return
    with pytest.raises((ConfigurationError, DataError), match=reason):
        inputs_of(changed, tmp_path)


def test_another_chat_template_is_refused(student: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    train = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}])
    data = {"train": train, "messages": "messages", "max_length": 48, "num_workers": 1, "date": "2026-11-30"}
    learners = []
    for mark in ("w7", "w8"):
        learners.append(tmp_path / mark)
        shutil.copytree(student, learners[-1])
        words = tokenizer()
        words.chat_template = (
            "{% for m in messages %}" + mark + " {{ m.role }} {{ m.content }} </s> {% endfor %}"
            "{% if add_generation_prompt %}" + mark + " assistant {% endif %}"
        )
        words.save_pretrained(learners[-1])
    logits = made_up(plan_for(learners[0], data, 1, NUM_STEPS), tmp_path)
    assert inputs_of(plan(learners[0], data, logits=logits), tmp_path / "same").logits is not None
    with pytest.raises(
        DataError, match=r"1 of 1 samples .*another tokenizer, chat template or data.max_length"
    ):
        inputs_of(plan(learners[1], data, logits=logits), tmp_path / "other")


def test_a_file_that_changed_after_is_refused(
    student: Path, rows: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    lines = Path(rows["train"]["path"]).read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*reversed(lines), '{"text": "w1 w2 w99 w3"}']) + "\n")
    changed = plan(student, rows | {"train": {"path": str(tmp_path / "train.jsonl")}}, logits=written)
    with pytest.raises(DataError, match=r"1 of 201 samples .* row 200 .the files of data.train have changed"):
        inputs_of(changed, tmp_path)


def test_another_tokenizer_is_refused(
    student: Path, rows: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    """With as many tokens under other numbers, though the rows have none of them."""
    shutil.copytree(student, tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["w0"], words["other"] = words.pop("w119"), words.pop("w0")
    file.write_text(json.dumps(content))
    with pytest.raises(
        ConfigurationError, match="written with another tokenizer: its tokens have other numbers"
    ):
        inputs_of(plan(tmp_path / "student", rows, logits=written), tmp_path)


def _flipped(name: str) -> Callable[[Path], None]:
    def flip(directory: Path) -> None:
        raw = bytearray((directory / name).read_bytes())
        raw[-8] ^= 1
        (directory / name).write_bytes(raw)

    return flip


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flipped("states.npy"), r"states.npy: the logits of row \d+ are not those that were written"),
        (_flipped("ends.npy"), r"states.npy: the logits of row \d+ are not those that were written"),
        (_flipped("matrix.npy"), "matrix.npy: the output matrix is not the one that was written"),
        (lambda path: (path / "matrix.npy").unlink(), "matrix.npy is not there"),
    ],
)
def test_damaged_states_are_refused(
    damage: Callable[[Path], None],
    reason: str,
    student: Path,
    rows: dict[str, Any],
    written: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(written, tmp_path / "logits")
    damage(tmp_path / "logits")
    damaged = plan(student, rows, logits=tmp_path / "logits")
    with pytest.raises(LauncherError, match=reason):
        inputs = inputs_of(damaged, tmp_path)
        assert inputs.logits is not None
        inputs.logits.of([[sample] for sample in samples_of(inputs.train)])
        load_matrix(damaged, str(tmp_path / "logits"))


def test_states_are_not_written_that_no_student_could_use(
    student: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    """Of a head that is not only a matrix, or with tokens under other numbers."""
    own = model_directory(tmp_path / "own", "falcon_h1")
    other = model_directory(tmp_path / "other")
    words = tokenizer()
    words.add_tokens(["<x>"])
    words.save_pretrained(other)
    base = plan_for(student, rows, 1, NUM_STEPS)
    for teacher, reason in (
        (own, "a falcon_h1 model's own head is not only a matrix; name it as distillation.teacher"),
        (other, "its tokenizer is not that of the job's model: '<x>' has the number none in the model's"),
    ):
        [error] = errors_of(asking(base, teacher, tmp_path / "logits", teacher.name + "-run"), 1, entry=write)
        assert isinstance(error, ConfigurationError) and reason in str(error)
        assert not list(tmp_path.glob("logits*"))


def test_a_full_disk_is_told_with_the_size_and_nothing_is_left(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((written / MANIFEST).read_text())
    about = {key: value for key, value in manifest.items() if key not in ("files", "digest")}
    logits = WrittenLogits.open(written)
    assert logits.ends is not None
    writer = Writer(tmp_path / "new", about, logits.keys.tolist(), np.diff(logits.ends, prepend=0).tolist())
    with pytest.raises(StorageError, match="No such file"):
        writer.join()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match=r"No space left on device; it takes \d+ kB"):
            writer.begin()
    assert not list(tmp_path.iterdir())
    assert writer.begin() == 0
