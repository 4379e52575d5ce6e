"""Import DeepSpeed, and keep it from what launcher does itself: clipping, scaling, another optimizer, hooks."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from launcher.errors import ConfigurationError, Problem, first_line
from launcher.planner.plan import Plan


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Keep DeepSpeed from doing anything before and after a module, while inside.

    Its hooks free parameters, and compare the order of the modules with the other ranks' wherever a pass differs
    from the last one: a rank that writes more tokens than the others would wait for them for ever.
    """
    hooks: list[dict[int, Any]] = [
        one for module in model.modules() for one in (module._forward_pre_hooks, module._forward_hooks)
    ]
    before = [dict(one) for one in hooks]
    for one in hooks:
        for number, hook in list(one.items()):
            if hook.__module__.startswith("deepspeed."):
                del one[number]
    try:
        yield
    finally:
        for one, kept in zip(hooks, before, strict=True):
            # transformers makes hooks of its own in a first pass, and once only.
            kept |= {number: hook for number, hook in one.items() if number not in kept}
            one.clear()
            one.update(kept)


def import_deepspeed(plan: Plan) -> Any:
    """Return the module deepspeed: quiet, on the plan's device, without collectives that gloo does as well.

    Raises ConfigurationError where it cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", plan.mesh.device)
    try:
        import deepspeed
    except ImportError as error:
        reason = f"DeepSpeed cannot be imported: {first_line(error)}"
        raise ConfigurationError(Problem("parallel.engine", "deepspeed", reason)) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if plan.mesh.device == "cpu":
        # Its collectives in shared memory take minutes to compile on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if plan.mesh.device == "cuda" else "gloo", auto_mpi_discovery=False
    )
    return deepspeed


@contextlib.contextmanager
def one_optimizer_for_all_stages(deepspeed: Any) -> Iterator[None]:
    """Have stage 1 in bf16 take the optimizer of stages 1 and 2 as well.

    With fp32 accumulation DeepSpeed would take its BF16_Optimizer, another class with other insides; the
    numbers are the same.
    """
    engine, kind = deepspeed.DeepSpeedEngine, "zero_optimization"
    choose = engine._do_optimizer_sanity_check
    engine._do_optimizer_sanity_check = lambda self, optimizer: choose(self, optimizer) and kind
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = choose


def without_clipping_and_scale(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the rendered configuration as the engine uses it: clipping and the loss scale are the trainer's."""
    config = copy.deepcopy(ds_config)
    config["gradient_clipping"] = 0.0
    if config.get("fp16", {}).get("enabled"):
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return config
