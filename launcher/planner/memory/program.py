"""A model as the planner sees it: its parameters by layer, and its passes as a sequence of blocks."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Protocol

from launcher.job.adapter import Adapter
from launcher.planner.limits import MOMENT_BLOCK


@dataclass(frozen=True)
class Weight:
    """A parameter by name and shape."""

    name: str
    shape: tuple[int, ...]
    trains: bool = True
    viewed: bool = False
    """Multiplied through a view, which autograd saves, as experts and their router are. `torch.nn.Linear`
    does not count: ZeRO-3 replaces its computation."""
    input_first: bool = False
    """A linear layer's matrix with shape [in, out], as in GPT-2."""
    used: float = 1.0
    """The share of it that is multiplied with one token: the chosen ones among experts."""
    narrow: bool = False
    """Stored in the precision of the computation, not in fp32."""
    group: Hashable = None
    """Its optimizer group, apart from the split into matrices and the rest."""
    by_muon: bool = False
    factored: bool = False
    """Updated by Adafactor: a matrix's state is a number for each row and each column."""
    in_bytes: bool = False
    """Its two moments are stored in 8 bits, with a scale in fp32 for each block of a row."""

    @functools.cached_property
    def num_elements(self) -> int:
        return prod(self.shape)

    def shard(self, ranks: int) -> int:
        """Return the elements of the largest shard along the first dimension, as FSDP and loading shard."""
        return -(-self.shape[0] // ranks) * prod(self.shape[1:]) if self.shape else 1

    def spared(self, ranks: int) -> int:
        """Return how many bytes of state the largest shard has fewer than by `STATE_COPIES`: with Muon one
        number per element, for Adafactor's matrices all numbers but one per row and column."""
        part = self.shard(ranks)
        if self.in_bytes:
            columns = prod(self.shape[1:])
            return 2 * (3 * part - 4 * (part // columns) * -(-columns // MOMENT_BLOCK))
        if self.factored and len(self.shape) >= 2:
            columns = self.shape[-1] if len(self.shape) == 2 else part // self.shape[-2]
            return 4 * (part - part // self.shape[-1] - columns)
        return 4 * part if self.by_muon else 0


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: a repeated layer, or all the rest."""

    weights: tuple[Weight, ...]
    num_first: int = 0
    """Number of weights before the layers, in the model's order; only for the unit outside of the layers."""

    @functools.cached_property
    def _known(self) -> dict[tuple[int, bool], int]:
        """Cache the sums: a plan needs the same ones thousands of times."""
        return {}

    def num_elements(self, trained: bool = False) -> int:
        return self.shard(1, trained)

    def shard(self, ranks: int, trained: bool = False) -> int:
        """Return the elements of the largest rank's shard."""
        if (ranks, trained) not in self._known:
            self._known[ranks, trained] = sum(
                weight.shard(ranks) for weight in self.weights if weight.trains or not trained
            )
        return self._known[ranks, trained]

    def spared_shard(self, ranks: int) -> int:
        """Return how many bytes of state the largest rank's shard has fewer than by `STATE_COPIES`."""
        return sum(weight.spared(ranks) for weight in self.weights if weight.trains)

    def narrow_shard(self, ranks: int) -> int:
        """Return the elements of the largest rank's shard that are not stored in fp32."""
        return sum(weight.shard(ranks) for weight in self.weights if weight.narrow)

    @property
    def last_trained(self) -> int:
        """Return the elements of the last trained parameter."""
        return next((weight.num_elements for weight in reversed(self.weights) if weight.trains), 0)

    @property
    def largest_trained(self) -> int:
        """Return the elements of the largest trained parameter."""
        return max((weight.num_elements for weight in self.weights if weight.trains), default=0)

    def largest_shard(self, ranks: int) -> int:
        """Return the elements of the largest shard of a trained parameter."""
        return max((weight.shard(ranks) for weight in self.weights if weight.trains), default=0)

    @property
    def largest(self) -> int:
        return max((weight.num_elements for weight in self.weights), default=0)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank: the length of each sample in tokens."""

    lengths: tuple[int, ...]
    padded: bool = False

    @property
    def num_tokens(self) -> int:
        """Return the positions that are computed, padding included."""
        return max(self.lengths) * len(self.lengths) if self.padded else sum(self.lengths)


@dataclass(frozen=True)
class Setting:
    """All settings of a plan on which the layers' own memory depends."""

    batch: Batch
    itemsize: int
    """Bytes of a number in the precision of the computation."""
    checkpointing: str
    cuda: bool
    training: bool = True
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that never train."""
    adapter: Adapter | None = None
    accumulates: bool = False
    """Gradients are not kept: they are added to those of an earlier micro-batch, or leave as soon as they are
    computed."""
    widens: bool = False
    """Each gradient is converted to fp32 as soon as it is computed."""


@dataclass
class Segment:
    """One block, forward or backward: the bytes that it adds, and its peak above its start."""

    kind: str
    """`stem`, `layer`, `tail`, or `bridge` for the block between two stacks of layers."""
    layer: int
    """Index among all layers of the model, in the order of its units."""
    backward: bool
    added: int = 0
    peak: int = 0
    gradients: tuple[tuple[int, int, int], ...] = ()
    """For each gradient when it is computed: bytes above the block's start, its elements, and the highest
    level since the gradient before."""
    rest: int = 0
    """The highest level above the block's start since its last gradient, in bytes."""
    made: int = 0
    """Bytes of gradients that are kept."""
    traffic: int = 0
    """Bytes of all tensors that were allocated."""
    num_made: int = 0
    """Tensors that were allocated: about one per operator."""


class Program(Protocol):
    """A model described by its tensors' sizes."""

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the parameters outside of the layers as one unit, and a unit for each layer."""
        ...

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, with every layer of the model."""
        ...

    def __hash__(self) -> int: ...
