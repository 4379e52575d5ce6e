"""Memory of a training step under DeepSpeed's ZeRO, block by block (0.19.8)."""

from __future__ import annotations

from launcher.planner.limits import NORM_ELEMENTS
from launcher.planner.memory.program import Segment, Unit
from launcher.planner.memory.timeline import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    LOSS,
    MESSAGES,
    RECOMPUTATION,
    TEMPORARIES,
    Timeline,
    leave,
)
from launcher.planner.memory.zero3_gathered import gathered_elements
from launcher.planner.memory.zero3_prefetch import END
from launcher.planner.memory.zero_states import ZeroCut, ZeroStates


class ZeroStep:
    """A training step of one rank, as the blocks of its micro-batches."""

    def __init__(self, root: Unit, layers: list[Unit], cut: ZeroCut) -> None:
        self.cut, self.layers, self.root = cut, layers, root
        self.kept = ZeroStates(root, layers, cut)
        self.time = Timeline()
        self.filled = 0
        """Elements in the gradient bucket."""
        self.several = False
        """Whether the bucket has more than one gradient."""
        self.unopened = 0
        """Bytes of a rank's own partition of the gradients, until it is allocated."""
        self.sent = self.open_after = 0
        """Elements sent so far, and the number after which that partition is allocated."""

    def states(self) -> dict[str, int]:
        """Return the bytes on the device between two steps, by kind."""
        return self.kept.on_device()

    def host(self) -> int:
        """Return the bytes that are offloaded to host memory."""
        return self.kept.on_host()

    def gradient_modes(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """Return how gradients are kept in a step's first micro-batch and in the later ones, as arguments of
        `Setting`."""
        if self.cut.stage == 1:
            return {"widens": self.cut.itemsize != 4}, {"accumulates": True}
        return {"accumulates": True}, {"accumulates": True}

    def step(self, first: list[Segment], more: list[Segment]) -> Timeline:
        """Go through a steady step. `more`: the blocks of a micro-batch that adds to existing gradients."""
        self.time.parts = self.states()
        self.time.touch(TEMPORARIES, 0, "between steps")
        if self.cut.stage == 3:
            self._stage_3(first)
        else:
            self._stages_1_and_2(first, more)
        return self.time

    def _go_through(self, segment: Segment) -> None:
        """Go through one block. The bucket is sent before a gradient that does not fit is added."""
        time, where = self.time, f"{segment.kind}, {'backward' if segment.backward else 'forward'}"
        recomputes = segment.backward and self.cut.recomputes
        kind = LOSS if segment.kind == "tail" else RECOMPUTATION if recomputes else TEMPORARIES
        for level, num_elements, highest in segment.gradients:
            time.touch(kind, highest, where)
            if self.filled and self.filled + num_elements > self.cut.reduce_bucket:
                self.sent += self.filled
                if self.sent > self.open_after:
                    time.parts[GRADIENTS] = time.parts.get(GRADIENTS, 0) + self.unopened
                    self.unopened = 0
                # A gradient larger than the bucket stays where it was computed, and so does the next one, for
                # which the bucket is emptied.
                waiting = self.cut.itemsize * self.filled if self.filled > self.cut.reduce_bucket else 0
                waiting = waiting if self.cut.stage > 1 else 0
                time.touch(MESSAGES, level + self._sending() + waiting, "sending gradients")
                self.filled = 0
            self.several = self.filled > 0
            self.filled += num_elements
        time.touch(kind, segment.rest, where)
        leave(time, segment)

    def evaluate(self, segments: list[Segment]) -> Timeline:
        """Go through an evaluation's forward pass."""
        self.time.parts = self.states()
        gathered = self._gathered(segments) if self.cut.stage == 3 else {}
        for segment in segments:
            self.time.parts[GATHERED] = gathered.get((segment.kind, segment.layer, segment.backward), 0)
            self._go_through(segment)
        self.time.touch(TEMPORARIES, 0, "between steps")
        self.time.parts = self.states()
        return self.time

    def _gathered(self, segments: list[Segment]) -> dict[tuple[str, int, bool], int]:
        """Return the bytes of parameters that stage 3 has gathered during each block, and at the end."""
        elements = gathered_elements(self.root, self.layers, self.cut, segments)
        return {block: self.cut.itemsize * number for block, number in elements.items()}

    def _sending(self) -> int:
        """Return the bytes that are allocated only while the bucket is sent."""
        cut = self.cut
        if cut.stage == 3:
            # A single fp32 gradient is sent without a copy if it divides evenly; gloo may copy its messages.
            alone = self.filled > cut.reduce_bucket and cut.itemsize == 4 and self.filled % cut.ranks == 0
            return 4 * ((4 * self.filled < cut.copied_below) + (not alone)) * self.filled
        if cut.stage == 1:
            return 0
        wide = 4 * (cut.itemsize != 4)
        if self.filled > cut.reduce_bucket:
            # A gradient larger than the bucket is sent rank by rank; in fp32 it is not copied.
            return (wide and wide + cut.itemsize) * min(
                self.filled, max(cut.reduce_bucket, self.kept.part(self.kept.trained))
            )
        # Gradients are first concatenated to one message; on one rank only if they belong to both groups,
        # with and without weight decay.
        return (wide + (cut.itemsize if cut.ranks > 1 or self.several else 0)) * self.filled

    def _stages_1_and_2(self, first: list[Segment], more: list[Segment]) -> None:
        """Go through the step as the rank that needs the most memory.

        It is the first one, the last one, or the one with parts of the most elements.
        """
        touched, begun, best = self.kept.touched(), dict(self.time.parts), self.time
        ranks = {0, self.cut.ranks - 1, max(range(self.cut.ranks), key=lambda rank: touched[rank][0])}
        for rank in sorted(ranks) if self.cut.itemsize == 4 else [self.cut.ranks - 1]:
            self.time = Timeline(dict(begun))
            self.open_after = max(0, self.kept.trained - (rank + 1) * self.kept.part(self.kept.trained))
            largest = touched[rank][1] if self.cut.itemsize == 4 else max(own for _, own in touched)
            self._as_rank(first, more, touched[rank][0], largest)
            best = max(best, self.time, key=lambda time: time.peak)
        self.time = best

    def _as_rank(self, first: list[Segment], more: list[Segment], touching: int, piece: int) -> None:
        """Go through the step as one rank.

        `touching`: elements of all parameters of which it has a part. `piece`: elements of its largest part.
        """
        cut, time = self.cut, self.time
        part, wide, base = 4 * self.kept.part(self.kept.trained), cut.itemsize != 4, dict(time.parts)
        copied = part if wide else 4 * touching
        if cut.offloads_optimizer:
            # One parameter of a rank's own partition at a time is on the device, on its way to host memory.
            part = copied = 4 * max(unit.largest_trained for unit in (self.root, *self.layers))
        buffer = cut.reduce_bucket * (4 if cut.stage == 1 else cut.itemsize)
        widened = 8 * min(NORM_ELEMENTS, piece) * cut.cpu
        for number in range(cut.accumulation):
            time.parts |= dict.fromkeys((ACTIVATIONS, LOSS), 0)  # the last micro-batch's are freed
            kept, self.sent = dict(time.parts), 0
            self.unopened = copied if cut.stage == 2 and (number == 0 or not wide) else 0
            for segment in first if number == 0 else more:
                time.parts[MESSAGES] = kept.get(MESSAGES, 0) + (
                    buffer if number > 0 or segment.backward else 0
                )
                self._go_through(segment)
            time.parts[MESSAGES] = kept.get(MESSAGES, 0)
            batch = {ACTIVATIONS: max(0, sum(time.parts.get(kind, 0) for kind in (ACTIVATIONS, LOSS)))}
            if cut.stage == 2:
                time.parts = base | batch
                time.parts[GRADIENTS] = copied * (2 if number > 0 and not wide else 1)
                large = self.filled if self.filled > cut.reduce_bucket else 0
                time.touch(MESSAGES, buffer + self._sending() + cut.itemsize * large, "sending gradients")
                time.parts[GRADIENTS] = copied
            if cut.stage == 2 or number == cut.accumulation - 1:
                self.filled = 0
        time.parts = dict(base)
        if cut.stage == 1:
            time.parts[GRADIENTS] = 4 * self.kept.trained + copied
            time.touch(MESSAGES, buffer + batch[ACTIVATIONS], "sending gradients")
            # Copying frees all unsharded gradients but one; if none are copied, all are freed.
            time.parts[GRADIENTS] = copied + wide * 4 * max(
                unit.largest_trained for unit in (self.root, *self.layers)
            )
            time.touch(TEMPORARIES, wide * buffer + widened, "norm of the gradients")
        time.parts = dict(base)
        time.touch(GRADIENTS, (part if wide else part + copied) + self.kept.widened(), "optimizer")
        time.touch(GRADIENTS, copied + widened, "norm of the gradients")

    def _stage_3(self, segments: list[Segment]) -> None:
        cut, time = self.cut, self.time
        gathered = self._gathered(segments)
        for _ in range(cut.accumulation):
            for segment in segments:
                time.parts[GATHERED] = gathered.get((segment.kind, segment.layer, segment.backward), 0)
                self._go_through(segment)
            large = self.filled if self.filled > cut.reduce_bucket else 0
            time.parts[GATHERED] = gathered[END]
            time.touch(MESSAGES, self._sending() + cut.itemsize * large, "sending gradients")
            self.filled = 0
        time.touch(TEMPORARIES, self.kept.widened(), "optimizer")
