"""What Accelerate and DeepSpeed need to shard on a CPU, put in when a script imports them.

Tried with accelerate 1.15 and deepspeed 0.19.8. Nothing of this is done where there are GPUs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]


def prepare() -> None:
    """Have each module changed as it is imported. Nothing is imported here: a script may set variables before it does."""
    sys.meta_path.insert(0, _Finder({"accelerate.state": _choose_gloo, "deepspeed.ops": _build_nothing}))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds some modules as everybody else does, and changes each after it was executed."""

    def __init__(self, changes: dict[str, Change]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        change = self._changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, change: Change) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _choose_gloo(state: ModuleType) -> None:
    """Give ranks without a GPU the gloo backend, and let FSDP and DeepSpeed in.

    Without it Accelerate takes plain data parallelism on CPUs and leaves FSDP out in silence, and gives DeepSpeed no backend. It takes
    FSDP for what it calls several GPUs; the device is a CPU by ACCELERATE_TORCH_DEVICE.
    """
    choose = state.PartialState._prepare_backend

    def _prepare_backend(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> tuple[Any, Any]:
        chosen, kind = choose(self, cpu, sagemaker_dp, backend)
        sharded = any(state.parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
        if kind is state.DistributedType.NO and not cpu and sharded:
            return "gloo", state.DistributedType.MULTI_GPU
        return chosen, kind

    state.PartialState._prepare_backend = _prepare_backend


def _build_nothing(operators: ModuleType) -> None:
    """Have DeepSpeed compile no operator for collectives in shared memory: minutes of compiling, for what gloo does."""
    operators.__compatible_ops__["deepspeed_shm_comm"] = False
