"""From a checkpoint to a Hugging Face model directory, streamed: never more than one tensor in memory."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import torch
from typing_extensions import Buffer

from launcher.errors import CheckpointError, ConfigurationError, Problem, StorageError
from launcher.runs.checkpoints import Stored, look, newest_valid, verify
from launcher.runs.layout import RunDirectory
from launcher.runs.retention import sync_directory
from launcher.training.checkpoint.reader import CheckpointReader

ExportDtype = Literal["keep", "float32", "bfloat16", "float16"]

_PREFIX = "model."
_SLICE_BYTES = 64 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the exported model."""

    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.stored_name.removeprefix(_PREFIX)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and the checkpoints that were passed over on the way."""

    directory: Path
    step: int
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    rejected: tuple[Stored, ...] = ()


def export(
    run: RunDirectory, out: Path, step: int | None = None, dtype: ExportDtype = "keep", max_shard_bytes: int = 5_000_000_000
) -> Exported:
    """Write the model of the newest whole checkpoint, or of `step`'s, as safetensors with config and tokenizer.

    Raises ConfigurationError where `out` is in use, CheckpointError where there is no whole checkpoint, StorageError where the
    disk does not take it. `out` appears at once and whole, or not at all.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(Problem("--out", str(out), "exists and is not an empty directory; name a new one"))
    chosen, rejected = choose(run, step)
    model_files = _model_files(run)
    reader = CheckpointReader(chosen.directory)
    shards = _shards(_entries(reader, dtype), max_shard_bytes)
    temporary = out.with_name(f".{out.name}.export-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        files = _write_shards(temporary, reader, shards)
        for source in model_files:
            shutil.copyfile(source, temporary / source.name)
        _set_dtype(temporary / "config.json", shards)
        sync_directory(temporary)
        temporary.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; nothing was exported") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    entries = [entry for shard in shards for entry in shard]
    return Exported(out, chosen.step, len(entries), sum(entry.num_bytes for entry in entries), tuple(files), rejected)


def choose(run: RunDirectory, step: int | None) -> tuple[Stored, tuple[Stored, ...]]:
    """A whole checkpoint: the newest, or `step`'s; and those passed over. Raises CheckpointError."""
    if step is None:
        choice = newest_valid(run)
        if choice.chosen is None:
            reasons = "; ".join(f"{stored.name}: {', '.join(stored.problems)}" for stored in choice.rejected)
            raise CheckpointError(f"{run.path.name} has no whole checkpoint" + (f" ({reasons})" if reasons else " yet"))
        return choice.chosen, choice.rejected
    problems = verify(run.checkpoint(step), run.run_id()) if run.checkpoint(step).is_dir() else ["there is no such checkpoint"]
    if problems:
        newest = newest_valid(run).chosen
        instead = f"the newest good one is step {newest.step}" if newest else "no other checkpoint is whole"
        raise CheckpointError(f"step {step}: {'; '.join(problems)}; {instead}")
    return look(run.checkpoint(step), run.run_id()), ()


def _model_files(run: RunDirectory) -> list[Path]:
    directory = run.path / "model"
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no config.json: the run never got as far as preparing its model")
    return [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES)]


def _entries(reader: CheckpointReader, dtype: ExportDtype) -> list[Entry]:
    entries = []
    for name in reader.names:
        if name.startswith(_PREFIX):
            described = reader.describe(name)
            stored = described.properties.dtype
            target = getattr(torch, dtype) if dtype != "keep" and stored.is_floating_point else stored
            if target not in _SAFETENSORS_NAMES:
                raise ConfigurationError(Problem(name, str(target), "safetensors has no such dtype"))
            entries.append(Entry(name, tuple(described.size), target))
    if not entries:
        raise CheckpointError(f"{reader.directory} holds no tensor of a model")
    return entries


def _shards(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    # The widest first keeps every tensor aligned in a memory map of the file.
    return [sorted(shard, key=lambda entry: (-entry.dtype.itemsize, entry.name)) for shard in shards]


def _write_shards(directory: Path, reader: CheckpointReader, shards: list[list[Entry]]) -> list[str]:
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "wb") as file:
            _write_safetensors(file, reader, shard)
            file.flush()
            os.fsync(file.fileno())
    if count == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return names


def _write_safetensors(file: BinaryIO, reader: CheckpointReader, entries: list[Entry]) -> None:
    """The format by hand, as the library's own writer needs all tensors of a file in memory at once."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": _SAFETENSORS_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for entry in entries:
        for piece in _pieces(reader, entry.stored_name):
            converted = piece.to(entry.dtype).contiguous().view(-1).view(torch.uint8)
            file.write(memoryview(cast(Buffer, converted.numpy())))


def _pieces(reader: CheckpointReader, name: str) -> Iterator[torch.Tensor]:
    """A tensor's elements in row-major order, in flat slices: straight from the file where it is cut along its first dimension."""
    described = reader.describe(name)
    chunks = sorted((chunk for chunk in described.chunks if chunk.sizes.numel()), key=lambda chunk: tuple(chunk.offsets))
    by_rows = all(chunk.sizes[1:] == described.size[1:] for chunk in chunks)
    wholes = (reader.piece(name, chunk) for chunk in chunks) if by_rows else iter([reader.read(name)])
    for whole in wholes:
        yield from whole.reshape(-1).split(_SLICE_BYTES // whole.element_size())


def _set_dtype(config_file: Path, shards: list[list[Entry]]) -> None:
    """Say in config.json what the weights are, as `from_pretrained` loads them in the dtype that stands there."""
    floating = [entry for shard in shards for entry in shard if entry.dtype.is_floating_point]
    if not floating:
        return
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(max(floating, key=lambda entry: entry.num_bytes).dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
