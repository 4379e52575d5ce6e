"""A training step under DeepSpeed's ZeRO, block by block (0.19.8): its partitions, buckets and gathered parameters."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planning.footprint.program import Segment, Unit, Weight
from launcher.planning.footprint.timeline import (
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
)


@dataclass(frozen=True)
class ZeroCut:
    """How ZeRO keeps the training state. Sizes are numbers of elements."""

    stage: int
    ranks: int
    itemsize: int
    state_copies: int
    gloo: bool
    accumulation: int
    reduce_bucket: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    sub_group: int
    recomputes: bool = False


class ZeroStep:
    """Goes through the blocks of one micro-batch after another."""

    def __init__(self, root: Unit, layers: list[Unit], cut: ZeroCut) -> None:
        self.cut, self.layers, self.root = cut, layers, root
        self.weights: list[Weight] = [*root.weights, *(weight for layer in layers for weight in layer.weights)]
        self.trained = sum(weight.num_elements for weight in self.weights if weight.trains)
        self.total = sum(weight.num_elements for weight in self.weights)
        self.time = Timeline()
        self.filled = 0
        """Elements in the bucket of gradients."""

    def _part(self, num_elements: int) -> int:
        return -(-num_elements // self.cut.ranks)

    def states(self) -> dict[str, int]:
        """Bytes of parameters, optimizer state and standing buffers between two steps."""
        cut, part = self.cut, self._part(self.trained)
        frozen = self.total - self.trained
        optimizer = 4 * cut.state_copies * part
        if cut.stage < 3:
            return {PARAMETERS: cut.itemsize * self.total + 4 * part + 4 * self._part(frozen), OPTIMIZER: optimizer}
        shards = 0 if cut.itemsize == 4 else cut.itemsize * part
        small = sum(weight.num_elements for weight in self.weights if weight.num_elements <= cut.persistence)
        parameters = 4 * part + shards + (4 + cut.itemsize) * self._part(frozen) + cut.itemsize * small
        return {PARAMETERS: parameters, OPTIMIZER: optimizer, GRADIENTS: 4 * part, MESSAGES: cut.reduce_bucket * 4}

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

    def _go_through(self, segment: Segment, sending: int) -> None:
        """One block; a full bucket of gradients is sent before the one that does not fit is put in."""
        time, where = self.time, f"{segment.kind}, {'backward' if segment.backward else 'forward'}"
        kind = LOSS if segment.kind == "tail" else RECOMPUTATION if segment.backward and self.cut.recomputes else TEMPORARIES
        time.touch(kind, segment.peak, where)
        for level, num_elements in segment.gradients:
            if self.filled and self.filled + num_elements > self.cut.reduce_bucket:
                time.touch(MESSAGES, level + sending * self.filled, "sending gradients")
                self.filled = 0
            self.filled += num_elements
        time.up(GRADIENTS, segment.made)
        time.up(LOSS if segment.kind == "tail" else ACTIVATIONS, segment.added - segment.made)

    def forward(self, segments: list[Segment]) -> None:
        """The forward pass alone, of an evaluation."""
        if self.cut.stage == 3:
            self.time.parts[GATHERED] = self.cut.itemsize * min(self.total, 2 * self.cut.max_live)
        for segment in segments:
            self._go_through(segment, 0)

    def _stages_1_and_2(self, first: list[Segment], more: list[Segment]) -> None:
        cut, time = self.cut, self.time
        part, wide, base = 4 * self._part(self.trained), cut.itemsize != 4, dict(time.parts)
        buffer = cut.reduce_bucket * (4 if cut.stage == 1 else cut.itemsize)
        sending = (2 + 4 if wide else 4) if cut.stage == 2 else 0
        for number in range(cut.accumulation):
            kept = dict(time.parts)
            for segment in first if number == 0 else more:
                begun = number > 0 or (segment.backward and segment.kind != "tail")
                buffers = buffer if number > 0 or segment.backward else 0
                parts = part * begun + (0 if wide else part * (number > 0 and segment.backward)) if cut.stage == 2 else 0
                time.parts[MESSAGES] = kept.get(MESSAGES, 0) + buffers
                time.parts[GRADIENTS] = time.parts.get(GRADIENTS, 0) + parts
                self._go_through(segment, sending)
                time.down(GRADIENTS, parts)
            time.parts[MESSAGES] = kept.get(MESSAGES, 0)
            if cut.stage == 2:
                time.parts = dict(base)
                time.parts[GRADIENTS] = part
                time.touch(MESSAGES, buffer + sending * self.filled, "sending gradients")
                time.parts = dict(base)
            if cut.stage == 2 or number == cut.accumulation - 1:
                self.filled = 0
        time.parts = dict(base)
        if cut.stage == 1:
            time.parts[GRADIENTS] = 4 * self.trained + part
            time.touch(MESSAGES, buffer, "sending gradients")
        time.parts = dict(base)
        time.touch(GRADIENTS, part if wide else 2 * part, "optimizer")

    def _stage_3(self, segments: list[Segment]) -> None:
        cut, time = self.cut, self.time
        near = {index for index in range(len(self.layers)) if len(self.layers) - index <= 4}
        sending = 4 * ((2 if cut.itemsize != 4 else 1) + (1 if cut.gloo else 0))
        for _ in range(cut.accumulation):
            for segment in segments:
                turning = segment.kind == "tail" or segment.layer in near
                time.parts[GATHERED] = cut.itemsize * min(self.total, 2 * cut.max_live if turning else cut.max_live + cut.prefetch_bucket)
                self._go_through(segment, sending)
            self.filled = 0
