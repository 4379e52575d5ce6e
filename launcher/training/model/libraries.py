"""Patches that let Accelerate and DeepSpeed shard on CPUs, applied when a script imports them.

Tested with accelerate 1.15 and deepspeed 0.19.8.
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
    """Change each module when it is imported, by the patches of this module and by `more`.

    Nothing is imported here: a script may set environment variables first.
    """
    ours: dict[str, Change] = {"accelerate.utils.fsdp_utils": _leave_embeddings_to_accelerate}
    if device == "cpu":
        ours |= {"accelerate.state": _choose_gloo, "deepspeed.ops": _build_nothing}
    changes: dict[str, list[Change]] = {}
    for name, change in (item for some in (ours, *more) for item in some.items()):
        changes.setdefault(name, []).append(change)
    sys.meta_path.insert(0, _Finder(changes))


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that loads some modules in the usual way, and changes each after its execution."""

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
    """Make no FSDP unit of a layer that contains the input embeddings, such as BertEmbeddings.

    Accelerate makes a unit of the embeddings themselves afterwards, and a parameter cannot be sharded twice:
    BERT and similar models failed with "Invariant encountered: value was None when it should not be".
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
    """Give ranks without a GPU the gloo backend, and allow FSDP and DeepSpeed.

    Otherwise Accelerate uses plain data parallelism on CPUs, silently without FSDP, and gives DeepSpeed no
    backend. It uses FSDP only for the type "several GPUs"; ACCELERATE_TORCH_DEVICE makes the device a CPU.
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
    """Stop DeepSpeed from compiling its shared-memory collectives: that takes minutes, and gloo does the
    same."""
    operators.__compatible_ops__["deepspeed_shm_comm"] = False
