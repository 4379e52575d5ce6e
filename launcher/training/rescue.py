"""A save by all ranks after one ran out of memory in a forward or backward pass, before the attempt ends.

The rank that ran out of memory cannot continue its pass. A smaller pass of its own would need other collectives
than its peers wait for, and they block inside a collective. But the training state does not change during a
pass, and checkpoints have their own process group, so a thread of each peer can write its part. Then the attempt
ends, and the next one resumes at this step with smaller micro-batches (`launcher/launch/cutting.py`).

Once a rank has sent its sums to the others (`over`), they take the update and lose that state. A rank that runs
out of memory after this, or anywhere else between passes, does not call the others and leaves at once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from launcher.errors import OutOfMemoryError
from launcher.plain_files import read_json
from launcher.runs.failure import classify
from launcher.runs.layout import write_atomically
from launcher.runs.places import here

CALL = "out-of-memory.json"
"""A file in the attempt's directory: a rank ran out of memory in the passes of this step, and waits for the
others to save."""
_LOOKS_PER_SECOND = 256
"""How often all ranks together look for a peer's call, as looking loads a shared file system."""
_SECONDS_TO_SAVE = 900.0
"""The time limit of the save; after it the attempt ends unsaved."""
_SECONDS_TO_ARRIVE = 60.0
"""Time for a peer to reach the passes of the same step: at most its part of the last update is left. The caller
waits as long for a save that does not begin."""
_TIMES_OWN_PART = 5
"""A peer may take this many times as long for its part as this rank took for its own."""
_LOOK_SECONDS = 0.5


class Rescue:
    """One rank's part in saving a state that would be lost. `save` is collective over all ranks and may run in
    a thread."""

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        world_size: int,
        save: Callable[[], object] | None,
        finish: Callable[[float], object],
    ) -> None:
        """Start a thread that looks for a peer's call in `directory`, the attempt's.

        `save` is None if a thread cannot read the state during a pass, as with DeepSpeed's state on NVMe.
        `finish(seconds)` waits for this rank's part of a save in progress.
        """
        self._call, self._device, self._save, self._finish = directory / CALL, device, save, finish
        self._lock = threading.Lock()
        self._is_saved = False
        self._step: int | None = None
        self._may_call = False
        self._updated: torch.cuda.Event | None = None
        self._seconds_between_looks = max(1.0, world_size / _LOOKS_PER_SECOND)
        if world_size > 1 and save is not None:
            threading.Thread(target=self._listen, name="rescue", daemon=True).start()

    @contextlib.contextmanager
    def passes(self, step: int, is_saved: bool) -> Iterator[None]:
        """Guard the passes that start from the state after `step` steps: if memory runs out within this context,
        save that state first, unless `is_saved`."""
        if self._device.type == "cuda":
            self._updated = torch.cuda.Event()
            self._updated.record()
        is_saved = is_saved or self._save is None
        self._step, self._may_call = None if is_saved else step, True
        try:
            yield
        except Exception as error:
            if classify(error)[0] is OutOfMemoryError:
                # The frames in the error's traceback keep the tensors of the pass alive.
                traceback.clear_frames(error.__traceback__)
                gc.collect()
                with contextlib.suppress(Exception):  # the original error must be reported
                    if is_saved:
                        self._finish(_SECONDS_TO_SAVE)
                    elif self._may_call:
                        self._call_and_save(step)
            raise
        self._step = None

    def over(self) -> None:
        """Note that this rank is about to send its sums; after that it may not call the others."""
        self._may_call = False

    def _call_and_save(self, step: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        write_atomically(self._call, json.dumps({"step": step}) + "\n")
        # In a thread, like the peers: a peer that does not come would block this rank until the timeout of
        # their process group.
        saving = threading.Thread(target=self._save_once, name="rescue", daemon=True)
        saving.start()
        began = since = time.monotonic()
        progress = here.save_progress
        while saving.is_alive() and (now := time.monotonic()) - began < _SECONDS_TO_SAVE:
            saving.join(_LOOK_SECONDS)
            if here.save_progress != progress:
                progress, since = here.save_progress, now
            # Without this limit, a peer that cannot come would block until the group's timeout. A peer that
            # comes writes a part as large as this rank's.
            own = _TIMES_OWN_PART * (since - began)
            most = {"": _SECONDS_TO_ARRIVE, "waiting for the other ranks": max(_SECONDS_TO_ARRIVE, own)}
            if now - since > most.get(progress[0], _SECONDS_TO_SAVE):
                return

    def _save_once(self) -> None:
        """Save once, without waiting for work that the pass has queued."""
        if self._updated is not None:
            # The pass's CUDA stream waits for collectives that will not come. So copy on another stream, once
            # the last update is done.
            torch.cuda.set_device(self._device)
            self._updated.synchronize()
        with self._lock, torch.cuda.stream(torch.cuda.Stream() if self._updated is not None else None):
            if not self._is_saved and self._save is not None:
                self._is_saved = True
                self._save()

    def _listen(self) -> None:
        """Wait for a call; then save as soon as this rank is in the passes of the same step."""
        while not self._call.exists():
            time.sleep(self._seconds_between_looks)
        step = read_json(self._call)["step"]
        until = time.monotonic() + _SECONDS_TO_ARRIVE
        while self._step != step:
            if time.monotonic() > until:
                return
            time.sleep(0.1)
        self._save_once()
