"""Comparison of the engine that a script wraps its model in with the plan's engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from launcher.planner.plan import Plan
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory

Change = Callable[[ModuleType], None]

ALONE = "no engine (each rank trains for itself)"
_COPIES = "DDP (a whole copy on each rank)"


def planned(plan: Plan) -> str:
    """Return the name of the engine that the plan intends, as `Seen` names it."""
    if plan.engine == "deepspeed":
        assert plan.zero is not None
        return _zero(plan.zero.stage)
    if plan.sharding != "none":
        return "FSDP2"
    return _COPIES if plan.mesh.world_size > 1 else ALONE


def _zero(stage: int) -> str:
    return f"DeepSpeed ZeRO-{stage}"


class Seen:
    """A watch on every model that is wrapped on this rank. Rank 0 reports each engine other than the plan's
    once."""

    def __init__(self, run: RunDirectory, plan: Plan, rank: int) -> None:
        self._run, self._planned, self._speaks = run, planned(plan), rank == 0
        self._alone = plan.mesh.world_size == 1
        self._found: set[str] = set()

    def changes(self) -> dict[str, Change]:
        """Return the patches to apply to modules as they are imported, by module name."""
        return {
            "torch.nn.parallel.distributed": self._hear(
                "DistributedDataParallel.__init__", lambda bound: _COPIES
            ),
            "torch.distributed.fsdp.fully_sharded_data_parallel": self._hear(
                "FullyShardedDataParallel.__init__", lambda bound: "FSDP1"
            ),
            "torch.distributed.fsdp._fully_shard._fully_shard": self._hear(
                "fully_shard", lambda bound: "FSDP2"
            ),
            "deepspeed.runtime.engine": self._hear(
                "DeepSpeedEngine.__init__",
                lambda bound: _zero(bound["self"].zero_optimization_stage()),
                after=True,
            ),
            "torch.optim.optimizer": self._watch_steps,
        }

    def found(self, engine: str) -> None:
        """Note that a trained model uses this engine."""
        if engine in self._found:
            return
        self._found.add(engine)
        if engine != self._planned and self._speaks:
            event(self._run.events_file, "other_engine", planned=self._planned, found=engine)

    def _hear(self, name: str, engine: Callable[[dict[str, Any]], str], after: bool = False) -> Change:
        """Return a patch that wraps a module's function which takes the model as `module` or `model`."""

        def change(module: ModuleType) -> None:
            *owners, last = name.split(".")
            owner: Any = functools.reduce(getattr, owners, module)
            original = getattr(owner, last)
            signature = inspect.signature(original)

            @functools.wraps(original)
            def heard(*arguments: Any, **named: Any) -> Any:
                bound = signature.bind_partial(*arguments, **named).arguments
                result = original(*arguments, **named) if after else None
                if _trains(bound.get("module", bound.get("model"))):
                    self.found(engine(bound))
                return result if after else original(*arguments, **named)

            setattr(owner, last, heard)

        return change

    def _watch_steps(self, optimizers: ModuleType) -> None:
        """Check at the first step of any optimizer that a model was wrapped; otherwise each rank trains
        alone."""

        def before_step(optimizer: Any, *_: Any) -> None:
            handle.remove()
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if (
                not self._found
                and not self._alone
                and not any(hasattr(parameter, "device_mesh") for parameter in parameters)
            ):
                self.found(ALONE)

        handle = optimizers.register_optimizer_step_pre_hook(before_step)


def _trains(wrapped: Any) -> bool:
    """Return whether any parameter trains. A frozen model, which only judges another, may use any engine."""
    modules: Iterable[Any] = (
        wrapped if isinstance(wrapped, (list, tuple)) else [] if wrapped is None else [wrapped]
    )
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
