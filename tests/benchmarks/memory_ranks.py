"""What each rank of a memory measurement does: a few steps of one case, every allocation of which is counted.

The figure is the peak of live tensor bytes from the allocator's own events (`torch.profiler`,
`profile_memory`), summed in time order from before the model is built. What the system's allocator keeps in
reserve, the interpreter and the libraries are not in it.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.tasks.task import Task
from launcher.tasks.written_logits import MATRIX, TEACHER_STATES, Manifest
from launcher.training import cpu_half_matmul, engines, shared_messages
from launcher.training.engines.engine import Engine
from launcher.training.model import pretrained
from launcher.training.precision import DTYPES
from launcher.training.tracing.make_profile import example_batch, prepared_task
from launcher.training.written_states import giving_states

PHASE, LIVE = "phase: ", "live: "
PHASES = ("loading", "first step", "steady step", "evaluating")


@dataclass(frozen=True)
class Request:
    """One case as a rank needs it."""

    plan: Plan
    lengths: tuple[int, ...]
    """Tokens of each sample of a micro-batch."""
    evaluates: bool = False
    explains: bool = False
    """Also say which tensors were live at the peak."""


def serve(rank: int, world_size: int, port: int, pipe: Connection, times: bool) -> None:
    """Join the process group once, then do what comes through the pipe until None does.

    Where `times` is measured nothing waits for gloo's threads; where memory is, each collective does.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    shared_messages.use(distributed_c10d)
    distributed.init_process_group("gloo")
    if not times:
        _let_threads_finish()
    while (request := pipe.recv()) is not None:
        function, arguments = request
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # the parent shows it
            pipe.send((False, traceback.format_exc()))
            sys.exit(1)
    distributed.destroy_process_group()


def _let_threads_finish() -> None:
    """A collective of gloo is over a moment before its thread lets go of the tensors, and what another thread
    releases is not seen."""
    functional = torch.distributed._functional_collectives
    wait = functional.wait_tensor

    def patient_wait(tensor: torch.Tensor) -> torch.Tensor:
        result = wait(tensor)
        time.sleep(0.001)
        return result

    functional.wait_tensor = patient_wait
    for name in (
        "all_gather_single",
        "reduce_scatter_single",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_reduce",
        "reduce",
    ):
        function = getattr(distributed, name, None)
        if function is None:
            continue

        def patient(*arguments: Any, _function: Callable[..., Any] = function, **options: Any) -> Any:
            result = _function(*arguments, **options)
            time.sleep(0.001)
            return result

        setattr(distributed, name, patient)


def measure(request: Request) -> dict[str, Any]:
    """Peak bytes by phase on this rank, and what of the first steps remains live between steps."""
    gc.collect()
    before = _storages()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = _steps(request, before)
        with record_function(f"{PHASE}end"):
            pass
    result = timeline(profiler)
    if request.explains:
        result["explained"] = explain(profiler)
    del engine, profiler
    gc.collect()
    return result


def measure_states(request: Request) -> dict[str, Any]:
    """Peak bytes by phase on this rank while hidden states are written ahead."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        config, task, engine = loaded(request.plan, trains=False)
        with giving_states(engine.model, DTYPES[request.plan.precision], None):
            for name in ("first pass", "evaluating"):
                with record_function(f"{PHASE}{name}"):
                    engine.evaluate(example_batch(task, config, request.lengths))
        with record_function(f"{PHASE}end"):
            pass
    result = timeline(profiler)
    del engine, profiler
    gc.collect()
    return result


def _storages() -> dict[int, int]:
    """Bytes by address of what the interpreter's tensors hold. Between two steps nothing else holds any:
    there is no graph."""
    found: dict[int, int] = {}
    for tensor in [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]:
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            try:
                storage = one.untyped_storage() if one is not None else None
                address = storage.data_ptr() if storage is not None else 0
            except (
                RuntimeError,
                NotImplementedError,
            ):  # of a fake or wrapped one, which holds nothing itself
                continue
            if storage is not None and address:
                found[address] = storage.nbytes()
    return found


def _say_what_lives(before: dict[int, int]) -> None:
    gc.collect()
    size = sum(size for pointer, size in _storages().items() if before.get(pointer) != size)
    with record_function(f"{LIVE}{size}"):
        pass


def loaded(plan: Plan, trains: bool = True) -> tuple[Any, Task, Engine]:
    """The model's config, the task and the engine of a plan, whose products are a rank's own."""
    cpu_half_matmul.widen(DTYPES[plan.precision])
    with record_function(f"{PHASE}loading"):
        config = pretrained.read_config(plan)
        task = prepared_task(plan, config)
        settings = deepspeed_config(plan) if plan.engine == "deepspeed" else {}
        return config, task, engines.build(plan, task, config, settings, trains=trains)


def _steps(request: Request, before: dict[int, int]) -> Any:
    plan = request.plan
    config, task, engine = loaded(plan)
    gc.collect()
    for name in ("first step", "steady step"):
        with record_function(f"{PHASE}{name}"):
            for index in range(plan.batch.accumulation_steps):
                batch = example_batch(task, config, request.lengths)
                batch |= _states(task, len(batch["supervised"])) if MATRIX in task.companions else {}
                engine.micro_step(batch, 1.0, index == plan.batch.accumulation_steps - 1)
                del batch
            engine.squared_gradient_norm()
            engine.optimizer_step(1e-4, 0.5)
        if plan.engine == "deepspeed":
            _say_what_lives(before)
    if request.evaluates:
        with record_function(f"{PHASE}evaluating"):
            engine.evaluate(example_batch(task, config, request.lengths))
    return engine


def _states(task: Any, num_tokens: int) -> dict[str, torch.Tensor]:
    """What a batch has of hidden states that were written ahead."""
    manifest = Manifest.read(Path(task.companions[MATRIX].name))
    assert manifest.hidden is not None
    return {TEACHER_STATES: torch.zeros(num_tokens, manifest.hidden.width, dtype=DTYPES[manifest.precision])}


@dataclass(frozen=True)
class Change:
    """Memory taken or given back, or, without a size, the beginning of a phase."""

    time: int
    size: int
    pointer: int
    where: str


def changes(profiler: Any) -> list[Change]:
    """Every allocation and release in the order of time.

    gloo's threads may be the last to let go of the copies that a collective made, and the profiler does not
    see their releases: such a copy counts until the collective that made it returns.
    """
    found: list[Change] = []
    ends: dict[int, list[tuple[int, int, int]]] = {}

    def walk(nodes: list[Any], chain: tuple[str, ...], collective: int) -> None:
        for node in nodes:
            if "Allocation" in str(node.tag):
                fields = node.typed[1]
                found.append(
                    Change(node.start_time_ns, fields.alloc_size, fields.ptr, " > ".join(chain[-4:]))
                )
                if collective and fields.alloc_size > 0:
                    ends.setdefault(fields.ptr, []).append(
                        (node.start_time_ns, collective, fields.alloc_size)
                    )
                continue
            if node.name.startswith((PHASE, LIVE)):
                found.append(Change(node.start_time_ns, 0, 0, node.name))
            walk(
                node.children,
                (*chain, node.name),
                node.end_time_ns if node.name.startswith("c10d::") else collective,
            )

    walk(profiler.profiler.kineto_results.experimental_event_tree(), (), 0)
    found.sort(key=lambda change: change.time)
    return sorted([*found, *_unseen(found, ends)], key=lambda change: change.time)


def _unseen(found: list[Change], ends: dict[int, list[tuple[int, int, int]]]) -> list[Change]:
    released: dict[int, list[Change]] = {}
    for change in found:
        if change.pointer in ends:
            released.setdefault(change.pointer, []).append(change)
    missing = []
    for pointer, copies in ends.items():
        for moment, end, size in copies:
            after = next((change for change in released[pointer] if change.time > moment), None)
            if after is None or after.size > 0:
                missing.append(Change(end, -size, pointer, "c10d"))
    return missing


def timeline(profiler: Any) -> dict[str, Any]:
    """The peak of each phase and the level at its end, in bytes."""
    level, phase = 0, "before"
    peaks: dict[str, int] = {}
    ends: dict[str, int] = {}
    for change in changes(profiler):
        if change.where.startswith(PHASE) and not change.pointer:
            phase = change.where.removeprefix(PHASE)
        level = corrected(level, change)
        peaks[phase] = max(peaks.get(phase, 0), level)
        ends[phase] = level
    return {"peaks": peaks, "ends": ends}


def corrected(level: int, change: Change) -> int:
    """The level after a change. What gloo's threads released unseen is taken off after each step, when it is
    known what lives."""
    if change.where.startswith(LIVE) and not change.pointer:
        return min(level, int(change.where.removeprefix(LIVE)))
    return level + change.size


def explain(profiler: Any) -> list[tuple[int, int, str]]:
    """(bytes, number, by which operators) of what was live at the highest moment of the steady step, largest
    first."""
    live: dict[int, tuple[int, str]] = {}
    level, highest, at_peak, steady = 0, -1, {}, False
    for change in changes(profiler):
        if change.where == f"{PHASE}end":
            break
        steady |= change.where == f"{PHASE}steady step"
        level = corrected(level, change)
        if change.size > 0:
            live[change.pointer] = (change.size, change.where)
        else:
            live.pop(change.pointer, None)
        if steady and level > highest:
            highest, at_peak = level, dict(live)
    grouped: dict[tuple[int, str], int] = {}
    for size, where in at_peak.values():
        grouped[size, where] = grouped.get((size, where), 0) + 1
    return sorted(
        ((size * count, count, f"{size} {where}") for (size, where), count in grouped.items()), reverse=True
    )


Measure = Callable[[Request], dict[str, Any]]
