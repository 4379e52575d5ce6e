"""Benchmarks of this machine: matrix products, memory, collectives, disk, transfers to and from a GPU."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

from launcher.errors import StorageError
from launcher.runs.machine import REFERENCE, REFERENCE_LENGTH, Rates
from launcher.training import closing, cpu_half_matmul
from launcher.training.bench_effort import FULL, Effort, Progress, Report, seconds_of, timed
from launcher.training.fresh import in_fresh_ranks, leave
from launcher.training.precision import DTYPES

_LARGEST_PRODUCT = 8192
_COPY_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Message:
    """The time of one collective at one size, and the bytes a rank receives per second."""

    kind: str
    num_bytes: int
    seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Bench:
    """All figures of one machine."""

    rates: Rates
    messages: tuple[Message, ...]


def bench(num_ranks: int, directory: Path, report: Report, effort: Effort = FULL) -> Bench:
    """Run all benchmarks: collectives between `num_ranks` ranks, files in `directory`. Raises StorageError if
    no file can be written there."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu"
    product, memory, message, calling, files = effort.parts
    parts = [product] * len(DTYPES) + [memory] + [message] * (num_ranks > 1) + [calling, files]
    progress, matrix = Progress(report, parts), {}
    for precision, dtype in DTYPES.items():
        if device.type == "cpu":
            cpu_half_matmul.widen(dtype)  # as training ranks do
        progress.next(f"matrix products in {precision}")
        matrix[precision] = product_rate(dtype, device, effort)
    progress.next("memory")
    bandwidth = copy_rate(device, effort)
    messages: tuple[Message, ...] = ()
    each = None
    if num_ranks > 1:
        progress.next(f"messages between {num_ranks} ranks")
        messages, each = message_rates(num_ranks, device.type, effort)
    progress.next("the calling of operators")
    # On a CPU, as in training: all ranks at once, each with its share of the threads.
    reference = (
        reference_seconds("cuda", effort)
        if device.type == "cuda"
        else in_fresh_ranks(reference_seconds, ("cpu", effort), num_ranks)
    )
    written = read = None
    if effort.file_bytes:
        progress.next(f"files in {directory}")
        written, read = file_rates(directory, effort)
    to_device, to_host = transfer_rates(device, effort) if device.type == "cuda" else (None, None)
    link = max(
        (message.bytes_per_second for message in messages if message.kind == "all-gather"), default=None
    )
    rates = Rates(
        name,
        time.strftime("%Y-%m-%d"),
        matrix,
        bandwidth,
        link,
        reference,
        each,
        to_device,
        to_host,
        written,
        read,
        num_ranks=num_ranks,
        quick=effort.quick,
    )
    return Bench(rates, messages)


def product_rate(dtype: torch.dtype, device: torch.device, effort: Effort = FULL) -> float:
    """Return the operations per second of square matrix products. Sizes grow until one product takes a tenth
    of the budget, because some dtypes are slow on some processors."""
    size, rate = 128, 0.0
    while size <= _LARGEST_PRODUCT:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        first = timed(lambda left=left, right=right: left @ right, device)  # type: ignore[misc]
        if first > effort.seconds and rate:
            break
        seconds = seconds_of(lambda left=left, right=right: left @ right, device, effort.seconds / 4)  # type: ignore[misc]
        rate = max(rate, 2 * size**3 / seconds)
        if seconds > effort.seconds / 10:
            break
        size *= 2
    return rate


def copy_rate(device: torch.device, effort: Effort = FULL) -> float:
    """Return the bytes read and written per second by a copy that exceeds every cache."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / seconds_of(lambda: target.copy_(source), device, effort.seconds)


def reference_seconds(device_type: str, effort: Effort = FULL) -> dict[str, float]:
    """Return the seconds of a forward and backward pass of the reference model for each kind of activation
    checkpointing. The model is so small that calling operators dominates.

    Each is the minimum of several turns, because other load on the machine only adds time.
    """
    device = torch.device(device_type)
    steps = {way: _reference_step(way, device) for way in ("none", "selective", "full")}
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(effort.turns):
        for way, step in steps.items():
            taken[way].append(seconds_of(step, device, effort.seconds / effort.turns))
    return {way: min(seconds) for way, seconds in taken.items()}


def _reference_step(way: str, device: torch.device) -> Callable[[], None]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.training import heads
    from launcher.training.engines.recompute import checkpoint_activations
    from launcher.training.model import attention

    config = AutoConfig.for_model(**REFERENCE, attn_implementation=attention.register("packed"))
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    for layer in model.model.layers:
        checkpoint_activations(layer, way)
    batch = reference_batch(REFERENCE_LENGTH, device)

    def step() -> None:
        heads.causal_lm(model, batch).loss_sum.backward()
        model.zero_grad(set_to_none=True)

    return step


def reference_batch(length: int, device: torch.device) -> dict[str, Any]:
    """Return a batch of one sample with `length` tokens."""
    positions = torch.arange(length, device=device)
    ends = torch.tensor([0, length], dtype=torch.int32, device=device)
    return {
        "input_ids": positions[None],
        "position_ids": positions[None],
        "targets": positions,
        "cu_seq_lens": ends,
        "max_length": length,
    }


def transfer_rates(device: torch.device, effort: Effort = FULL) -> tuple[float, float]:
    """Return the bytes per second from pinned memory to a GPU, and back."""
    host = torch.empty(_COPY_BYTES // 4, pin_memory=True)
    there = torch.empty(_COPY_BYTES // 4, device=device)
    to_device = seconds_of(lambda: there.copy_(host, non_blocking=True), device, effort.seconds)
    to_host = seconds_of(lambda: host.copy_(there, non_blocking=True), device, effort.seconds)
    return _COPY_BYTES / to_device, _COPY_BYTES / to_host


def file_rates(directory: Path, effort: Effort = FULL) -> tuple[float, float]:
    """Return the bytes per second written and synced, and read back from disk (not from the page cache).
    Raises StorageError."""
    block = os.urandom(_BLOCK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(effort.file_bytes // _BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(_BLOCK_BYTES):
                pass
            read = time.perf_counter() - began
    except OSError as error:
        raise StorageError(
            f"no file can be written in {directory}: {error.strerror or error}; name another place "
            "with --disk"
        ) from None
    return effort.file_bytes / written, effort.file_bytes / read


def message_rates(num_ranks: int, device: str, effort: Effort = FULL) -> tuple[tuple[Message, ...], float]:
    """Time all-gathers and all-reduces of growing size between ranks of this machine, as seen by rank 0; then
    FSDP's overhead per collective."""
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        store = Path(folder) / "store"
        result = Path(folder) / "result.pt"
        multiprocessing.start_processes(
            _rank, (num_ranks, device, str(store), str(result), effort), num_ranks, start_method="spawn"
        )
        rows, each = torch.load(result, weights_only=True)
    return tuple(Message(*row) for row in rows), each


def _rank(rank: int, num_ranks: int, device: str, store: str, result: str, effort: Effort) -> None:
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # PyTorch 2.13 renames all_gather_into_tensor; 2.11 has only that name
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    closing.stay_here()
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks
    )
    rows = []
    for num_bytes in effort.message_bytes:
        part = torch.ones(max(1, num_bytes // 4 // num_ranks), device=where)
        whole = torch.empty(part.numel() * num_ranks, device=where)
        gather = _agreed_seconds(
            partial(distributed.all_gather_into_tensor, whole, part), where, effort.rounds
        )
        reduce = _agreed_seconds(partial(distributed.all_reduce, whole), where, effort.rounds)
        received = whole.numel() * 4 * (num_ranks - 1) / num_ranks
        rows.append(("all-gather", num_bytes, gather, received / gather))
        rows.append(("all-reduce", num_bytes, reduce, 2 * received / reduce))
    each = unit_seconds(where, rounds=3 * effort.rounds)
    if rank == 0:
        torch.save((rows, each), result)
    leave()


def unit_seconds(device: torch.device, num_units: int = 8, rounds: int = 30) -> float:
    """Return FSDP's fixed overhead per collective in seconds: a step with tiny units, minus the same step
    without FSDP."""
    taken = []
    for cut in (False, True):
        model = nn.Sequential(*(nn.Linear(16, 16, device=device) for _ in range(num_units)))
        if cut:
            for layer in model:
                fully_shard(layer)
            fully_shard(model)

        def step(model: nn.Module = model) -> None:
            model(torch.ones(1, 16, device=device)).sum().backward()
            model.zero_grad(set_to_none=True)

        taken.append(_agreed_seconds(step, device, rounds))
    # Each unit does two all-gathers and one reduce-scatter.
    return max(0.0, taken[1] - taken[0]) / (3 * num_units)


def _agreed_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the minimum over a fixed number of rounds, so that every rank joins the same collectives."""
    timed(work, device)
    return min(timed(work, device) for _ in range(rounds))
