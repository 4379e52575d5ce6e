"""A training step under FSDP2, block by block: what is gathered, kept and sent between the blocks of a model (torch 2.13)."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.planning.footprint.program import Segment, Unit


@dataclass(frozen=True)
class Cut:
    """How the training state lies."""

    ranks: int
    itemsize: int
    reshard: bool
    state_copies: int
    """fp32 tensors of the optimizer for each parameter."""
    gloo: bool
    """Collectives go through gloo, which copies what it sends."""
    accumulation: int
    defers: bool
    plain: bool = False
    """Not FSDP at all: one rank in fp32."""


@dataclass
class Timeline:
    """Bytes live now and at most, and of what the highest moment was made."""

    level: int = 0
    peak: int = 0
    where: str = ""
    gathered: int = 0
    buffers: int = 0
    gradients: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)

    def up(self, num_bytes: float, where: str = "") -> None:
        self.level += int(num_bytes)
        self.touch(0, where)

    def down(self, num_bytes: float) -> None:
        self.level -= int(num_bytes)

    def touch(self, num_bytes: float, where: str = "") -> None:
        """Something taken and given back."""
        if self.level + num_bytes > self.peak:
            self.peak, self.where = int(self.level + num_bytes), where


class FsdpStep:
    """Goes through the blocks of one micro-batch after another."""

    def __init__(self, root: Unit, layers: list[Unit], cut: Cut) -> None:
        self.root, self.layers, self.cut = root, layers, cut
        self.units = [*layers, root]
        self.time = Timeline()
        self.held = 0
        """Bytes of the result of the last gathering, kept in the forward pass until the next one is in place."""
        self.sent = 0
        """Bytes of the gradients that were sent last."""
        self.first_gradients = True

    def states(self) -> int:
        """Bytes of parameters and optimizer state of the largest rank."""
        parameters = sum(unit.shard(self.cut.ranks) for unit in self.units)
        trained = sum(unit.shard(self.cut.ranks, trained=True) for unit in self.units)
        return 4 * (parameters + self.cut.state_copies * trained)

    def sharded_gradients(self) -> int:
        return 4 * sum(unit.shard(self.cut.ranks, trained=True) for unit in self.units)

    def _whole(self, unit: Unit) -> int:
        return unit.shard(self.cut.ranks) * self.cut.ranks * self.cut.itemsize

    def _gather(self, unit: Unit) -> int:
        """The message: cast, sent, received; the bytes that remain of it."""
        cut = self.cut
        if cut.ranks == 1:
            return 0
        received = self._whole(unit)
        cast = 0 if cut.itemsize == 4 else unit.shard(cut.ranks) * cut.itemsize
        self.time.touch(cast + received * (2 if cut.gloo else 1), "gathering")
        self.time.up(received, "gathering")
        return received

    def _copy_out(self, unit: Unit) -> None:
        if self.cut.ranks == 1:
            self.time.touch(self._whole(unit) + unit.largest * self.cut.itemsize * (self.cut.itemsize != 4), "gathering")
        self.time.up(self._whole(unit), "gathering")

    def forward_gather(self, unit: Unit) -> None:
        received = self._gather(unit)
        self.time.down(self.held)
        self._copy_out(unit)
        self.held = received

    def let_go(self) -> None:
        self.time.down(self.held)
        self.held = 0

    def reduce(self, unit: Unit, last: bool) -> None:
        """After a unit's backward pass: its gradients leave, or wait for the next micro-batch."""
        cut, time = self.cut, self.time
        trained = unit.num_elements(trained=True)
        if not trained:
            time.down(self._whole(unit))
            return
        own = trained * cut.itemsize
        if not last and cut.defers:
            time.down(self._whole(unit))
            if cut.itemsize == 4:
                return
            if self.first_gradients:
                time.touch(unit.largest * 4, "gradients")
                time.up(trained * 4 - own, "gradients")
            else:
                time.down(own)
            return
        if cut.defers and not self.first_gradients:
            time.down(own if cut.itemsize != 4 else 0)
            own = trained * 4
        time.down(self._whole(unit))
        time.down(self.sent)
        padded = unit.shard(cut.ranks, trained=True)
        time.up(padded * cut.ranks * 4, "sending gradients")
        # The loop over the gradients leaves the last of them in its variable until the message is sent.
        left = own * unit.last_trained // trained if cut.ranks > 1 else 0
        time.down(own - left)
        time.up(padded * 4, "sending gradients")
        if cut.gloo and cut.ranks > 1:
            time.touch(padded * cut.ranks * 4, "sending gradients")
        time.down(left)
        self.sent = padded * cut.ranks * 4
        if not cut.defers and not self.first_gradients:
            time.down(padded * 4)

    def plain_step(self, segments: list[Segment]) -> None:
        """Without any sharding: gradients stay where they were made."""
        for segment in segments:
            self._go_through(segment)

    def micro_step(self, segments: list[Segment], last: bool) -> None:
        """One micro-batch, forward and backward."""
        cut, time, layers = self.cut, self.time, self.layers
        self.forward_gather(self.root)
        for segment in (segment for segment in segments if not segment.backward):
            unit = layers[segment.layer] if segment.kind == "layer" else None
            if unit is not None and (cut.reshard or self._not_gathered(segment.layer)):
                self.forward_gather(unit)
            self._go_through(segment)
            if unit is not None and cut.reshard:
                time.down(self._whole(unit))
        self.let_go()
        ahead = self._gather(layers[-1]) if cut.reshard else 0
        for segment in (segment for segment in segments if segment.backward):
            unit = layers[segment.layer] if segment.kind == "layer" else None
            if unit is not None and cut.reshard:
                self._copy_out(unit)
                time.down(ahead)
                ahead = self._gather(layers[segment.layer - 1]) if segment.layer > 0 else 0
            self._go_through(segment)
            if unit is not None:
                self.reduce(unit, last)
        self.reduce(self.root, last)
        time.down(self.sent)
        self.sent = 0
        self.first_gradients = False

    def _not_gathered(self, layer: int) -> bool:
        return True

    def _go_through(self, segment: Segment) -> None:
        where = f"{segment.kind}, {'backward' if segment.backward else 'forward'}"
        self.time.touch(segment.peak, where)
        self.time.up(segment.added)

    def step(self, first: list[Segment], more: list[Segment]) -> Timeline:
        """A steady step: micro-batches, the norm of the gradients, the optimizer. `more` are the blocks where gradients are there already."""
        self.time.level = self.time.peak = self.states()
        self.first_gradients = True
        for number in range(self.cut.accumulation):
            segments = first if number == 0 else more
            if self.cut.plain:
                self.plain_step(segments)
            else:
                self.micro_step(segments, number == self.cut.accumulation - 1)
        return self.time


def spread(segments: list[Segment]) -> list[Segment]:
    """The blocks of a model of which some layers were left out, with all of them: they are as the one before the gap."""
    result: list[Segment] = []
    for segment in segments:
        before = result[-1] if result else None
        if before is not None and segment.kind == before.kind == "layer" and segment.backward == before.backward:
            step = -1 if segment.backward else 1
            inner = segment if segment.backward else before
            missing = range(before.layer + step, segment.layer, step)
            result += [Segment("layer", number, inner.backward, inner.added, inner.peak) for number in missing]
        result.append(segment)
    return result
