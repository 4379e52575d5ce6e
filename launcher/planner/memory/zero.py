"""Memory of a training step under DeepSpeed's ZeRO, block by block (0.19.8)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from launcher.planner.memory.program import Segment, Unit, Weight
from launcher.planner.memory.timeline import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    LOSS,
    MESSAGES,
    OPTIMIZER,
    PARAMETERS,
    RECOMPUTATION,
    TEMPORARIES,
    Timeline,
    leave,
)
from launcher.planner.memory.zero3_prefetch import END, Coordinator, Tracer


@dataclass(frozen=True)
class ZeroCut:
    """How ZeRO keeps the training state. Sizes are numbers of elements."""

    stage: int
    ranks: int
    itemsize: int
    state_copies: int
    cpu: bool
    copied_below: float
    """Bytes; gloo copies messages that are smaller, and no others: none on GPUs, all between machines."""
    accumulation: int
    reduce_bucket: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    sub_group: int
    recomputes: bool = False
    speaks: bool = True
    """Whether the loss multiplies with the output embeddings, outside of their module."""
    offloads_optimizer: bool = False
    """Masters, gradients and optimizer state of a rank's part are in the host's memory."""
    offloads_parameters: bool = False
    """The shards of stage 3 too."""


class ZeroStep:
    """Goes through the blocks of one micro-batch after another."""

    def __init__(self, root: Unit, layers: list[Unit], cut: ZeroCut) -> None:
        self.cut, self.layers, self.root = cut, layers, root
        inner = [weight for layer in layers for weight in layer.weights]
        self.weights: list[Weight] = [
            *root.weights[: root.num_first],
            *inner,
            *root.weights[root.num_first :],
        ]
        self.trained = sum(weight.num_elements for weight in self.weights if weight.trains)
        self.total = sum(weight.num_elements for weight in self.weights)
        self.time = Timeline()
        self.filled = 0
        """Elements in the bucket of gradients."""
        self.several = False
        """Whether it has more than one gradient."""
        self.unopened = self.sent = self.open_after = 0
        """Bytes of a rank's own part of the gradients that are not there yet; elements sent, and after how
        many of them it is."""

    def _part(self, num_elements: int) -> int:
        return -(-num_elements // self.cut.ranks)

    def _shares(self) -> list[tuple[int, int]]:
        """Of each rank: elements of all parameters of which it has any part, and of the largest part.

        DeepSpeed copies fp32 gradients of the former whole.
        """
        whole, largest = [0] * self.cut.ranks, [0] * self.cut.ranks
        groups: dict[Hashable, list[int]] = {}
        for weight in sorted(self.weights, key=lambda weight: len(weight.shape) < 2):
            if weight.trains:
                groups.setdefault((weight.group, len(weight.shape) >= 2), []).append(weight.num_elements)
        for trained in groups.values():
            part, begin = max(1, self._part(sum(trained))), 0
            for size in trained:
                for rank in range(begin // part, min(self.cut.ranks - 1, (begin + size - 1) // part) + 1):
                    whole[rank] += size
                    largest[rank] = max(
                        largest[rank], min(begin + size, (rank + 1) * part) - max(begin, rank * part)
                    )
                begin += size
        return list(zip(whole, largest, strict=True))

    def host(self) -> int:
        """Bytes of the host's memory for what is offloaded: masters, gradients, optimizer state, and stage
        3's own shards."""
        cut, part = self.cut, self._part(self.trained)
        shards = (
            cut.itemsize * (part + self._part(self.total - self.trained)) if cut.offloads_parameters else 0
        )
        return (4 * (2 + cut.state_copies) * part if cut.offloads_optimizer else 0) + shards

    def states(self) -> dict[str, int]:
        """Bytes of parameters, optimizer state and standing buffers between two steps."""
        cut, part = self.cut, self._part(self.trained)
        frozen = self.total - self.trained
        stored = self._stored()
        optimizer = 4 * cut.state_copies * part
        if cut.offloads_optimizer:
            return self._left_on_the_device()
        if cut.stage < 3:
            return {
                PARAMETERS: cut.itemsize * self.total + 4 * part + stored * self._part(frozen),
                OPTIMIZER: optimizer,
            }
        shards = 0 if cut.itemsize == 4 else cut.itemsize * part
        small = sum(weight.num_elements for weight in self.weights if weight.num_elements <= cut.persistence)
        parameters = 4 * part + shards + (stored + cut.itemsize) * self._part(frozen) + cut.itemsize * small
        return {
            PARAMETERS: parameters,
            OPTIMIZER: optimizer,
            GRADIENTS: 4 * part,
            MESSAGES: cut.reduce_bucket * 4,
        }

    def _stored(self) -> int:
        """Bytes of a frozen element that a rank keeps in fp32 for the checkpoint; beside an adapter, whose
        checkpoint has none of it, 0."""
        return 0 if any(weight.narrow for weight in self.weights) else 4

    def _left_on_the_device(self) -> dict[str, int]:
        """What the host's memory does not take: parameters in the computation's precision, frozen ones, the
        bucket of gradients."""
        cut, frozen, stored = self.cut, self._part(self.total - self.trained), self._stored()
        if cut.stage < 3:
            return {PARAMETERS: cut.itemsize * self.total + stored * frozen}
        small = sum(weight.num_elements for weight in self.weights if weight.num_elements <= cut.persistence)
        shards = 0 if cut.offloads_parameters else cut.itemsize * (self._part(self.trained) + frozen)
        return {PARAMETERS: shards + stored * frozen + cut.itemsize * small, MESSAGES: cut.reduce_bucket * 4}

    def gradient_mode(self) -> dict[str, bool]:
        """How a gradient is kept during the backward pass, as `Setting` says it."""
        if self.cut.stage == 1:
            return {"widens": self.cut.itemsize != 4, "accumulates": False}
        return {"widens": False, "accumulates": True}

    def step(self, first: list[Segment], more: list[Segment]) -> Timeline:
        """A steady step."""
        self.time.parts = self.states()
        self.time.touch(TEMPORARIES, 0, "between steps")
        if self.cut.stage == 3:
            self._stage_3(first)
        else:
            self._stages_1_and_2(first, more)
        return self.time

    def _go_through(self, segment: Segment) -> None:
        """One block; a full bucket of gradients is sent before the one that does not fit is put in."""
        time, where = self.time, f"{segment.kind}, {'backward' if segment.backward else 'forward'}"
        kind = (
            LOSS
            if segment.kind == "tail"
            else RECOMPUTATION
            if segment.backward and self.cut.recomputes
            else TEMPORARIES
        )
        for level, num_elements, highest in segment.gradients:
            time.touch(kind, highest, where)
            if self.filled and self.filled + num_elements > self.cut.reduce_bucket:
                self.sent += self.filled
                if self.sent > self.open_after:
                    time.parts[GRADIENTS] = time.parts.get(GRADIENTS, 0) + self.unopened
                    self.unopened = 0
                # What is larger than the bucket waits where it was made, and so does what it has to make room
                # for.
                waiting = self.cut.itemsize * self.filled if self.filled > self.cut.reduce_bucket else 0
                time.touch(
                    MESSAGES,
                    level + self._sending() + (waiting if self.cut.stage > 1 else 0),
                    "sending gradients",
                )
                self.filled = 0
            self.several = self.filled > 0
            self.filled += num_elements
        time.touch(kind, segment.rest, where)
        leave(time, segment)

    def forward(self, segments: list[Segment]) -> None:
        """The forward pass alone, of an evaluation."""
        whole = self._remembered(segments) if self.cut.stage == 3 else {}
        for segment in segments:
            self.time.parts[GATHERED] = self.cut.itemsize * whole.get(
                (segment.kind, segment.layer, segment.backward), 0
            )
            self._go_through(segment)

    def _sending(self) -> int:
        """Bytes that come and go while what fills the bucket is sent."""
        cut = self.cut
        if cut.stage == 3:
            # One fp32 gradient alone is sent as it lies, where it can be cut evenly; gloo may take a
            # copy of what it sends.
            alone = self.filled > cut.reduce_bucket and cut.itemsize == 4 and self.filled % cut.ranks == 0
            return 4 * ((4 * self.filled < cut.copied_below) + (not alone)) * self.filled
        if cut.stage == 1:
            return 0
        wide = 4 * (cut.itemsize != 4)
        if self.filled > cut.reduce_bucket:
            # One parameter that is larger than the bucket goes to one rank after another, in fp32 as it lies.
            return (wide and wide + cut.itemsize) * min(
                self.filled, max(cut.reduce_bucket, self._part(self.trained))
            )
        # It is put together in one message first, on one rank where it is of both groups, of those that decay
        # and of the others.
        return (wide + (cut.itemsize if cut.ranks > 1 or self.several else 0)) * self.filled

    def _stages_1_and_2(self, first: list[Segment], more: list[Segment]) -> None:
        """The rank that needs most: one whose gradients come first, one whose come last, or one that touches
        most parameters."""
        shares, begun, best = self._shares(), dict(self.time.parts), self.time
        ranks = {0, self.cut.ranks - 1, max(range(self.cut.ranks), key=lambda rank: shares[rank][0])}
        for rank in sorted(ranks) if self.cut.itemsize == 4 else [self.cut.ranks - 1]:
            self.time = Timeline(dict(begun))
            self.open_after = max(0, self.trained - (rank + 1) * self._part(self.trained))
            largest = shares[rank][1] if self.cut.itemsize == 4 else max(share[1] for share in shares)
            self._of_rank(first, more, shares[rank][0], largest)
            best = max(best, self.time, key=lambda time: time.peak)
        self.time = best

    def _of_rank(self, first: list[Segment], more: list[Segment], touching: int, piece: int) -> None:
        cut, time = self.cut, self.time
        part, wide, base = 4 * self._part(self.trained), cut.itemsize != 4, dict(time.parts)
        copied = part if wide else 4 * touching
        if cut.offloads_optimizer:
            # Of a rank's own part one parameter at a time is on the device, on its way to the host's memory.
            part = copied = 4 * max(unit.largest_trained for unit in (self.root, *self.layers))
        buffer = cut.reduce_bucket * (4 if cut.stage == 1 else cut.itemsize)
        for number in range(cut.accumulation):
            time.parts |= dict.fromkeys((ACTIVATIONS, LOSS), 0)  # of the micro-batch before, which is gone
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
            time.parts[GRADIENTS] = 4 * self.trained + copied
            time.touch(MESSAGES, buffer + batch[ACTIVATIONS], "sending gradients")
            # All but one of the whole gradients are gone with their copying, where they were copied, and all
            # of them where not.
            time.parts[GRADIENTS] = copied + wide * 4 * max(
                unit.largest_trained for unit in (self.root, *self.layers)
            )
            time.touch(TEMPORARIES, wide * buffer + 8 * piece * cut.cpu, "norm of the gradients")
        time.parts = dict(base)
        time.touch(GRADIENTS, part if wide else part + copied, "optimizer")
        time.touch(GRADIENTS, copied + 8 * piece * cut.cpu, "norm of the gradients")

    def _head(self) -> Weight | None:
        """The output embeddings: the last matrix, if it is as large as the first, the table of words; else
        that one, tied."""
        words, matrices = (
            self.root.weights[0],
            [weight for weight in self.root.weights if len(weight.shape) > 1],
        )
        return (
            next((weight for weight in reversed(matrices) if weight.shape == words.shape), None)
            if self.cut.speaks
            else None
        )

    def _whole(self, segments: list[Segment]) -> dict[tuple[str, int, bool], int]:
        """Elements that are whole during each block."""
        cut = self.cut
        head = self._head()
        trace = Tracer(self.root, self.layers, cut.persistence, head).trace(segments, cut.recomputes)
        external = frozenset({head.name} if head is not None else ())
        copied_below = cut.copied_below / cut.itemsize
        coordinator = Coordinator(
            trace, cut.prefetch_bucket, cut.max_live, cut.max_live, copied_below, external
        )
        return coordinator.go()

    def _stage_3(self, segments: list[Segment]) -> None:
        cut, time = self.cut, self.time
        whole = self._remembered(segments)
        for _ in range(cut.accumulation):
            for segment in segments:
                time.parts[GATHERED] = cut.itemsize * whole.get(
                    (segment.kind, segment.layer, segment.backward), 0
                )
                self._go_through(segment)
            large = self.filled if self.filled > cut.reduce_bucket else 0
            time.parts[GATHERED] = cut.itemsize * whole[END]
            time.touch(MESSAGES, self._sending() + cut.itemsize * large, "sending gradients")
            self.filled = 0

    def _remembered(self, segments: list[Segment]) -> dict[tuple[str, int, bool], int]:
        """`_whole`, gone through once for all micro-batches: it depends on the order of the blocks and not on
        their sizes."""
        cut = self.cut
        settings = (
            cut.ranks,
            cut.prefetch_bucket,
            cut.persistence,
            cut.max_live,
            cut.copied_below,
            cut.recomputes,
            cut.speaks,
        )
        weights = tuple(
            (weight.name, weight.shape, weight.viewed)
            for unit in (self.root, *self.layers)
            for weight in unit.weights
        )
        key = (
            settings,
            weights,
            tuple((segment.kind, segment.layer, segment.backward) for segment in segments),
        )
        if key not in _KNOWN:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = self._whole(segments)
        return _KNOWN[key]


_KNOWN: dict[Hashable, dict[tuple[str, int, bool], int]] = {}
_MOST_KNOWN = 32
"""Of a model of 126 layers one takes about 110 KB."""
