"""What a step of each engine takes beside its computing: the real engines, on models too small for the computing to matter."""

from __future__ import annotations

import gc
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from launcher.planning.plan import Plan
from launcher.training import engines, heads
from launcher.training import model as models
from launcher.training.bench import Report, leave, reference_batch

Steps = dict[str, tuple[tuple[Plan, dict[str, Any]], ...]]
"""By name, plans with DeepSpeed's configuration, empty for FSDP."""
_ROUNDS = 9
_RAISED = re.compile(r"[\w.]+(Error|Exception)\b")
"""The line of a traceback that says what was raised."""


class _Reference:
    """A task that has no data."""

    auto_class = AutoModelForCausalLM
    forward = staticmethod(heads.causal_lm)


def extra_seconds(engine: str, steps: Steps, num_ranks: int, report: Report) -> dict[str, tuple[float, ...]]:
    """Of a step of each plan, of `num_ranks` ranks of this CPU, beyond the same passes without any engine, as rank 0 sees it.

    Nothing of an engine that does not run here; why is reported.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        result = Path(folder) / "result.pt"
        try:
            multiprocessing.start_processes(_rank, (num_ranks, folder, steps, str(result)), num_ranks, start_method="spawn")
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            raised = [line for line in str(error).splitlines() if _RAISED.match(line)]
            report(f"{engine} does not run here, and is left out: {' '.join(raised[-1:]) or models.first_line(error)}")
            return {}
        found: dict[str, tuple[float, ...]] = torch.load(result, weights_only=True)
    return found


def _rank(rank: int, num_ranks: int, folder: str, steps: Steps, result: str) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), DS_ACCELERATOR="cpu")
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    found = {name: tuple(_extra(plan, ds_config) for plan, ds_config in both) for name, both in steps.items()}
    if rank == 0:
        torch.save(found, result)
    leave()


def _extra(plan: Plan, ds_config: dict[str, Any]) -> float:
    config, batch = models.read_config(plan), reference_batch(plan.data.max_length, torch.device("cpu"))
    without = _bare_seconds(config, batch)
    taken = _engine_seconds(plan, config, ds_config, batch)
    gc.collect()
    return taken - without


def _bare_seconds(config: Any, batch: dict[str, Any]) -> float:
    model = AutoModelForCausalLM.from_config(config).train()

    def passes() -> None:
        heads.causal_lm(model, batch).loss_sum.backward()
        model.zero_grad(set_to_none=True)

    return _middle(passes)


def _engine_seconds(plan: Plan, config: Any, ds_config: dict[str, Any], batch: dict[str, Any]) -> float:
    task: Any = _Reference()
    engine = engines.build(plan, task, config, ds_config)

    def step() -> None:
        engine.micro_step(batch, 1.0, True)
        engine.squared_gradient_norm()
        engine.apply(1e-4, 1.0)

    return _middle(step)


def _middle(work: Callable[[], None]) -> float:
    work()
    taken = []
    for _ in range(_ROUNDS):
        distributed.barrier()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
