"""Saving and loading of checkpoints over all ranks: complete, durable and verified, or never used."""

from __future__ import annotations

import functools
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from launcher.errors import CheckpointError
from launcher.planner.plan import Plan
from launcher.runs import retention
from launcher.runs.checkpoints import FileRecord, Progress, Stored, content_problems, list_checkpoints
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory, make_directory
from launcher.runs.places import here
from launcher.training.checkpoint import messages
from launcher.training.checkpoint.committing import Leader, Saving, has_no_room
from launcher.training.checkpoint.group import Ranks, RefusedError, describe
from launcher.training.checkpoint.reader import CheckpointReader
from launcher.training.checkpoint.save_layout import Layout, Tensors, plan_save
from launcher.training.checkpoint.storage import METADATA_NAME, Image, live_blocks
from launcher.training.checkpoint.underway import Underway, told
from launcher.training.checkpoint.writing import write_hashed

Blocks = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class _Save(Saving):
    """One save in progress, with this rank's part of it."""

    layout: Layout | None
    blocks: Blocks


class Checkpointer:
    """The checkpoints of one run; `open` them first. Every method but `finish_here` is collective: all ranks
    call it, in the same order.

    A save that fails on any rank fails for all: its files are removed, the event `save_failed` gives the reason,
    a warning is printed, and training continues with the existing checkpoints.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        rank: int,
        world_size: int,
        write_event: Callable[..., None] = event,
    ) -> None:
        """Store the arguments for `open`. `write_event(path, name, **fields)` is also called from the background
        thread."""
        self._run, self._plan = run, plan
        self._rank, self._world_size, self._event = rank, world_size, write_event
        self._num_saves = 0
        self._layout: Layout | None = None
        self._step = 0
        """The step of the save that was started last."""
        self.problem: str | None = None
        """The reason why the last finished save failed; None if it succeeded."""

    def open(self, read_only: bool = False) -> Self:
        """Connect to the other ranks and remove leftovers of dead attempts; return the checkpointer itself.

        The process that started the ranks must hold the run's lock. With more than one rank, the default process
        group must exist. `read_only` leaves all files unchanged.
        """
        self._ranks = Ranks(self._rank, self._world_size)
        run_id, self._nonce = self._ranks.from_first(functools.partial(self._prepare, read_only))
        self._underway = Underway(self._rank, self._world_size, self._plan.hang_after)
        self._leader = Leader(self._run, self._plan, run_id, self._world_size, self._event)
        return self

    def _prepare(self, read_only: bool) -> tuple[str, str]:
        if not read_only:
            make_directory(self._run.checkpoints)
            retention.remove_leftovers(self._run)
        return self._run.run_id(), secrets.token_hex(4)

    def save(
        self,
        tensors: Tensors,
        progress: Progress,
        metrics: dict[str, float] | None = None,
        wait: bool = False,
    ) -> bool:
        """Save the tensors (the same names on every rank) as the checkpoint of `progress.step`.

        The save is asynchronous unless the job disables that or `wait` is set; the tensors may change once it
        returns. It first waits for a save in progress. A save that hangs is given up after a time limit, and
        nothing is saved until its storage responds. Return False if this save is known to have failed, which is
        always known with `wait`; otherwise `finish` returns it.
        """
        begin = time.perf_counter()
        if not self._finished():
            if self._rank == 0:
                self._leader.failing.failed(progress.step, self.problem or "", not wait)
            return False
        self._num_saves += 1
        name = f"{retention.ATTEMPT_PREFIX}{progress.step:08d}-{self._nonce}{self._num_saves:04d}"
        attempt = self._run.checkpoints / name
        asynchronous = self._plan.checkpoint.asynchronous and not wait
        layout: Layout | None = None
        blocks: Blocks
        try:
            layout = self._layout = plan_save(tensors, self._ranks, self._layout)
            live = functools.partial(live_blocks, layout.file, layout.planner, tensors)
            blocks = self._staged(layout, tensors) if asynchronous else live
        except Exception as error:
            blocks = functools.partial(_refuse, describe(error))
        self._step = progress.step
        save = _Save(
            progress.model_copy(deep=True), dict(metrics or {}), attempt, begin, wait, layout, blocks
        )
        self._underway.start(functools.partial(self._write, save))
        return asynchronous or self.finish()

    def finish(self) -> bool:
        """Wait for the save in progress until it ends or is given up. Return whether the last save succeeded.
        Called by all ranks together."""
        self._finished()
        return self.problem is None

    def finish_here(self, seconds: float) -> None:
        """Wait up to `seconds` for this rank's part of the save in progress. Not collective: for a rank that is
        about to leave alone."""
        self._underway.wait_here(seconds)

    def _finished(self) -> bool:
        """Wait for the save in progress; return False if it was given up and its thread may still write."""
        was_given_up = self._underway.is_given_up
        reason = self._underway.wait()
        if reason is None:
            if self._underway.ranks_lost:
                self._ranks, self._underway.ranks_lost = Ranks(self._rank, self._world_size), False
            return True
        self.problem = reason
        if self._rank == 0 and not was_given_up:
            self._leader.given_up(self._step, reason)
        return False

    def _staged(self, layout: Layout, tensors: Tensors) -> Blocks:
        if layout.image is None:
            layout.image = Image(layout.file, pinned=self._plan.mesh.device == "cuda")
        layout.image.fill(layout.planner, tensors)
        return layout.image.blocks

    def _write(self, save: _Save) -> None:
        """Write this rank's files, then commit if every rank succeeded. Runs in the background thread and never
        raises."""
        try:
            reason, is_full = self._try(save)
            if is_full and self._ranks.from_first(functools.partial(self._leader.make_room, save)):
                save = replace(save, attempt=save.attempt.with_name(f"{save.attempt.name}-again"))
                reason, _ = self._try(save)
        except Exception as error:
            reason, self._underway.ranks_lost = f"the ranks lost each other: {describe(error)}", True
        here.saving("")
        here.save_took(time.perf_counter() - save.begin)
        if self._underway.is_given_up:
            shutil.rmtree(save.attempt, ignore_errors=True)
            return
        self.problem = reason
        if reason is not None and self._rank == 0:
            self._leader.failed(save, reason)

    def _try(self, save: _Save) -> tuple[str | None, bool]:
        """Write and commit. Return the reason of a failure, or None, and whether the disk was full."""
        here.saving("writing", step=save.progress.step)
        problem: str | None = None
        is_full = False
        files: dict[str, Any] = {}
        try:
            files = messages.of_files(self._write_files(save))
        except Exception as error:
            problem, is_full = describe(error), has_no_room(error)
        here.saving("waiting for the other ranks")
        if self._underway.is_given_up:
            problem = "it was given up"
        gathered = self._ranks.all_gather((problem, is_full, files))
        if failures := _failures([reason for reason, _, _ in gathered]):
            return failures, any(full for _, full, _ in gathered)
        records = {
            name: record for _, _, written in gathered for name, record in messages.files(written).items()
        }
        reason, is_full = self._ranks.from_first(functools.partial(self._leader.commit, save, records))
        return reason, is_full

    def _write_files(self, save: _Save) -> dict[str, FileRecord]:
        save.attempt.mkdir(exist_ok=True)
        layout = save.layout
        files: dict[str, FileRecord] = {}
        blocks = save.blocks()
        if layout is None or layout.file.slots:
            name = layout.file.name if layout else "nothing"
            here.saving("writing", detail=name)
            files[name] = write_hashed(save.attempt / name, told(blocks, name))
        if self._rank == 0 and layout is not None:
            metadata = iter([memoryview(layout.metadata)])
            files[METADATA_NAME] = write_hashed(save.attempt / METADATA_NAME, metadata)
        return files

    def load(self, tensors: Tensors, step: int | None = None, until: int | None = None) -> Progress | None:
        """Fill the tensors in place, with any sharding, from the newest checkpoint that verifies, or from
        that of `step`.

        `until` limits the step. Return None if the run has no such checkpoint yet. Raises CheckpointError if
        there are some but none is complete, if that of `step` is missing or damaged, and if names, shapes or
        dtypes do not match.
        """
        self.finish()
        entries = self._ranks.from_first(lambda: [*map(messages.of_stored, list_checkpoints(self._run))])
        listed = [messages.stored(self._run, *entry) for entry in entries]
        if until is not None:
            listed = [stored for stored in listed if stored.step <= until]
        wanted = [stored for stored in reversed(listed) if step is None or stored.step == step]
        rejected: list[Stored] = []
        for stored in wanted:
            problems = self._verify(stored)
            if not problems and stored.manifest is not None:
                self._read(stored, tensors)
                self._leader.read(stored.step)
                return stored.manifest.progress
            rejected.append(Stored(stored.step, stored.directory, stored.manifest, tuple(problems)))
            if self._rank == 0:
                self._leader.passed_over(stored, problems)
        if step is None and not listed:
            return None
        raise CheckpointError(self._refusal(listed, rejected, step))

    def remove(self, steps: Collection[int]) -> None:
        """Delete the checkpoints of these steps and wait until they are gone. One that cannot be deleted stays,
        with a warning."""
        self._ranks.from_first(functools.partial(self._leader.remove, steps))

    def _verify(self, stored: Stored) -> list[str]:
        """Return the problems of a checkpoint; each rank reads its share of the bytes."""
        if stored.problems or stored.manifest is None:
            return list(stored.problems)
        largest_first = sorted(stored.manifest.files.items(), key=lambda entry: (-entry[1].bytes, entry[0]))
        mine = dict(largest_first[self._rank :: self._world_size])
        num_threads = max(1, self._plan.mesh.threads_per_rank)
        gathered = self._ranks.all_gather(content_problems(stored.directory, mine, num_threads=num_threads))
        return [problem for problems in gathered for problem in problems]

    def _read(self, stored: Stored, tensors: Tensors) -> None:
        problem = None
        try:
            CheckpointReader(stored.directory).load_into(tensors)
        except Exception as error:
            known = isinstance(error, CheckpointError)
            problem = str(error) if known else f"{stored.name}: {describe(error)}"
        for rank, reason in enumerate(self._ranks.all_gather(problem)):
            if reason:
                raise CheckpointError(reason if rank == 0 else f"rank {rank}: {reason}")

    def _refusal(self, listed: list[Stored], rejected: list[Stored], step: int | None) -> str:
        reasons = "; ".join(f"{stored.name}: {', '.join(stored.problems)}" for stored in rejected)
        if step is None:
            name = self._run.path.name
            return f"none of the checkpoints of {name} is whole ({reasons}); move them away to start over"
        others = [stored for stored in reversed(listed) if stored.step != step]
        good = next((stored.step for stored in others if not self._verify(stored)), None)
        instead = "no other checkpoint is whole" if good is None else f"the newest good one is step {good}"
        return f"step {step}: {reasons or 'there is no such checkpoint'}; {instead}"


def _refuse(reason: str) -> Iterator[memoryview]:
    raise RefusedError(reason)


def _failures(reasons: list[str | None]) -> str:
    """Return all ranks' reasons as one text; a reason common to all appears once."""
    if reasons[0] is not None and len(set(reasons)) == 1:
        return reasons[0]
    failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    return "; ".join([*failed[:3], *([f"and {len(failed) - 3} more ranks"] if len(failed) > 3 else [])])
