"""Count the training state that a rank keeps between two steps under DeepSpeed's ZeRO (0.19.8)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from launcher.planner.limits import WIDENED_MOMENTS
from launcher.planner.memory.program import Unit, Weight
from launcher.planner.memory.timeline import GRADIENTS, MESSAGES, OPTIMIZER, PARAMETERS


@dataclass(frozen=True)
class ZeroCut:
    """The settings by which ZeRO partitions the training state among ranks. Sizes are in elements."""

    stage: int
    ranks: int
    itemsize: int
    state_copies: int
    cpu: bool
    copied_below: float
    """Bytes. gloo copies only messages smaller than this: none on GPUs, all between machines."""
    accumulation: int
    reduce_bucket: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    sub_group: int
    recomputes: bool = False
    speaks: bool = True
    """Whether the loss multiplies by the output embeddings, outside of their module."""
    offloads_optimizer: bool = False
    """Whether masters, gradients and optimizer state of a rank's partition are in host memory."""
    offloads_parameters: bool = False
    """Whether the shards of stage 3 are there too."""
    to_files: bool = False
    """Whether offloaded state is in files, and takes no host memory."""
    widens_moments: bool = False
    """Whether moments are stored in bf16, and converted to fp32 piece by piece in the optimizer's step."""


class ZeroStates:
    """The parameters of a model in the order of its modules, and a rank's share of their state."""

    def __init__(self, root: Unit, layers: list[Unit], cut: ZeroCut) -> None:
        self._cut = cut
        inner = [weight for layer in layers for weight in layer.weights]
        first, last = root.weights[: root.num_first], root.weights[root.num_first :]
        self._weights: list[Weight] = [*first, *inner, *last]
        self.trained = sum(weight.num_elements for weight in self._weights if weight.trains)
        """Elements of the trained parameters."""
        self._frozen = sum(weight.num_elements for weight in self._weights) - self.trained

    def part(self, num_elements: int) -> int:
        """Return the number of elements in one rank's partition."""
        return -(-num_elements // self._cut.ranks)

    def on_device(self) -> dict[str, int]:
        """Return the bytes of parameters, optimizer state and permanent buffers, by kind."""
        cut, part, frozen = self._cut, self.part(self.trained), self.part(self._frozen)
        # Frozen elements are kept in fp32 for the checkpoint, unless an adapter's checkpoint omits them.
        stored = 0 if any(weight.narrow for weight in self._weights) else 4
        if cut.stage < 3:
            computing = cut.itemsize * (self.trained + self._frozen) + stored * frozen
            if cut.offloads_optimizer:
                return {PARAMETERS: computing}
            return {PARAMETERS: computing + 4 * part, OPTIMIZER: 4 * cut.state_copies * part}
        persistent = sum(
            weight.num_elements for weight in self._weights if weight.num_elements <= cut.persistence
        )
        bucket = {MESSAGES: cut.reduce_bucket * 4}
        if cut.offloads_optimizer:
            shards = 0 if cut.offloads_parameters else cut.itemsize * (part + frozen)
            return {PARAMETERS: shards + stored * frozen + cut.itemsize * persistent} | bucket
        shards = 0 if cut.itemsize == 4 else cut.itemsize * part
        parameters = 4 * part + shards + (stored + cut.itemsize) * frozen + cut.itemsize * persistent
        return {PARAMETERS: parameters, OPTIMIZER: 4 * cut.state_copies * part, GRADIENTS: 4 * part} | bucket

    def on_host(self) -> int:
        """Return the bytes that are offloaded to host memory: masters, gradients, optimizer state, and the
        shards of stage 3."""
        cut, part = self._cut, self.part(self.trained)
        if cut.to_files:
            return 0
        optimizer = 4 * (2 + cut.state_copies) * part if cut.offloads_optimizer else 0
        return optimizer + cut.itemsize * (part + self.part(self._frozen)) * cut.offloads_parameters

    def widened(self) -> int:
        """Return the device's bytes for a piece of the moments in fp32, and the numbers that round it."""
        if not self._cut.widens_moments or self._cut.offloads_optimizer:
            return 0
        most = self.part(self.trained)
        if self._cut.stage == 3:  # sub-group by sub-group, of which the last parameter goes over its size
            largest = max((weight.num_elements for weight in self._weights if weight.trains), default=0)
            most = min(most, self._cut.sub_group + self.part(largest))
        return 12 * min(WIDENED_MOMENTS, most)

    def touched(self) -> list[tuple[int, int]]:
        """Return, per rank, the elements of all parameters of which it has a part, and of its largest part.

        DeepSpeed copies the full fp32 gradients of those parameters.
        """
        num_ranks = self._cut.ranks
        in_all, largest = [0] * num_ranks, [0] * num_ranks
        groups: dict[Hashable, list[int]] = {}
        for weight in sorted(self._weights, key=lambda weight: len(weight.shape) < 2):
            if weight.trains:
                groups.setdefault((weight.group, len(weight.shape) >= 2), []).append(weight.num_elements)
        for sizes in groups.values():
            part, begin = max(1, self.part(sum(sizes))), 0
            for size in sizes:
                end = begin + size
                for rank in range(begin // part, min(num_ranks - 1, (end - 1) // part) + 1):
                    in_all[rank] += size
                    own = min(end, (rank + 1) * part) - max(begin, rank * part)
                    largest[rank] = max(largest[rank], own)
                begin = end
        return list(zip(in_all, largest, strict=True))
