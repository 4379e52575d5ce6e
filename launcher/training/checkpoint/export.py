"""Export of a checkpoint as a Hugging Face model directory, with one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from typing_extensions import Buffer

from launcher.errors import CheckpointError, ConfigurationError, Problem, StorageError
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.checkpoints import Stored as StoredCheckpoint
from launcher.runs.checkpoints import list_checkpoints, look, newest_valid, verify
from launcher.runs.layout import RunDirectory, sync_directory
from launcher.runs.sharing import set_umask
from launcher.training.checkpoint.adapter_weights import Alone, Merged
from launcher.training.checkpoint.card import Card
from launcher.training.checkpoint.one_head import OneHead, heads_of
from launcher.training.checkpoint.reader import CheckpointReader
from launcher.training.checkpoint.weights import SAFETENSORS_NAMES, Entry, ExportDtype, Mean, Stored, Weights
from launcher.training.model.model_files import EVALUATION, kept


@dataclass(frozen=True)
class Exported:
    """The result of an export, and the damaged checkpoints that it skipped."""

    directory: Path
    step: int
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    rejected: tuple[StoredCheckpoint, ...] = ()
    is_merged: bool = False
    """Whether the run's adapter was merged into the weights."""


def export(
    run: RunDirectory,
    out: Path,
    step: int | None = None,
    dtype: ExportDtype = "keep",
    max_shard_bytes: int = 5_000_000_000,
    adapter: bool = False,
    ema: bool = False,
    last: int = 1,
) -> Exported:
    """Write the model of the newest complete checkpoint, or of `step`, as safetensors with config and tokenizer.

    A run of several tasks gives one directory per task, each with the body and that task's head. A run with
    adapters gives the model with the adapters merged into its weights, or with `adapter` a directory that peft
    loads. With `ema`, the run's averaged weights are written; with `last`, the mean of that many newest complete
    checkpoints.

    Raises ConfigurationError if `out` is in use, or if there is no such adapter or average; CheckpointError if
    there is no complete checkpoint; StorageError if the disk fails. `out` appears complete or not at all.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(
            Problem("--out", str(out), "exists and is not an empty directory; name a new one")
        )
    chosen, rejected = choose(run, step)
    directory = _model_directory(run)
    stored = Stored(CheckpointReader(chosen.directory), dtype, ema)
    if last > 1:
        stored = Mean([Stored(CheckpointReader(one.directory), dtype) for one in _newest(run, last)])
    weights = _weights(run, stored, adapter, dtype)
    places: dict[str, Weights] = {"": weights}
    if tasks := heads_of(directory):
        places = {task: OneHead(weights, directory, task) for task in tasks}
    plan = Plan.read(run.plan_file) if run.plan_file.is_file() else None
    set_umask(plan is not None and plan.share_with_group)
    temporary = out.with_name(f".{out.name}.export-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        evaluation = run.newest_evaluation(chosen.step)
        written = {
            place: _write_model(temporary / place, own, directory, max_shard_bytes, evaluation)
            for place, own in places.items()
        }
        if plan is not None and plan.script is None:
            Card(run, plan, chosen.step, chosen.manifest.metrics if chosen.manifest else {}, adapter).write(
                temporary
            )
        sync_directory(temporary)
        temporary.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; nothing was exported") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    entries = [entry for one, _ in written.values() for entry in one]
    files = tuple(str(Path(place, name)) for place, (_, names) in written.items() for name in names)
    num_bytes = sum(entry.num_bytes for entry in entries)
    return Exported(
        out, chosen.step, len(entries), num_bytes, files, rejected, is_merged=isinstance(weights, Merged)
    )


def _write_model(
    target: Path, weights: Weights, directory: Path, max_shard_bytes: int, evaluation: Path | None
) -> tuple[list[Entry], list[str]]:
    """Write one model into `target`, with the files of `directory` that belong to it. Return the tensors and the
    names of the weight files."""
    is_adapter = isinstance(weights, Alone)
    # peft reads only one file.
    shards = [weights.entries()] if is_adapter else _shards(weights.entries(), max_shard_bytes)
    target.mkdir(exist_ok=True)
    files = _write_shards(target, weights, shards, "adapter_model" if is_adapter else "model")
    for inside in kept(directory):
        if not is_adapter or inside.name != "config.json":
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / inside, target / inside)
    if isinstance(weights, Alone):
        weights.write_settings(target)
        return shards[0], files
    if isinstance(weights, OneHead):
        weights.write_config(target)
    _set_dtype(target / "config.json", shards)
    if evaluation is not None and isinstance(weights, OneHead):
        weights.write_evaluation(evaluation, target)
    elif evaluation is not None:
        shutil.copyfile(evaluation, target / EVALUATION)
    return [entry for shard in shards for entry in shard], files


def choose(run: RunDirectory, step: int | None) -> tuple[StoredCheckpoint, tuple[StoredCheckpoint, ...]]:
    """Return the newest complete checkpoint, or `step`'s, and damaged ones skipped. Raises CheckpointError."""
    if step is None:
        choice = newest_valid(run)
        if choice.chosen is None:
            reasons = "; ".join(f"{stored.name}: {', '.join(stored.problems)}" for stored in choice.rejected)
            raise CheckpointError(
                f"{run.path.name} has no whole checkpoint" + (f" ({reasons})" if reasons else " yet")
            )
        return choice.chosen, choice.rejected
    problems = (
        verify(run.checkpoint(step), run.run_id())
        if run.checkpoint(step).is_dir()
        else ["there is no such checkpoint"]
    )
    if problems:
        newest = newest_valid(run).chosen
        instead = f"the newest good one is step {newest.step}" if newest else "no other checkpoint is whole"
        raise CheckpointError(f"step {step}: {'; '.join(problems)}; {instead}")
    return look(run.checkpoint(step), run.run_id()), ()


def _newest(run: RunDirectory, number: int) -> list[StoredCheckpoint]:
    """Return `number` complete checkpoints, newest first. Raises ConfigurationError if there are fewer."""
    whole: list[StoredCheckpoint] = []
    for stored in reversed(list_checkpoints(run)):
        if len(whole) < number and not verify(stored.directory, run.run_id()):
            whole.append(stored)
    if len(whole) < number:
        reason = f"the run has {len(whole)} whole checkpoints; checkpoint.keep_last says how many stay"
        raise ConfigurationError(Problem("--last", number, reason))
    return whole


def _model_directory(run: RunDirectory) -> Path:
    directory = run.path / "model"
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} holds no config.json: the run never got as far as preparing its model"
        )
    return directory


def _weights(run: RunDirectory, stored: Stored, alone: bool, dtype: ExportDtype) -> Weights:
    """Return the tensors to export: the checkpoint's; for a run with adapters, the merged model's, or with
    `alone` the adapters'."""
    plan = Plan.read(run.plan_file) if run.plan_file.is_file() else None
    if plan is None or plan.model.adapter is None:
        if alone:
            reason = "was asked for, and this run trains the model's own weights; leave it out"
            raise ConfigurationError(Problem("--adapter", run.path.name, reason))
        return stored
    if alone and heads_of(run.path / "model"):
        reason = "peft keeps an adapter beside one class, and this run has a head for each task; leave it out"
        raise ConfigurationError(Problem("--adapter", run.path.name, reason))
    if alone and plan.model.adapter.init != "lora" and dtype in ("bfloat16", "float16"):
        reason = (
            f"of {plan.model.adapter.init} the adapter is a difference of two that are nearly alike, which so "
            "few digits lose; leave it out, or write float32"
        )
        raise ConfigurationError(Problem("--dtype", dtype, reason))
    if plan.model.adapter.is_prompt and not alone:
        reason = (
            f"{plan.name} trains virtual tokens, which stand before a text and are no part of the weights; "
            "`launcher export RUN --out DIR --adapter` writes a directory that peft loads"
        )
        raise ConfigurationError(Problem("--adapter", None, reason))
    kind: type[Alone] | type[Merged] = Alone if alone else Merged
    return kind(plan, plan.model.adapter, stored, run.path / "model")


def _shards(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    # The widest dtype first keeps every tensor aligned in a memory map of the file.
    return [sorted(shard, key=lambda entry: (-entry.dtype.itemsize, entry.name)) for shard in shards]


def _write_shards(directory: Path, weights: Weights, shards: list[list[Entry]], stem: str) -> list[str]:
    count = len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "wb") as file:
            write_safetensors(file, weights, shard)
            file.flush()
            os.fsync(file.fileno())
    if count == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard)},
        "weight_map": {
            entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard
        },
    }
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return names


def write_safetensors(file: BinaryIO, weights: Weights, entries: list[Entry]) -> None:
    """Write tensors to a file, in the order of `entries`.

    The library's own writer would need all tensors of a file in memory at once. Raises ConfigurationError for
    a number that is too large for its dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for entry in entries:
        for piece in weights.pieces(entry.name):
            converted = piece.to(entry.dtype)
            _refuse_overflow(entry, piece, converted)
            flat = converted.contiguous().view(-1).view(torch.uint8)
            file.write(memoryview(cast(Buffer, flat.numpy())))


def _refuse_overflow(entry: Entry, piece: torch.Tensor, converted: torch.Tensor) -> None:
    """Raise ConfigurationError if a number became infinite in float16, the only dtype with so small a range."""
    if entry.dtype == torch.float16 and bool((converted.isinf() & piece.isfinite()).any()):
        most = torch.finfo(torch.float16).max
        largest = float(piece[piece.isfinite()].abs().max())
        reason = f"{entry.name} has a number of the size {largest:g}, and float16 ends at {most:g}"
        raise ConfigurationError(Problem("--dtype", "float16", f"{reason}; write bfloat16 or float32"))


def _set_dtype(config_file: Path, shards: list[list[Entry]]) -> None:
    """Write the weights' dtype to config.json, because `from_pretrained` loads them in the dtype found there."""
    floating = [entry for shard in shards for entry in shard if entry.dtype.is_floating_point]
    if not floating:
        return
    config = read_json(config_file)
    config.pop("torch_dtype", None)
    config["dtype"] = str(max(floating, key=lambda entry: entry.num_bytes).dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
