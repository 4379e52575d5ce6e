"""A model as the planner sees it: its parameters by layer, and its pass as a sequence of blocks."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Protocol

from launcher.job.adapter import Adapter


@dataclass(frozen=True)
class Weight:
    """A parameter by name and shape."""

    name: str
    shape: tuple[int, ...]
    trains: bool = True
    viewed: bool = False
    """Multiplied with as a view of it, which autograd keeps, as experts and their router are; not by
    `torch.nn.Linear`, which the engine of ZeRO's third stage has compute otherwise."""
    input_first: bool = False
    """A linear layer's, [in, out], as GPT-2 has it."""
    used: float = 1.0
    """The share of it that one token is multiplied with: of experts, those that are chosen."""
    narrow: bool = False
    """Kept in the precision of the computation, and not in fp32."""
    group: Hashable = None
    """Which of the optimizer's groups it is in, beside whether it is a matrix."""
    by_muon: bool = False
    factored: bool = False
    """Stepped by Adafactor: of a matrix the state is a number for each row and each column."""

    @functools.cached_property
    def num_elements(self) -> int:
        return prod(self.shape)

    def shard(self, ranks: int) -> int:
        """Return the elements of the largest part, cut along the first dimension, as FSDP and loading cut."""
        return -(-self.shape[0] // ranks) * prod(self.shape[1:]) if self.shape else 1

    def spared(self, ranks: int) -> int:
        """Return how many numbers of state the largest part has fewer than `STATE_COPIES`: of Muon one for each
        element, of Adafactor's matrices all but rows and columns."""
        part = self.shard(ranks)
        if self.factored and len(self.shape) >= 2:
            columns = self.shape[-1] if len(self.shape) == 2 else part // self.shape[-2]
            return part - part // self.shape[-1] - columns
        return part if self.by_muon else 0


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: a repeated layer, or all the rest."""

    weights: tuple[Weight, ...]
    num_first: int = 0
    """Of what is outside of the layers: how many come before them in the model's order."""

    @functools.cached_property
    def _known(self) -> dict[tuple[int, bool], int]:
        """Keep each sum that was asked for: a plan asks for the same ones thousands of times."""
        return {}

    def num_elements(self, trained: bool = False) -> int:
        return self.shard(1, trained)

    def shard(self, ranks: int, trained: bool = False) -> int:
        """Return the elements of the largest rank's part."""
        if (ranks, trained) not in self._known:
            self._known[ranks, trained] = sum(
                weight.shard(ranks) for weight in self.weights if weight.trains or not trained
            )
        return self._known[ranks, trained]

    def spared_shard(self, ranks: int) -> int:
        """Return how many numbers of state the largest rank's part has fewer than `STATE_COPIES`."""
        return sum(weight.spared(ranks) for weight in self.weights if weight.trains)

    def narrow_shard(self, ranks: int) -> int:
        """Return the elements of the largest rank's part that are kept in the precision of the computation."""
        return sum(weight.shard(ranks) for weight in self.weights if weight.narrow)

    @property
    def last_trained(self) -> int:
        """Return the elements of the last parameter that trains."""
        return next((weight.num_elements for weight in reversed(self.weights) if weight.trains), 0)

    @property
    def largest_trained(self) -> int:
        """Return the elements of the largest parameter that trains."""
        return max((weight.num_elements for weight in self.weights if weight.trains), default=0)

    def largest_shard(self, ranks: int) -> int:
        """Return the elements of the largest part of a parameter that trains."""
        return max((weight.shard(ranks) for weight in self.weights if weight.trains), default=0)

    @property
    def largest(self) -> int:
        return max((weight.num_elements for weight in self.weights), default=0)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank: the tokens of each sample."""

    lengths: tuple[int, ...]
    padded: bool = False

    @property
    def num_tokens(self) -> int:
        """Return the positions that are computed, padding included."""
        return max(self.lengths) * len(self.lengths) if self.padded else sum(self.lengths)


@dataclass(frozen=True)
class Setting:
    """Everything in a plan that the layers' own memory depends on."""

    batch: Batch
    itemsize: int
    """Bytes of a number in the precision of the computation."""
    checkpointing: str
    cuda: bool
    training: bool = True
    frozen: frozenset[str] = frozenset()
    """The names of parameters that never train."""
    adapter: Adapter | None = None
    accumulates: bool = False
    """Gradients of an earlier micro-batch are there already, and these are added to them; or they leave as
    soon as they are made."""
    widens: bool = False
    """Each gradient is kept in fp32 as soon as it is made."""


@dataclass
class Segment:
    """One block, forward or backward: what it adds, and how high it goes above where it began."""

    kind: str
    """`stem`, `layer`, `tail`, or what stands between two stacks of layers."""
    layer: int
    """Of all layers of the model, in the order of its units."""
    backward: bool
    added: int = 0
    peak: int = 0
    gradients: tuple[tuple[int, int, int], ...] = ()
    """Of each gradient as it is made: bytes above where the block began, its elements, and the most there
    were since the one before it."""
    rest: int = 0
    """The most bytes above where the block began since its last gradient."""
    made: int = 0
    """Bytes of gradients that stay."""
    traffic: int = 0
    """Bytes of all tensors that were made."""
    num_made: int = 0
    """Tensors that were made: about as many as operators ran."""


class Program(Protocol):
    """A model at the level of sizes."""

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return what is outside of the layers, and each layer, with what of them trains."""
        ...

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, all layers of the model among them."""
        ...

    def __hash__(self) -> int: ...
