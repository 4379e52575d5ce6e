"""Patches that make a script's Trainer save full models under every engine.

Tested with transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from launcher.training.model.libraries import Change

_SECONDS_BETWEEN_LOOKS = 0.1


class Saving:
    """This rank's part in the script's saves."""

    def __init__(self, rank: int) -> None:
        self._leads = rank == 0
        self._trainer: Any = None
        """The last sharded Trainer that this rank did not save yet. The reference is dropped at the save, so
        that the script can free its memory."""
        self._saves = 0

    def changes(self) -> dict[str, Change]:
        """Return the patches to apply to modules as they are imported, by module name."""
        return {"transformers.trainer": self._change_trainer, "deepspeed.runtime.engine": _gather}

    def finish(self) -> None:
        """Join the saves of rank 0 after the script has finished on this rank, until it has finished there too.

        Many scripts call `save_model` on rank 0 alone. That suffices for unsharded models; with shards, rank 0
        would wait for the others.
        """
        store = _store()
        if store is None:
            return
        if self._leads:
            with contextlib.suppress(RuntimeError):
                store.set("launcher/through", "")
        trainer = None if self._leads else self._trainer
        while trainer is not None:
            if _is_said(store, name := f"launcher/save-{self._saves}"):
                trainer.save_model(store.get(name).decode())
            elif _is_said(store, "launcher/through"):
                return
            else:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _change_trainer(self, trainers: ModuleType) -> None:
        trainer = trainers.Trainer
        save, create = trainer.save_model, trainer.create_accelerator_and_postprocess

        @functools.wraps(save)
        def save_model(its: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if not _internal_call and _is_sharded(its):
                self._announce(output_dir or its.args.output_dir)
            with _whole_state_dict(its):
                save(its, output_dir, _internal_call)

        @functools.wraps(create)
        def create_accelerator_and_postprocess(its: Any) -> None:
            if its.args.save_only_model:
                # transformers refuses this option with a sharded state dict. Without the optimizer's state, a
                # full state dict is fine.
                os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
            create(its)
            self._trainer = its if _is_sharded(its) else None

        trainer.save_model, trainer.create_accelerator_and_postprocess = (
            save_model,
            create_accelerator_and_postprocess,
        )

    def _announce(self, directory: str) -> None:
        store = _store()
        if self._leads and store is not None:
            store.set(f"launcher/save-{self._saves}", directory)
        self._saves += 1
        self._trainer = None


def _store() -> Any:
    """Return the store through which ranks communicate without collectives; None if the script has no process
    group (any more)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _is_said(store: Any, name: str) -> bool:
    """Return whether rank 0 has set this key. If the store is gone, rank 0 has finished."""
    try:
        return bool(store.check([name]))
    except RuntimeError:
        return name == "launcher/through"


def _is_sharded(trainer: Any) -> bool:
    """Return whether rank 0 cannot save the model alone."""
    state = trainer.accelerator.state
    zero = getattr(state, "deepspeed_plugin", None)
    return getattr(state, "fsdp_plugin", None) is not None or (zero is not None and zero.zero_stage == 3)


@contextlib.contextmanager
def _whole_state_dict(trainer: Any) -> Iterator[None]:
    """Use a full state dict within this context: with a sharded one, which checkpoints for resuming keep, the
    Trainer's `save_model` writes nothing under FSDP."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    from torch.distributed.fsdp import StateDictType

    before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


def _gather(engine: ModuleType) -> None:
    """Make ZeRO-3 gather full weights for a save, whatever its configuration says.

    With DeepSpeed's default, `stage3_gather_16bit_weights_on_model_save: false`, the Trainer saves no loadable
    weights, and Accelerate raises an error.
    """
    engine.DeepSpeedEngine.zero_gather_16bit_weights_on_model_save = lambda self: True
