"""Patches that let Accelerate and DeepSpeed shard on CPUs, applied when a script imports them.

Tried with accelerate 1.15 and deepspeed 0.19.8.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]


def prepare(device: str, *more: Mapping[str, Change]) -> None:
    """Have each module changed as it is imported, by the changes made here and by `more`.

    Nothing is imported here: a script may set variables before it does.
    """
    ours: dict[str, Change] = {"accelerate.utils.fsdp_utils": _leave_embeddings_to_accelerate}
    if device == "cpu":
        ours |= {"accelerate.state": _choose_gloo, "deepspeed.ops": _build_nothing}
    changes: dict[str, list[Change]] = {}
    for name, change in (item for some in (ours, *more) for item in some.items()):
        changes.setdefault(name, []).append(change)
    sys.meta_path.insert(0, _Finder(changes))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds some modules as everybody else does, and changes each after it was executed."""

    def __init__(self, changes: dict[str, list[Change]]) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        changes = self._changes.pop(name, None)
        if changes is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, changes)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, changes: list[Change]) -> None:
        self._loader, self._changes = loader, changes

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for change in self._changes:
            change(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _leave_embeddings_to_accelerate(fsdp: ModuleType) -> None:
    """Make no FSDP unit of a layer that holds the input embeddings, as BertEmbeddings does.

    Accelerate makes a unit of the embeddings themselves afterwards, and a parameter cannot be cut twice: BERT
    and its like failed with "Invariant encountered: value was None when it should not be".
    """
    prepare_policy = fsdp.fsdp2_prepare_auto_wrap_policy

    def fsdp2_prepare_auto_wrap_policy(plugin: Any, model: Any) -> Callable[[Any], bool] | None:
        policy = prepare_policy(plugin, model)
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if policy is None or embeddings is None:
            return policy
        return lambda module: (
            policy(module)
            and (module is embeddings or all(part is not embeddings for part in module.modules()))
        )

    fsdp.__dict__["fsdp2_prepare_auto_wrap_policy"] = fsdp2_prepare_auto_wrap_policy


def _choose_gloo(state: ModuleType) -> None:
    """Give ranks without a GPU the gloo backend, and let FSDP and DeepSpeed in.

    Without it Accelerate takes plain data parallelism on CPUs and leaves FSDP out in silence, and gives
    DeepSpeed no backend. It takes FSDP for what it calls several GPUs; the device is a CPU by
    ACCELERATE_TORCH_DEVICE.
    """
    choose = state.PartialState._prepare_backend

    def _prepare_backend(
        self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
    ) -> tuple[Any, Any]:
        chosen, kind = choose(self, cpu, sagemaker_dp, backend)
        sharded = any(
            state.parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED")
        )
        if kind is state.DistributedType.NO and not cpu and sharded:
            return "gloo", state.DistributedType.MULTI_GPU
        return chosen, kind

    state.PartialState._prepare_backend = _prepare_backend


def _build_nothing(operators: ModuleType) -> None:
    """Have DeepSpeed compile no operator for collectives in shared memory: minutes of compiling, for what
    gloo does."""
    operators.__compatible_ops__["deepspeed_shm_comm"] = False
