"""Checkpoints that real DeepSpeed and real Accelerate wrote become ours, tensor by tensor, and training goes
on from them."""

from __future__ import annotations

import functools
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.errors import CheckpointError, ConfigurationError, StorageError
from launcher.planner.plan import Plan
from launcher.runs.checkpoints import list_checkpoints, verify
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.foreign import import_run
from tests.commands import launcher
from tests.distributed.foreign_world import LEARNING_RATE, accelerate_writes, deepspeed_writes, goes_on
from tests.tiers import slow_but
from tests.training.plans import deepspeed
from tests.training.ranks import on_ranks
from tests.training.runs import batch_of, causal_data, model_directory, named, new_run, plan_for, state

pytestmark = pytest.mark.distributed

Writer = Callable[..., Any]
FP16 = {"enabled": True, "initial_scale_power": 4}
WRITERS: dict[str, tuple[int, Writer]] = {
    "zero1": (2, functools.partial(deepspeed_writes, stage=1)),
    "zero1 bf16": (
        2,
        functools.partial(
            deepspeed_writes, stage=1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}
        ),
    ),
    "zero2 fp16": (2, functools.partial(deepspeed_writes, stage=2, fp16=FP16)),
    "zero2 frozen": (2, functools.partial(deepspeed_writes, stage=2, frozen="layers.0")),
    "zero3": (2, functools.partial(deepspeed_writes, stage=3, zero={"sub_group_size": 5000})),
    "zero3 bf16 frozen": (
        3,
        functools.partial(deepspeed_writes, stage=3, frozen="layers.0", bf16={"enabled": True}),
    ),
    "sharded": (2, accelerate_writes),
    "full": (2, functools.partial(accelerate_writes, kind="FULL_STATE_DICT")),
}
WRITERS["zero2 round robin"] = (
    2,
    functools.partial(deepspeed_writes, stage=2, zero={"round_robin_gradients": True}),
)
FROZEN = {"model__freeze": ("*layers.0.*",)}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="session")
def model(directory: Path) -> Path:
    """A llama whose embeddings are tied; 131 rows of 48 divide by few numbers."""
    return model_directory(directory / "model")


@pytest.fixture(scope="session")
def written(
    directory: Path, model: Path
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor], list[float]]]:
    """A checkpoint by its name in WRITERS, written once; its tensors, and the losses of the steps after it."""

    @functools.cache
    def write(name: str) -> tuple[Path, dict[str, torch.Tensor], list[float]]:
        if name.startswith("zero"):
            pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
        world_size, writer = WRITERS[name]
        out = directory / name.replace(" ", "-")
        (said, losses), *_ = on_ranks(world_size, writer, model, out)
        return out, said, losses

    return write


def plan(model: Path, world_size: int = 2, **changes: Any) -> Plan:
    data = {"train": {"path": "train.jsonl"}, "text": "text"}
    training = {"learning_rate": LEARNING_RATE} | changes.pop("training", {})
    return plan_for(
        model, data, world_size, training=training, batch=batch_of(world_size, 4 // world_size), **changes
    )


def imported(
    path: Path, source: Path, chosen: Plan, samples: int | None = None
) -> tuple[RunDirectory, import_run.Prepared]:
    run = new_run(path / "run", chosen)
    prepared = import_run.prepare(source, chosen, samples)
    with run.lock():
        import_run.write(run, chosen, prepared)
    return run, prepared


# DeepSpeed's own functions give another parameter's values where gradients go round robin: there the next
# steps are the test.
@pytest.mark.parametrize(
    "name",
    slow_but(
        ["sharded", "full"],
        [name for name in WRITERS if name != "zero2 round robin"],
        ["zero1", "zero1 bf16"],
    ),
)
def test_every_tensor_is_what_its_writer_said(name: str, model: Path, written: Any, tmp_path: Path) -> None:
    """Parameters are the fp32 masters, not the 16-bit copies; and the checkpoint is whole by every byte."""
    source, said, _ = written(name)
    run, prepared = imported(tmp_path, source, plan(model, **(FROZEN if "frozen" in name else {})))
    [stored] = list_checkpoints(run)
    assert verify(stored.directory, run.run_id()) == [] and stored.step == prepared.step == 3
    ours = state(run)
    assert ours.pop("optimizer.step") == 3
    assert ours.keys() == said.keys()
    for key, value in said.items():
        assert ours[key].dtype == torch.float32 and torch.equal(ours[key], value.view_as(ours[key])), key
    if "16" in name:
        assert not torch.equal(
            ours["model.model.norm.weight"], ours["model.model.norm.weight"].bfloat16().float()
        )


@pytest.mark.parametrize(
    "name", slow_but(["sharded"], ["zero1", "zero2 fp16", "zero2 round robin", "zero3", "sharded"])
)
def test_the_next_steps_are_those_that_its_writer_took(
    name: str, model: Path, written: Any, tmp_path: Path
) -> None:
    """Two steps: the loss of the first shows the parameters, that of the second the moments and the
    optimizer's step."""
    source, _, losses = written(name)
    chosen = plan(model)
    run, _ = imported(tmp_path, source, chosen)
    ours, _ = on_ranks(2, goes_on, run, chosen)
    torch.testing.assert_close(
        torch.tensor(ours), torch.tensor(losses), rtol=2e-3 if "16" in name else 1e-5, atol=0
    )


@pytest.mark.slow
def test_deepspeed_goes_on_with_what_accelerate_wrote(model: Path, written: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    source, _, losses = written("sharded")
    chosen = plan(model, **deepspeed(3))
    run, _ = imported(tmp_path, source, chosen)
    ours, _ = on_ranks(2, goes_on, run, chosen)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-5, atol=0)


def job_file(directory: Path, model: Path) -> Path:
    directory.mkdir()
    content = {
        "name": "taken-in",
        "model": {"name": str(model), "task": "causal-lm"},
        "data": causal_data(directory / "data"),
        "batch": {"global_batch_size": 4},
        "training": {
            "max_steps": 5,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": 0.0,
        },
        "precision": "fp32",
        "cluster": {"gpus_per_node": 0},
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.slow
def test_from_a_job_to_a_run_that_goes_on(model: Path, written: Any, tmp_path: Path) -> None:
    """The commands: taken in, listed, run to the end; a second import into the same run is refused."""
    source, *_ = written("sharded")
    job, run = job_file(tmp_path / "job", model), tmp_path / "run"
    begin = ("checkpoint", "import", str(source), "--job", str(job), "--run-dir", str(run), "--nproc", "1")
    done = launcher(*begin)
    assert done.returncode == 0, done.stderr
    assert (
        "88 tensors" in done.stdout
        and "step 3" in done.stdout
        and "assumed: 3 steps x 4 = 12 samples" in done.stdout
    )
    went_on = launcher("run", str(job), "--run-dir", str(run), "--nproc", "1")
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    opened = RunDirectory(run)
    assert [record["step"] for record in named(opened, "imported")] == [3]
    assert [record["step"] for record in named(opened, "resumed")] == [3]
    assert [record["step"] for record in named(opened, "evaluated")] == [3, 5]
    for arguments in (begin, ("checkpoint", "import", str(source), str(run))):
        refused = launcher(*arguments)
        assert refused.returncode == 2 and "run" in refused.stderr and refused.stderr.count("\n") == 1, (
            refused.stderr
        )


def test_a_refused_import_begins_no_run(model: Path, written: Any, tmp_path: Path) -> None:
    """Else `launcher run` would train from the start, in silence."""
    job, run = job_file(tmp_path / "job", model), tmp_path / "run"
    done = launcher(
        "checkpoint", "import", str(tmp_path), "--job", str(job), "--run-dir", str(run), "--nproc", "1"
    )
    assert done.returncode == 6 and "holds no checkpoint of DeepSpeed or of Accelerate" in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("arguments", [(), ("run", "--job", "job.yaml"), ("run", "--nproc", "2")])
def test_a_run_or_a_job(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = launcher("checkpoint", "import", str(tmp_path), *arguments)
    assert done.returncode == 2 and "RUN" in done.stderr, done.stderr


def test_samples_say_where_the_run_goes_on(model: Path, written: Any, tmp_path: Path) -> None:
    source, *_ = written("sharded")
    chosen = plan(model)
    run, prepared = imported(tmp_path, source, chosen, samples=8)
    assert (prepared.step, prepared.progress.samples, prepared.optimizer_step) == (2, 8, 3)
    assert "goes on at step 2" in prepared.notes[0]
    assert state(run)["optimizer.step"] == 3
    with pytest.raises(ConfigurationError, match="no whole number of steps of 4 samples; 8 or 12 is"):
        import_run.prepare(source, chosen, samples=9)


def test_other_settings_are_named(model: Path, written: Any) -> None:
    source, *_ = written("full")
    notes = import_run.prepare(
        source, plan(model, training={"epsilon": 1e-6, "betas": (0.8, 0.9), "weight_decay": 0.1})
    ).notes
    text = "\n".join(notes)
    for part in (
        "eps was 1e-08 and is 1e-06",
        "betas was (0.9, 0.999) and is (0.8, 0.9)",
        "weight_decay was 0 and is 0.1",
    ):
        assert part in text, text
    assert len(import_run.prepare(source, plan(model, training={"weight_decay": 0.0})).notes) == 1


@pytest.fixture
def copied(written: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of one's own to break."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(written(name)[0], tmp_path / "source"))

    return copy


def refused(source: Path, chosen: Plan, match: str, error: type[Exception] = CheckpointError) -> None:
    """In one line, by `prepare`: before anything is written."""
    with pytest.raises(error, match=match) as caught:
        import_run.prepare(source, chosen)
    assert "\n" not in str(caught.value)


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_nothing_in_deepspeeds_files_is_executed(file: str, copied: Any, model: Path, tmp_path: Path) -> None:
    source = copied("zero1")
    path = source / "global_step3" / file
    content = torch.load(path, weights_only=False)
    torch.save(content | {"extra": Evil(tmp_path / "was here")}, path)
    refused(source, plan(model), r"names (posix|os)\.mkdir, which no checkpoint needs; it is refused")
    assert not (tmp_path / "was here").exists()


def test_nothing_in_accelerates_files_is_executed(copied: Any, model: Path, tmp_path: Path) -> None:
    source = copied("sharded")
    (source / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "was here")))
    refused(source, plan(model), r"names (posix|os)\.mkdir, which no checkpoint needs")
    assert not (tmp_path / "was here").exists()


BREAKS: dict[str, tuple[str, str, str]] = {
    "optimizer file cut off": (
        "zero1",
        "cut global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "is cut off or garbled",
    ),
    "model file cut off": ("zero1", "cut global_step3/mp_rank_00_model_states.pt", "is cut off or garbled"),
    "first rank missing": (
        "zero1",
        "remove global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "optim_states.pt of rank 0 is missing",
    ),
    "last rank missing": (
        "zero1",
        "remove global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "written on 2 ranks, and the files of 1",
    ),
    "model missing": (
        "zero1",
        "remove global_step3/mp_rank_00_model_states.pt",
        "model_states.pt of rank 0 is missing",
    ),
    "stage 3 model missing": (
        "zero3",
        "remove global_step3/zero_pp_rank_1_mp_rank_00_model_states.pt",
        "holds 1 .*model_states.pt",
    ),
    "tag missing": ("zero1", "write latest global_step9", "names global_step9, which is missing"),
    "tag outside": ("zero1", "write latest ../elsewhere", "no directory beside it"),
    "not torch": (
        "zero1",
        "write global_step3/mp_rank_00_model_states.pt hello",
        "cut off or garbled|refused",
    ),
    "shard cut off": ("sharded", "cut pytorch_model_fsdp_0/__1_0.distcp", "__1_0.distcp is cut off"),
    "shard missing": ("sharded", "remove optimizer_0/__0_0.distcp", "__0_0.distcp is missing"),
    "metadata missing": ("sharded", "remove optimizer_0/.metadata", "metadata"),
    "no optimizer": (
        "sharded",
        "remove optimizer_0",
        "holds no state of an optimizer; to begin with its weights alone",
    ),
    "no optimizer file": ("full", "remove optimizer.bin", "holds no state of an optimizer"),
}


@pytest.mark.parametrize(
    "name",
    slow_but([name for name, (kind, *_) in BREAKS.items() if kind in ("sharded", "full")], list(BREAKS)),
)
def test_what_is_not_whole_is_refused(name: str, copied: Any, model: Path) -> None:
    kind, action, match = BREAKS[name]
    source = copied(kind)
    verb, target, *words = action.split(" ")
    path = source / target
    if verb == "cut":
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif verb == "write":
        path.write_text(words[0])
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    refused(source, plan(model), match)


@pytest.mark.slow
def test_files_of_two_saves_are_refused(copied: Any, model: Path, written: Any) -> None:
    source = copied("zero1")
    other = written("zero3")[0] / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(other, source / "global_step3" / other.name)
    refused(source, plan(model), "not of one save")


@pytest.mark.parametrize("name", slow_but(["sharded"], ["zero1", "sharded"]))
def test_another_model_is_refused(name: str, written: Any, tmp_path: Path) -> None:
    source = written(name)[0]
    refused(
        source,
        plan(model_directory(tmp_path / "deep", num_hidden_layers=4)),
        "lacks model.layers.3.* and 5 more",
    )
    refused(
        source,
        plan(model_directory(tmp_path / "shallow", num_hidden_layers=2)),
        "has model.layers.2.*which the model does not",
    )
    refused(
        source,
        plan(model_directory(tmp_path / "wide", intermediate_size=96)),
        r"9 tensors have another shape.*\(80, 48\) there and \(96, 48\)",
    )
    refused(
        source,
        plan(model_directory(tmp_path / "gpt2", "gpt2")),
        "is not of GPT2LMHeadModel.*lacks transformer",
    )


def test_another_optimizer_is_refused(written: Any, model: Path) -> None:
    source = written("sharded")[0]
    refused(
        source,
        plan(model, training={"optimizer": "sgd"}),
        "kept exp_avg, exp_avg_sq, and training.optimizer=sgd needs momentum_buffer",
    )


@pytest.mark.slow
def test_what_was_frozen_there_is_frozen_here(written: Any, model: Path) -> None:
    refused(
        written("zero3 bf16 frozen")[0],
        plan(model),
        "has no exp_avg of model.layers.0.* name them in model.freeze",
    )


def test_tied_names_with_two_values_are_refused(copied: Any, model: Path) -> None:
    source = copied("full")
    content = torch.load(source / "pytorch_model_fsdp.bin", weights_only=True)
    torch.save(
        content | {"lm_head.weight": content["model.embed_tokens.weight"] + 1},
        source / "pytorch_model_fsdp.bin",
    )
    refused(source, plan(model), "are one parameter in the model, and two with different values")


def test_names_of_wrappers_are_left_out(copied: Any, model: Path) -> None:
    source = copied("full")
    content = torch.load(source / "pytorch_model_fsdp.bin", weights_only=True)
    renamed = {
        re.sub(r"layers\.(\d)\.", r"layers.\1._orig_mod._checkpoint_wrapped_module.", f"module.{key}"): value
        for key, value in content.items()
    }
    torch.save(renamed, source / "pytorch_model_fsdp.bin")
    assert len(import_run.prepare(source, plan(model)).tensors) == 88


def test_a_full_disk_leaves_nothing_behind(
    written: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(model)
    run, prepared = new_run(tmp_path / "run", chosen), import_run.prepare(written("sharded")[0], chosen)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(import_run, "write_hashed", full)
    with pytest.raises(StorageError, match="No space left"):
        import_run.write(run, chosen, prepared)
    assert list(run.checkpoints.iterdir()) == []
