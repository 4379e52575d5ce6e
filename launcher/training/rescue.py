"""Save on all ranks after one ran out of memory in a pass, before the attempt ends.

The rank that ran out of memory cannot go on with its pass, and a smaller one of its own would need other
messages than its peers wait for. They stand in the middle of a pass, inside of a collective, and cannot be
called out of it. But nothing of the training state changes in a pass, and checkpoints have a channel of their
own: a thread of each peer writes its part. Then the attempt ends, and the next one goes on at this step with
smaller passes (`launcher/launch/cutting.py`).

Once a rank has told the others its sums (`over`), they take the update and no longer have that state. A rank
that runs out of memory after it, or anywhere else between passes, calls nobody and leaves at once.
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
"""In the attempt's directory: a rank ran out of memory in the pass of this step, and waits for the others to
save."""
_LOOKS_PER_SECOND = 256
"""Of all ranks together, for a peer's call: looking loads a shared file system."""
_SECONDS_TO_SAVE = 900.0
"""Then the attempt ends unsaved."""
_SECONDS_TO_ARRIVE = 60.0
"""For a peer to be in the pass of the same step: it has no more to do before than its part of the last
update. As long the caller waits for a save that does not begin."""
_TIMES_OWN_PART = 5
"""So many times as long as this rank took for its part, a peer may take for its own."""
_LOOK_SECONDS = 0.5


class Rescue:
    """One rank's part in the save of a state that would be lost. `save` is collective over all ranks, and may
    run in a thread."""

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        world_size: int,
        save: Callable[[], object] | None,
        finish: Callable[[float], object],
    ) -> None:
        """`directory`: the attempt's; `finish` waits for this rank's part in a save under way, for so many
        seconds.

        Starts a thread that looks for a peer's call.
        `save`: None where a thread cannot read the state beside a pass, as what DeepSpeed has on NVMe.
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
        """Guard passes from the state after `step` steps: out of memory in here saves it first, unless it
        is."""
        if self._device.type == "cuda":
            self._updated = torch.cuda.Event()
            self._updated.record()
        is_saved = is_saved or self._save is None
        self._step, self._may_call = None if is_saved else step, True
        try:
            yield
        except Exception as error:
            if classify(error)[0] is OutOfMemoryError:
                # What the pass had made is held by the frames that the error came through.
                traceback.clear_frames(error.__traceback__)
                gc.collect()
                with contextlib.suppress(Exception):  # the error that led here is what must be told
                    if is_saved:
                        self._finish(_SECONDS_TO_SAVE)
                    elif self._may_call:
                        self._call_and_save(step)
            raise
        self._step = None

    def over(self) -> None:
        """Be about to tell the others what the passes came to: from then on none of them may be called."""
        self._may_call = False

    def _call_and_save(self, step: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        write_atomically(self._call, json.dumps({"step": step}) + "\n")
        # In a thread, as the peers do, because one that does not come would hold this rank for as long as
        # their group has patience.
        saving = threading.Thread(target=self._save_once, name="rescue", daemon=True)
        saving.start()
        began = since = time.monotonic()
        progress = here.save_progress
        while saving.is_alive() and (now := time.monotonic()) - began < _SECONDS_TO_SAVE:
            saving.join(_LOOK_SECONDS)
            if here.save_progress != progress:
                progress, since = here.save_progress, now
            # A peer that cannot come would be waited for until their group has no more patience. One that comes
            # has a part to write that is as large as this rank's.
            own = _TIMES_OWN_PART * (since - began)
            most = {"": _SECONDS_TO_ARRIVE, "waiting for the other ranks": max(_SECONDS_TO_ARRIVE, own)}
            if now - since > most.get(progress[0], _SECONDS_TO_SAVE):
                return

    def _save_once(self) -> None:
        """Save, once, without waiting for what the pass has begun."""
        if self._updated is not None:
            # The stream of the pass waits for messages that will not come: copy on another one, when the last
            # update is done.
            torch.cuda.set_device(self._device)
            self._updated.synchronize()
        with self._lock, torch.cuda.stream(torch.cuda.Stream() if self._updated is not None else None):
            if not self._is_saved and self._save is not None:
                self._is_saved = True
                self._save()

    def _listen(self) -> None:
        """Wait for a call; then, as soon as this rank too is in the pass of that step, save."""
        while not self._call.exists():
            time.sleep(self._seconds_between_looks)
        step = read_json(self._call)["step"]
        until = time.monotonic() + _SECONDS_TO_ARRIVE
        while self._step != step:
            if time.monotonic() > until:
                return
            time.sleep(0.1)
        self._save_once()
