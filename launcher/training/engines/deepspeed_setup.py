"""The import of DeepSpeed, and patches that leave clipping, loss scaling and other work to launcher."""

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
    """Remove DeepSpeed's hooks from all modules within this context.

    The hooks free parameters. When a forward pass differs from the last one, they also compare the order of
    modules across ranks: a rank that generates more tokens than the others would wait for them forever.
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
            # transformers adds its own hooks only once, in the first forward pass.
            kept |= {number: hook for number, hook in one.items() if number not in kept}
            one.clear()
            one.update(kept)


def import_deepspeed(plan: Plan) -> Any:
    """Return the module deepspeed, set up: quiet, on the plan's device, with gloo's collectives on CPUs, and
    without leaf modules (which are gathered as one).

    Raises ConfigurationError if it cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", plan.mesh.device)
    try:
        import deepspeed
    except ImportError as error:
        reason = f"DeepSpeed cannot be imported: {first_line(error)}"
        raise ConfigurationError(Problem("parallel.engine", "deepspeed", reason)) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if plan.mesh.device == "cpu":
        # Its shared-memory collectives take minutes to compile on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed makes the experts of three model types leaf modules. transformers 5 does not need this: its
    # experts are one tensor. DeepSpeed would not count them in the reuse distance of parameters, so all other
    # matrices of all layers would stay gathered after the forward pass.
    deepspeed.runtime.zero.leaf_module_config.DEFAULT_LEAF_MODULE_CLASSES.clear()
    deepspeed.init_distributed(
        dist_backend="nccl" if plan.mesh.device == "cuda" else "gloo", auto_mpi_discovery=False
    )
    return deepspeed


@contextlib.contextmanager
def one_optimizer_for_all_stages(deepspeed: Any) -> Iterator[None]:
    """Make DeepSpeed use its optimizer of stages 1 and 2 for stage 1 in bf16 too, within this context.

    With fp32 accumulation it would choose BF16_Optimizer, a class with other internals but the same numbers.
    """
    engine, kind = deepspeed.DeepSpeedEngine, "zero_optimization"
    choose = engine._do_optimizer_sanity_check
    engine._do_optimizer_sanity_check = lambda self, optimizer: choose(self, optimizer) and kind
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = choose


def without_clipping_and_scale(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the rendered configuration with clipping and loss scaling off; the trainer does both."""
    config = copy.deepcopy(ds_config)
    config["gradient_clipping"] = 0.0
    if config.get("fp16", {}).get("enabled"):
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return config
