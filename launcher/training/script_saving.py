"""Make a script's Trainer save whole models under every engine.

Tried with transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
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
    """This rank's part in what the script saves."""

    def __init__(self, rank: int) -> None:
        self._leads = rank == 0
        self._trainer: Any = None
        """The last sharded one that this rank was not told to save: let go once it is, so that the script may
        free its memory."""
        self._saves = 0

    def changes(self) -> dict[str, Change]:
        """Return what is changed in which module as it is imported."""
        return {"transformers.trainer": self._change_trainer, "deepspeed.runtime.engine": _gather}

    def finish(self) -> None:
        """Join, once the script is through on this rank, what rank 0 saves alone, until it is through as
        well.

        Many scripts have rank 0 alone call `save_model`, which is enough for whole copies; of shards it has
        only its own, and would wait.
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
                # Refused with a sharded one; without an optimizer beside it nothing speaks against a whole
                # one.
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
    """Return what the ranks tell each other by, without a collective; None where the script has no process
    group (any more)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _is_said(store: Any, name: str) -> bool:
    """Return whether rank 0 has said so. It may be through and gone, and the store with it."""
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
    """With a sharded state dict, which checkpoints to resume from keep, the Trainer's `save_model` writes
    nothing at all under FSDP."""
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
    """Have ZeRO-3 hand out whole weights, whatever its configuration says of it.

    With `stage3_gather_16bit_weights_on_model_save: false`, which is DeepSpeed's default, the Trainer saves
    no weights that load, and Accelerate raises an error.
    """
    engine.DeepSpeedEngine.zero_gather_16bit_weights_on_model_save = lambda self: True
