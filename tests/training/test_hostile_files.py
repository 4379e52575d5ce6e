"""Checkpoints and models that somebody has tampered with: nothing of them runs, and each is named by its
class."""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import shutil
import stat
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from launcher.errors import CheckpointError, ConfigurationError
from launcher.runs.checkpoints import MANIFEST_NAME, Progress, _canonical, _text_hash, hash_file
from launcher.runs.error_class import classify
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.foreign.common import read_file
from launcher.training.checkpoint.reader import CheckpointReader, read_metadata
from launcher.training.signals import StopRequest
from launcher.training.state import TrainerState
from tests.training.plans import plan_of
from tests.training.runs import causal_data, finish, model_directory, new_run, plan_for, start

pytestmark = pytest.mark.distributed


def class_attribute_pickle(name: str) -> bytes:
    """A pickle that sets an attribute of an allowed class, as an attacker writes it: the class, a state of
    (None, slots), BUILD."""
    out = io.BytesIO()
    out.write(b"\x80\x04" + f"ctorch.distributed.checkpoint.metadata\n{name}\n".encode())
    out.write(b"N}X\x04\x00\x00\x00hackX\x03\x00\x00\x00yess\x86b.")
    return out.getvalue()


@pytest.mark.parametrize(
    "name", ["TensorStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING"]
)
def test_a_pickle_sets_no_attribute_of_a_class(name: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(class_attribute_pickle(name))
    with pytest.raises(CheckpointError):
        read_metadata(tmp_path)
    from torch.distributed.checkpoint import metadata

    assert not hasattr(getattr(metadata, name), "hack")


class _Calls:
    """Pickled as a call of something with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "payload", [_Calls(os.system, "true"), _Calls(eval, "1"), _Calls(TensorStorageMetadata, 1, 2, 3)]
)  # type: ignore[attr-defined]
def test_a_pickle_calls_nothing_that_no_checkpoint_needs(payload: _Calls, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match=r"refused unread|only ever filled in|garbled"):
        read_metadata(tmp_path)


class _OldPickler(pickle.Pickler):
    """As Python before 3.11.4 writes members of enumerations."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(tmp_path: Path) -> None:
    properties = TensorProperties.create_from_tensor(torch.zeros(4))
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    tensor = TensorStorageMetadata(properties, torch.Size([4]), [chunk])
    with (tmp_path / ".metadata").open("wb") as file:
        place = {MetadataIndex("weight", torch.Size([0])): _StorageInfo("__0_0.distcp", 0, 16)}
        _OldPickler(file, protocol=4).dump(Metadata({"weight": tensor}, storage_data=place))
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert read_metadata(tmp_path).state_dict_metadata == {"weight": tensor}


def test_a_deepspeed_file_of_an_older_python_is_read(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    old = types.SimpleNamespace(__name__="pickle", Pickler=_OldPickler)
    for stage in ZeroStageEnum:
        torch.save({"zero_stage": stage}, tmp_path / "old.pt", pickle_module=old)
        assert b"getattr" in (tmp_path / "old.pt").read_bytes()
        assert read_file(tmp_path / "old.pt") == {"zero_stage": int(stage)}
    for other in (_Calls(getattr, ZeroStageEnum, "mro"), _Calls(getattr, "", "weights")):
        torch.save({"zero_stage": other}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=r"names builtins\.getattr, which no checkpoint needs"):
            read_file(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "payload",
    [
        _Calls(getattr, _MEM_FORMAT_ENCODING, "__class__"),
        _Calls(getattr, _MEM_FORMAT_ENCODING, "mro"),
        _Calls(getattr, TensorProperties, "create_from_tensor"),
        _Calls(getattr, TensorProperties, "TORCH_CHANNELS_LAST"),
        _Calls(getattr, "", "TORCH_CHANNELS_LAST"),
    ],
)
def test_a_pickle_gets_no_other_attribute(payload: _Calls, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match=r"names the attribute .* which no checkpoint needs"):
        read_metadata(tmp_path)


def private(rank: int, stop: StopRequest) -> None:
    """A hook: as a rank that inherits such a umask. The tests' ranks are forks of a process that has its own."""
    os.umask(0o077)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of two steps on one rank, with a checkpoint of each, under a umask that lets nobody else in."""
    folder = tmp_path_factory.mktemp("hostile")
    model, data = model_directory(folder / "model"), causal_data(folder / "data")
    before = os.umask(0o077)
    try:
        run = new_run(folder / "run", plan_for(model, data, 1, num_steps=2, checkpoint={"every": 1}))
        finish(run, 1, private)
    finally:
        os.umask(before)
    return run


def test_what_the_ranks_write_is_as_private_as_the_umask_says(trained: RunDirectory) -> None:
    kept = [
        path for path in trained.path.rglob("*") if not path.name.startswith("rank-")
    ]  # the test's own log of its ranks
    assert any(path.suffix == ".distcp" for path in kept)
    assert {str(path) for path in kept if stat.S_IMODE(path.stat().st_mode) & 0o077} == set()


@pytest.fixture
def tampered(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of that run, to tamper with; its plan asks for two steps more."""
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    run.finished_file.unlink(missing_ok=True)
    return run


def sign(run: RunDirectory, **changes: Any) -> None:
    """Write other content into the newest manifest, with the right hashes of everything."""
    path = run.checkpoint(2) / MANIFEST_NAME
    content = json.loads(path.read_text())
    content.pop("manifest_xxh3_128")
    for name, record in content["files"].items():
        file = path.parent / name
        record.update(bytes=file.stat().st_size, xxh3_128=hash_file(file))
    content["progress"].update(changes)
    path.write_text(_canonical({**content, "manifest_xxh3_128": _text_hash(content)}))


@pytest.mark.parametrize(
    "extra",
    [{}, {"loss_scale": "x", "good_steps": 0}, {"loss_scale": 1.0, "good_steps": -1},
    {"loss_scale": None, "good_steps": None},
     {"loss_scale": float("nan"), "good_steps": 0},
     {"loss_scale": 1.0, "good_steps": 0, "metrics": {"loss": "x"}}],
)  # fmt: skip
def test_a_manifest_of_another_trainer_is_of_the_class_checkpoint(extra: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"step-2: the state in manifest.json .* move the checkpoint away"
    ):
        TrainerState.of(Progress(step=2, samples=8, tokens=9, extra=extra), "step-2")


def test_a_run_with_such_a_manifest_ends_with_that_class(tampered: RunDirectory) -> None:
    sign(tampered, extra={})
    (error,) = start(tampered, 1).errors()
    assert (
        error is not None
        and classify(error)[0] is CheckpointError
        and "loss_scale: field required" in str(error)
    )


def test_a_description_that_lies_is_of_the_class_checkpoint(trained: RunDirectory, tmp_path: Path) -> None:
    metadata = read_metadata(trained.checkpoint(2))
    name = next(name for name in metadata.state_dict_metadata if name.startswith("model."))
    tensor = metadata.state_dict_metadata[name]
    assert isinstance(tensor, TensorStorageMetadata) and tensor.chunks
    chunk = tensor.chunks[0]

    def read_with(**changes: Any) -> None:
        lies = Metadata(
            state_dict_metadata=dict(metadata.state_dict_metadata), storage_data=dict(metadata.storage_data)
        )
        lies.state_dict_metadata[name] = TensorStorageMetadata(
            tensor.properties, changes.get("size", tensor.size), changes.get("chunks", tensor.chunks)
        )
        if "info" in changes:
            lies.storage_data[MetadataIndex(name, chunk.offsets)] = changes["info"]
        (tmp_path / ".metadata").write_bytes(pickle.dumps(lies))
        with pytest.raises(CheckpointError):
            CheckpointReader(tmp_path).read(name)

    read_with(chunks=[])
    read_with(chunks=[*tensor.chunks, *tensor.chunks])
    read_with(size=torch.Size([10**12, 10**6]))
    read_with(info="nowhere")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=[], storage_data={})))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="it is something else"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "what", ["payload", "cut pickle", "cut safetensors", "garbled safetensors", "no pickle"]
)
def test_weights_that_are_no_weights_are_named_in_plain_words(what: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.training.model.loading import load

    model = model_directory(tmp_path / "model")
    safe, unsafe = model / "model.safetensors", model / "pytorch_model.bin"
    if "safetensors" in what:
        content = safe.read_bytes()
        safe.write_bytes(
            content[: len(content) // 2] if what == "cut safetensors" else b"\xff" * 64 + content
        )
    else:
        safe.unlink()
        torch.save(
            {"lm_head.weight": _Calls(os.system, f"touch {tmp_path}/PWNED")}
            if what == "payload"
            else {"a": torch.zeros(999)},
            unsafe,
        )
        if what == "cut pickle":
            os.truncate(unsafe, unsafe.stat().st_size // 2)
        if what == "no pickle":
            unsafe.write_bytes(b"<html>not found</html>")
    plan = plan_of(model)
    with pytest.raises(ConfigurationError, match=r"model\.name") as caught:
        load(plan, AutoModelForCausalLM, AutoConfig.from_pretrained(model), lambda model: model)
    assert "weights_only" not in str(caught.value) and "arbitrary code" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()
