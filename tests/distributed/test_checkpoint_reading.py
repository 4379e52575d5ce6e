from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from launcher.cli.checkpoint import app
from launcher.errors import CheckpointError, ConfigurationError, LauncherError, StorageError
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint import export as exporting
from launcher.training.checkpoint import writing
from launcher.training.checkpoint.export import export
from launcher.training.checkpoint.inspect import describe_tensors, differences
from launcher.training.checkpoint.reader import CheckpointReader, read_metadata
from launcher.training.checkpoint.storage import archive_around
from tests.distributed.checkpoint_world import (
    checkpointer,
    full_tensors,
    make_plan,
    progress,
    run_ranks,
    shard_tensors,
)
from tests.unit.test_checkpoints import check_damage


def save(run: Path, tensors: dict[str, torch.Tensor], step: int = 1, **settings: Any) -> Path:
    run.mkdir(exist_ok=True)
    saver = checkpointer(run, 0, 1, keep_last=9, **settings)
    assert saver.save(tensors, progress(step), {"loss": 1.0 / step}, wait=True)
    (run / "plan.json").write_text(make_plan(1, keep_last=9).to_json())
    return RunDirectory(run).checkpoint(step)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 4), (100_000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_stored_archive_is_what_torch_save_writes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    before, after = archive_around(dtype, shape)
    archive = before + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + after
    expected = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, expected)
    finally:
        torch.serialization.set_crc32_options(True)
    assert archive == expected.getvalue()
    assert torch.equal(torch.load(io.BytesIO(archive), weights_only=True), tensor)
    assert len(before) % 64 == 0 or not tensor.numel()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("target", [_Evil(), {"a": _Evil()}, torch.nn.Linear, eval, np.float64(1)])
def test_a_metadata_pickle_that_names_anything_else_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(target))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        read_metadata(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_metadata_that_is_no_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_metadata(tmp_path)
    for content, reason in [
        (pickle.dumps({"a": 1}), "does not describe"),
        (b"\x80\x04", "garbled"),
        (b"", "garbled"),
    ]:
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            read_metadata(tmp_path)


def test_dcps_own_writer_and_reader_agree_with_ours(tmp_path: Path) -> None:
    directory = save(tmp_path, full_tensors(3))
    ours, theirs = read_metadata(directory), FileSystemReader(directory).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    tensors = full_tensors(4)
    torch.distributed.checkpoint.load(tensors, storage_reader=FileSystemReader(directory), no_dist=True)
    assert all(torch.equal(tensor, full_tensors(3)[name]) for name, tensor in tensors.items())
    torch.distributed.checkpoint.save(full_tensors(5), checkpoint_id=tmp_path / "theirs", no_dist=True)
    reader = CheckpointReader(tmp_path / "theirs")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in full_tensors(5).items())


def test_what_is_not_there_or_does_not_fit_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path, full_tensors(3))
    reader = CheckpointReader(directory)
    with pytest.raises(CheckpointError, match=r"model.none is missing"):
        reader.read("model.none")
    (directory / "__0_0.distcp").write_bytes(bytes(100_000))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: model.norm.weight"):
        CheckpointReader(directory).read("model.norm.weight")
    for info in reader.metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    with pytest.raises(CheckpointError, match="points outside"):
        reader.read("model.norm.weight")


def save_sharded(rank: int, world_size: int, run: Path) -> None:
    for step in (1, 2):
        saver = checkpointer(run, rank, world_size, keep_last=9)
        saver.save(shard_tensors(full_tensors(step), world_size), progress(step), wait=True)


@pytest.mark.slow
def test_two_thousand_damages_to_a_real_checkpoint_are_all_noticed(tmp_path: Path) -> None:
    runs = [tmp_path / "run", tmp_path / "other"]
    for run in runs:
        run_ranks(2, save_sharded, run)
    check_damage(RunDirectory(runs[0]), [RunDirectory(runs[1]).checkpoint(2)], 2000)


def make_model_run(run: Path, tied: bool, dtype: str = "bfloat16") -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).float()
    config.dtype = dtype
    config.save_pretrained(run / "model")
    (run / "model" / "tokenizer.json").write_text("{}")
    (run / "model" / "model.safetensors").write_bytes(b"the weights it started from")
    return model


def as_checkpoint(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    return tensors | {
        f"optimizer.{name}.exp_avg": torch.rand_like(parameter)
        for name, parameter in model.named_parameters()
    }


def save_cut(rank: int, world_size: int, run: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    saver = checkpointer(run, rank, world_size)
    saver.save(
        shard_tensors({name: torch.from_numpy(array) for name, array in tensors.items()}, world_size),
        progress(1),
        wait=True,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 900])
def test_an_exported_model_is_bit_equal(tmp_path: Path, tied: bool, max_shard_bytes: int) -> None:
    model = make_model_run(tmp_path, tied)
    save(tmp_path, as_checkpoint(model))
    result = export(RunDirectory(tmp_path), tmp_path / "out", max_shard_bytes=max_shard_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = dict(model.named_parameters())
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name]), name
    assert result.num_tensors == len(expected)
    assert all((tmp_path / "out" / name).is_file() for name in result.files)
    assert (len(result.files) > 1) == (max_shard_bytes == 900)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (max_shard_bytes == 900)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_sharded_checkpoint_exports_the_same_bytes_as_a_whole_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tensors = {
        name: tensor.detach().clone() for name, tensor in as_checkpoint(make_model_run(whole, True)).items()
    }
    save(whole, tensors)
    run_ranks(3, save_cut, cut, {name: tensor.numpy() for name, tensor in tensors.items()})
    shutil.copytree(whole / "model", cut / "model")
    outs = [export(RunDirectory(run), run / "out").directory / "model.safetensors" for run in (whole, cut)]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_an_export_to_bf16_rounds_and_says_so(tmp_path: Path) -> None:
    model = make_model_run(tmp_path, True, dtype="float32")
    save(tmp_path, as_checkpoint(model))
    export(RunDirectory(tmp_path), tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name


def test_an_export_takes_the_newest_whole_checkpoint_or_the_one_asked_for(tmp_path: Path) -> None:
    model = make_model_run(tmp_path, True)
    for step in (1, 2, 3):
        save(tmp_path, as_checkpoint(model), step)
    (RunDirectory(tmp_path).checkpoint(3) / ".metadata").unlink()
    result = export(RunDirectory(tmp_path), tmp_path / "newest")
    assert result.step == 2 and [stored.step for stored in result.rejected] == [3]
    assert export(RunDirectory(tmp_path), tmp_path / "first", step=1).step == 1
    with pytest.raises(CheckpointError, match=r"step 3: .metadata is missing; the newest good one is step 2"):
        export(RunDirectory(tmp_path), tmp_path / "third", step=3)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        export(RunDirectory(tmp_path), tmp_path / "fourth", step=4)


def test_what_an_export_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(CheckpointError, match="no whole checkpoint yet"):
        export(run, tmp_path / "out")
    save(tmp_path, full_tensors(1))
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        export(run, tmp_path / "out")
    make_model_run(tmp_path, True)
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        export(run, tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_safetensors", full)
    with pytest.raises(StorageError, match="No space left on device; nothing was exported"):
        export(run, tmp_path / "out")
    monkeypatch.undo()
    assert not any("out" in path.name for path in tmp_path.iterdir())
    save(tmp_path, {"optimizer.a": torch.zeros(1)}, 2)
    with pytest.raises(CheckpointError, match="holds no tensor of a model"):
        export(run, tmp_path / "out")
    save(tmp_path, {"model.a": torch.zeros(1, dtype=torch.complex64)}, 3)
    with pytest.raises(ConfigurationError, match="safetensors has no such dtype"):
        export(run, tmp_path / "out")


def test_a_number_beyond_float16_is_not_written_as_infinity(tmp_path: Path) -> None:
    make_model_run(tmp_path, True)
    run, infinite = RunDirectory(tmp_path), float("inf")
    save(tmp_path, {"model.a": torch.tensor([1.0, -70000.0, infinite])})
    with pytest.raises(
        ConfigurationError, match="a has a number of the size 70000, and float16 ends at 65504"
    ):
        export(run, tmp_path / "out", dtype="float16")
    assert not any("out" in path.name for path in tmp_path.iterdir())
    export(run, tmp_path / "out", dtype="bfloat16")
    save(tmp_path, {"model.a": torch.tensor([1.0, -65000.0, infinite])}, 2)
    export(run, tmp_path / "other", dtype="float16")
    written = load_file(tmp_path / "other" / "model.safetensors")["a"]
    assert torch.equal(written, torch.tensor([1.0, -65000.0, infinite], dtype=torch.float16))


def test_differences_are_measured(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    first = save(
        tmp_path,
        {
            "a": torch.tensor([1.0, nan, 2.0]),
            "b": torch.zeros(2),
            "c": torch.zeros(2),
            "d": torch.tensor([nan]),
        },
    )
    second = save(
        tmp_path,
        {
            "a": torch.tensor([1.0, nan, 2.5]),
            "c": torch.zeros(3),
            "d": torch.tensor([1.0]),
            "e": torch.zeros(1),
            "b": torch.zeros(2),
        },
        2,
    )
    found = {
        entry.name: (entry.status, entry.max_absolute, entry.max_relative)
        for entry in differences(first, second)
    }
    assert found == {
        "a": ("different", 0.5, 0.2),
        "b": ("equal", 0.0, 0.0),
        "c": ("other shape", 0.0, 0.0),
        "d": ("different", inf, inf),
        "e": ("only second", 0.0, 0.0),
    }
    assert {entry.status for entry in differences(second, first) if entry.name == "e"} == {"only first"}
    first_tensor = describe_tensors(first)[0]
    assert (
        first_tensor.name,
        first_tensor.shape,
        first_tensor.dtype,
        first_tensor.num_bytes,
        first_tensor.num_pieces,
    ) == ("a", (3,), "float32", 12, 1)


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, LauncherError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands_show_the_same_as_json(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, full_tensors(step), step)
    listed = json.loads(call("list", tmp_path, "--json"))["checkpoints"]
    assert [entry["step"] for entry in listed] == [1, 2, 3] and listed[0]["metrics"] == {"loss": 1.0}
    assert "loss 0.5" in call("list", tmp_path)
    inspected = json.loads(call("inspect", tmp_path, "--checkpoint", 2, "--json"))
    assert inspected["step"] == 2 and {t["name"]: t["shape"] for t in inspected["tensors"]}["model.cube"] == [
        4,
        3,
        2,
    ]
    assert "4 x 3 x 2" in call("inspect", tmp_path)
    compared = json.loads(call("diff", tmp_path, 1, 2, "--json"))["tensors"]
    assert {entry["status"] for entry in compared} == {"different"}
    assert call("diff", tmp_path, 1, 2).startswith("0 of ")
    assert "tensors are equal to the bit" in call("diff", tmp_path, 1, 1)
    assert {p["problems"] == [] for p in json.loads(call("verify", tmp_path, "--json"))["checkpoints"]} == {
        True
    }
    os.truncate(RunDirectory(tmp_path).checkpoint(3) / ".metadata", 3)
    assert "has 3 bytes" in call("verify", tmp_path, code=6)
    assert "whole" in call("verify", tmp_path, "--checkpoint", 2)
    assert "has 3 bytes" in call("list", tmp_path)
    with pytest.raises(CheckpointError, match="has 3 bytes"):
        call("inspect", tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint of step 7; there is 1, 2, 3"):
        call("inspect", tmp_path, "--checkpoint", 7)


def test_pruning_by_command(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, {"model.a": torch.zeros(1)}, step)
    (tmp_path / "checkpoints" / ".attempt-00000004-x").mkdir()
    assert json.loads(call("prune", tmp_path, "--json")) == {
        "removed": [],
        "leftovers": [".attempt-00000004-x"],
        "dry_run": False,
    }
    assert "would remove: step-00000001, step-00000002" in call(
        "prune", tmp_path, "--keep-last", 1, "--dry-run"
    )
    assert json.loads(
        call("prune", tmp_path, "--keep-last", 1, "--keep-best", 1, "--metric", "accuracy", "--json")
    )["removed"] == [1, 2]
    assert "removed: nothing" in call("prune", tmp_path, "--keep-last", 1)


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(make_plan(1).to_json())
    assert "no checkpoints yet" in call("list", tmp_path)
    assert json.loads(call("list", tmp_path, "--json")) == {"checkpoints": []}
    for command in ("inspect", "verify"):
        with pytest.raises(CheckpointError, match="has no checkpoint yet"):
            call(command, tmp_path)


def direct_is_possible(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EFAULT])
def test_a_file_system_that_will_not_write_past_its_cache_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    tensors = {f"model.{number}": torch.randn(1000, 1500) for number in range(3)}
    usual = save(tmp_path / "usual", tensors)
    original, refused = os.write, []

    def refuse(descriptor: int, data: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(error, os.strerror(error))
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)
    careful = save(tmp_path / "careful", tensors)
    assert (careful / "__0_0.distcp").read_bytes() == (usual / "__0_0.distcp").read_bytes()
    monkeypatch.setattr(writing, "_set_direct", lambda descriptor, wanted: False)
    plain = save(tmp_path / "plain", tensors)
    assert (plain / "__0_0.distcp").read_bytes() == (usual / "__0_0.distcp").read_bytes()
    with open(tmp_path / "probe", "wb") as probe:
        assert bool(refused) == direct_is_possible(probe.fileno())
