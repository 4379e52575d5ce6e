"""Memory of a training step under FSDP2, block by block (torch 2.13)."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planner.limits import MOMENT_TABLES, NORM_ELEMENTS, WIDENED_BYTES, WIDENED_MOMENTS
from launcher.planner.memory.program import Segment, Unit
from launcher.planner.memory.timeline import (
    GATHERED,
    GRADIENTS,
    MESSAGES,
    OPTIMIZER,
    PARAMETERS,
    TEMPORARIES,
    Timeline,
    go_through,
)


@dataclass(frozen=True)
class FsdpCut:
    """The settings by which FSDP2 shards the training state among ranks."""

    ranks: int
    itemsize: int
    reshard: bool
    state_copies: int
    """The optimizer's fp32 tensors for each parameter; two in bf16 count as one."""
    cpu: bool
    copied_below: float
    """Bytes. gloo copies only messages smaller than this: none on GPUs, all between machines."""
    accumulation: int
    defers: bool
    """Whether gradients are accumulated unsharded until the last micro-batch, and reduced only then."""
    replicates: bool = False
    """Whether other ranks hold a copy of the same shard."""
    recomputes: bool = False
    plain: bool = False
    """Whether FSDP does not wrap the model: one rank in fp32."""
    leaves_frozen: bool = False
    """Whether FSDP does not wrap frozen parameters: on one rank, in the precision of the computation."""
    offloads: bool = False
    """Whether parameters, gradients and optimizer state are offloaded to host memory."""
    widens_moments: bool = False
    """Whether moments are stored in bf16, and converted to fp32 piece by piece in the optimizer's step."""


class FsdpStep:
    """A training step of one rank, as the blocks of its micro-batches."""

    def __init__(self, root: Unit, layers: list[Unit], cut: FsdpCut) -> None:
        self.root, self.layers, self.cut = root, layers, cut
        self.units = [*layers, root]
        self.time = Timeline()
        self.late: list[Unit] = []
        """Units whose input needs no gradient: FSDP frees them only at the end of the backward pass."""
        self.held = 0
        """Bytes of the last all-gather's result, kept in the forward pass until the next one is done."""
        self.sent = 0
        """Bytes of the last reduce-scatter's input."""
        self.first_gradients = True
        self.is_gathered = False
        """Whether the units that stay gathered between the micro-batches of a step are gathered already."""

    def states(self) -> dict[str, int]:
        """Return the bytes on the device between two steps, by kind, for the rank with the largest shards."""
        return {} if self.cut.offloads else self._shards()

    def host(self) -> int:
        """Return the bytes in host memory between two steps: offloaded shards, and their gradients."""
        if not self.cut.offloads:
            return 0
        trained = sum(unit.shard(self.cut.ranks, trained=True) for unit in self.units)
        return sum(self._shards().values()) + 4 * trained

    def _shards(self) -> dict[str, int]:
        """Return the bytes of parameters and optimizer state, on the device or offloaded."""
        parameters = sum(unit.shard(self.cut.ranks) for unit in self.units)
        narrow = sum(unit.narrow_shard(self.cut.ranks) for unit in self.units)
        trained = sum(unit.shard(self.cut.ranks, trained=True) for unit in self.units)
        spared = sum(unit.spared_shard(self.cut.ranks) for unit in self.units)
        in_bytes = any(one.in_bytes and one.trains for unit in self.units for one in unit.weights)
        return {
            PARAMETERS: 4 * parameters - (4 - self.cut.itemsize) * narrow,
            OPTIMIZER: 4 * self.cut.state_copies * trained - spared + MOMENT_TABLES * in_bytes,
        }

    def _gathered(self, unit: Unit) -> int:
        """Return the bytes of a gathered unit, with the padding that makes its shards equal."""
        return unit.shard(self.cut.ranks, trained=self.cut.leaves_frozen) * self.cut.ranks * self.cut.itemsize

    def _gather(self, unit: Unit) -> int:
        """Count the cast and the buffers of an all-gather, and return the bytes of its result."""
        cut = self.cut
        if cut.ranks == 1:
            return 0
        received = self._gathered(unit)
        cast = (
            0 if cut.itemsize == 4 else (unit.shard(cut.ranks) - unit.narrow_shard(cut.ranks)) * cut.itemsize
        )
        self.time.touch(MESSAGES, cast + received * (1 + (received < cut.copied_below)), "gathering")
        self.time.up(MESSAGES, received, "gathering")
        return received

    def _copy_out(self, unit: Unit) -> None:
        """Count the copy of a unit out of the all-gather's result."""
        if self.cut.ranks == 1:
            self.time.touch(GATHERED, self._gathered(unit) + self._cast_last(unit), "gathering")
        self.time.up(GATHERED, self._gathered(unit), "gathering")

    def _cast_last(self, unit: Unit) -> int:
        """Return the bytes of the largest parameter's cast, from which one rank copies each parameter.

        Parameters stored in the precision of the computation need none.
        """
        wide = max((weight.num_elements for weight in unit.weights if not weight.narrow), default=0)
        return wide * self.cut.itemsize * (self.cut.itemsize != 4)

    def _stays(self, unit: Unit) -> bool:
        """Return whether a unit stays gathered from one micro-batch to the next."""
        return unit is self.root or not self.cut.reshard

    def _gather_forward(self, unit: Unit) -> None:
        """Gather a unit for the forward pass, unless it is gathered already."""
        if self.is_gathered and self._stays(unit):
            return
        received = self._gather(unit)
        self.time.down(MESSAGES, self.held)
        self._copy_out(unit)
        self.held = received

    def reduce(self, unit: Unit, last: bool) -> None:
        """Count the reduce-scatter of a unit's gradients, or keep them for the next micro-batch."""
        cut, time = self.cut, self.time
        trained = unit.num_elements(trained=True)
        if cut.cpu and cut.defers and cut.itemsize != 4 and not self.first_gradients:
            # Gradients are accumulated before the unit is freed, on a CPU from copies in fp32.
            time.touch(TEMPORARIES, 4 * unit.largest_trained, "adding up gradients")
        if not last and cut.defers and trained:
            self._wait(unit, trained)
            return
        self._free(unit, last)
        if not trained:
            return
        own = trained * cut.itemsize
        if cut.defers and not self.first_gradients:
            time.down(GRADIENTS, own if cut.itemsize != 4 else 0)
            own = trained * 4
        time.down(MESSAGES, self.sent)
        padded = unit.shard(cut.ranks, trained=True)
        self.sent = padded * cut.ranks * 4
        time.up(MESSAGES, self.sent, "sending gradients")
        # The loop over the gradients leaves the last of them in its variable until the message is sent.
        left = own * unit.last_trained // trained if cut.ranks > 1 else 0
        time.down(GRADIENTS, own - left)
        time.up(GRADIENTS, padded * 4, "sending gradients")
        if cut.ranks > 1 and self.sent < cut.copied_below:
            time.touch(MESSAGES, self.sent, "sending gradients")
        if cut.cpu and cut.replicates:
            # gloo's all-reduce among the replicas of a shard allocates a copy of it.
            time.touch(MESSAGES, padded * 4, "sending gradients")
        time.down(GRADIENTS, left)
        if (not cut.defers and not self.first_gradients) or cut.offloads:
            time.down(GRADIENTS, padded * 4)

    def _free(self, unit: Unit, last: bool) -> None:
        """Free a gathered unit, unless it stays gathered for the next micro-batch."""
        if last or not self._stays(unit):
            self.time.down(GATHERED, self._gathered(unit))

    def _wait(self, unit: Unit, trained: int) -> None:
        """Keep a unit's gradients unsharded, in fp32, until the last micro-batch."""
        self._free(unit, last=False)
        if self.cut.itemsize == 4:
            return
        own = trained * self.cut.itemsize
        if self.first_gradients:
            self.time.touch(TEMPORARIES, unit.largest * 4, "gradients")
            self.time.up(GRADIENTS, trained * 4 - own, "gradients")
        else:
            self.time.down(GRADIENTS, own)

    def micro_step(self, segments: list[Segment], last: bool) -> None:
        """Go through one micro-batch: forward, and in training backward."""
        cut, time, layers = self.cut, self.time, self.layers
        if cut.plain:
            for segment in segments:
                go_through(time, segment, cut.recomputes)
            return
        self._gather_forward(self.root)
        for segment in (segment for segment in segments if not segment.backward):
            unit = layers[segment.layer] if segment.kind == "layer" else None
            if unit is not None:
                self._gather_forward(unit)
            go_through(time, segment, cut.recomputes)
            if unit is not None and cut.reshard:
                time.down(GATHERED, self._gathered(unit))
        time.down(MESSAGES, self.held)
        self.held = 0
        if any(segment.backward for segment in segments):
            self._backward(segments, last)

    def _backward(self, segments: list[Segment], last: bool) -> None:
        cut, time, layers = self.cut, self.time, self.layers
        passed = [segment for segment in segments if segment.backward]
        first = (
            None
            if any(segment.kind == "stem" for segment in passed)
            else min(segment.layer for segment in passed)
        )
        ahead = self._gather(layers[-1]) if cut.reshard else 0
        for segment in passed:
            unit = layers[segment.layer] if segment.kind == "layer" else None
            if unit is not None and cut.reshard:
                self._copy_out(unit)
                time.down(MESSAGES, ahead)
                ahead = self._gather(layers[segment.layer - 1]) if segment.layer > 0 else 0
            go_through(time, segment, cut.recomputes)
            if unit is not None and segment.layer != first:
                self.reduce(unit, last)
        time.down(MESSAGES, ahead if first else 0)
        self.reduce(self.root, last)
        if first is not None and first >= 0:
            self.reduce(layers[first], last)
            if not cut.reshard and last:
                time.down(GATHERED, sum(self._gathered(unit) for unit in layers[:first]))
        time.down(MESSAGES, self.sent)
        self.sent = 0
        self.first_gradients = False
        self.is_gathered = not last

    def _muon(self) -> None:
        """Count the exchange of matrices, one for each rank, and the update of an unsharded one.

        Rows are sent and received, and the update is in fp32. The iteration of torch.optim.Muon holds four
        matrices in bf16: the current one, two products of its shorter side, and the next one.
        """
        largest = max(
            (one for unit in self.units for one in unit.weights if one.by_muon and one.trains),
            key=lambda one: one.num_elements,
            default=None,
        )
        if largest is None:
            return
        whole, short = largest.num_elements, min(largest.shape)
        exchanged = 8 if self.cut.ranks > 1 else 0
        num_bytes = (4 + exchanged + 4 + 3 * 2) * whole + 2 * 2 * short * short
        self.time.touch(TEMPORARIES, num_bytes, "Muon")

    def _optimizer(self) -> None:
        """Count an optimizer's temporaries.

        Adafactor has the update of the largest shard, and pieces of it in fp64 for its norm. Moments in bf16
        have a piece in fp32, and the random numbers that round it. Those in 8 bits have a piece in fp32, and
        what finds its codes.
        """
        self._muon()
        weights = [one for unit in self.units for one in unit.weights if one.trains]
        parts = [one.shard(self.cut.ranks) for one in weights if one.factored]
        largest = max(parts, default=0)
        held = 4 * largest + 8 * min(NORM_ELEMENTS, largest)
        if self.cut.widens_moments and not self.cut.offloads:
            largest = max(unit.largest_shard(self.cut.ranks) for unit in self.units)
            held = 12 * min(WIDENED_MOMENTS, largest)
        if narrow := [one.shard(self.cut.ranks) for one in weights if one.in_bytes]:
            held = 17 * min(WIDENED_BYTES, max(narrow))
        self.time.touch(TEMPORARIES, held, "optimizer")

    def gradient_modes(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """Return how gradients are kept in a step's first micro-batch and in the later ones, as arguments of
        `Setting`."""
        return {}, {"accumulates": self.cut.itemsize == 4}

    def evaluate(self, segments: list[Segment]) -> Timeline:
        """Go through an evaluation's forward pass."""
        self.time.parts = self.states()
        self.micro_step(segments, True)
        self.time.touch(TEMPORARIES, 0, "between steps")
        self.time.parts = self.states()
        return self.time

    def step(self, first: list[Segment], more: list[Segment]) -> Timeline:
        """Go through a steady step. `more`: the blocks of a micro-batch that adds to existing gradients."""
        self.time.parts = self.states()
        self.time.peak = 0
        self.time.touch(TEMPORARIES, 0, "between steps")
        self.first_gradients, self.is_gathered = True, False
        for number in range(self.cut.accumulation):
            self.micro_step(first if number == 0 else more, number == self.cut.accumulation - 1)
        self._optimizer()
        if self.cut.cpu:
            # On a CPU the norm in fp64 is that of copies in fp64, piece by piece.
            largest = max(unit.largest_shard(self.cut.ranks) for unit in self.units)
            self.time.touch(TEMPORARIES, 8 * min(NORM_ELEMENTS, largest), "norm of the gradients")
        return self.time
