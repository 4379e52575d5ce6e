"""A model as a sequence of blocks: what each adds to memory, and how the middle ones repeat."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

from launcher.job.adapter import Adapter
from launcher.planner.memory.symbolic import Meter, Parameter, Storage, SymbolicTensor, backward, new

MOST_LAYERS = 4
"""Of a stack of equal layers, how many are gone through; those between the first and the last are alike."""


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

    @functools.cached_property
    def num_elements(self) -> int:
        return prod(self.shape)

    def shard(self, ranks: int) -> int:
        """Elements of the largest part, cut along the first dimension, as FSDP and our loading do."""
        return -(-self.shape[0] // ranks) * prod(self.shape[1:]) if self.shape else 1


@dataclass(frozen=True)
class Unit:
    """What is gathered together: a repeated layer, or all the rest."""

    weights: tuple[Weight, ...]
    num_first: int = 0
    """Of what is outside of the layers: how many come before them in the model's order."""

    @functools.cached_property
    def _known(self) -> dict[tuple[int, bool], int]:
        """What was asked for once: a plan asks for the same sums thousands of times."""
        return {}

    def num_elements(self, trained: bool = False) -> int:
        return self.shard(1, trained)

    def shard(self, ranks: int, trained: bool = False) -> int:
        """Elements of the largest rank's part."""
        if (ranks, trained) not in self._known:
            self._known[ranks, trained] = sum(
                weight.shard(ranks) for weight in self.weights if weight.trains or not trained
            )
        return self._known[ranks, trained]

    def muon_shard(self, ranks: int) -> int:
        """Of the largest rank's part, elements that Muon steps, whose state is one number each."""
        return sum(weight.shard(ranks) for weight in self.weights if weight.by_muon and weight.trains)

    def narrow_shard(self, ranks: int) -> int:
        """Of the largest rank's part, elements that are kept in the precision of the computation."""
        return sum(weight.shard(ranks) for weight in self.weights if weight.narrow)

    @property
    def last_trained(self) -> int:
        """Elements of the last parameter that trains."""
        return next((weight.num_elements for weight in reversed(self.weights) if weight.trains), 0)

    @property
    def largest_trained(self) -> int:
        """Elements of the largest parameter that trains."""
        return max((weight.num_elements for weight in self.weights if weight.trains), default=0)

    def largest_shard(self, ranks: int) -> int:
        """Elements of the largest part of a parameter that trains."""
        return max((weight.shard(ranks) for weight in self.weights if weight.trains), default=0)

    @property
    def largest(self) -> int:
        return max((weight.num_elements for weight in self.weights), default=0)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank: the tokens of each sample, and of an encoder-decoder those of each target."""

    lengths: tuple[int, ...]
    padded: bool = False
    targets: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return max(self.lengths) * len(self.lengths) if self.padded else sum(self.lengths)


@dataclass(frozen=True)
class Setting:
    """What of a plan the layers' own memory depends on."""

    batch: Batch
    itemsize: int
    """Bytes of a number in the precision of the computation."""
    checkpointing: str
    attention: str
    cuda: bool
    task: str
    training: bool = True
    frozen: frozenset[str] = frozenset()
    """The names of parameters that never train."""
    adapter: Adapter | None = None
    accumulates: bool = False
    """Gradients of an earlier micro-batch are there already, and these are added to them; or they leave as
    soon as they are made."""
    widens: bool = False
    """Each gradient is kept in fp32 as soon as it is made."""
    half: bool = False
    """It computes in fp16, whose overflows some models take back."""


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


@dataclass
class Context:
    """What a model's program runs in."""

    setting: Setting
    meter: Meter = field(default_factory=Meter)
    segments: list[Segment] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    inputs: Any = None
    """The batch, which is there until the step is over."""
    _level: int = 0
    _written: int = 0
    _num_made: int = 0

    def __post_init__(self) -> None:
        self.meter.packs = not self.setting.cuda and self.setting.itemsize == 2

    def begin(self, kind: str, layer: int = -1, is_backward: bool = False) -> None:
        """Close the block so far and begin another."""
        self.close()
        self.segments.append(Segment(kind, layer, is_backward))
        self.meter.tag = (kind, layer)

    def close(self) -> None:
        if self.segments:
            last = self.segments[-1]
            last.added, last.rest = self.meter.live - self._level, self.meter.peak - self._level
            last.peak = max([last.rest, *(highest for _, _, highest in last.gradients)])
            last.traffic, last.num_made = (
                self.meter.written - self._written,
                self.meter.num_made - self._num_made,
            )
        self._level, self._written, self._num_made = (
            self.meter.mark(),
            self.meter.written,
            self.meter.num_made,
        )

    def tensor(self, num_elements: int, itemsize: int | None = None) -> SymbolicTensor:
        """Something that nothing is learned through."""
        return new(self.meter, num_elements, itemsize or self.setting.itemsize)

    def parameter(self, name: str, num_elements: int) -> Parameter:
        """The parameter of a name; tied ones share it."""
        if name not in self.parameters:
            setting = self.setting
            made = Parameter(
                num_elements, trains=setting.training and trains(name, setting.frozen, setting.adapter)
            )
            made.gradient = Storage(self.meter, 0) if self.setting.accumulates else None
            self.parameters[name] = made
        return self.parameters[name]

    def note(self, num_elements: int, num_bytes: int) -> None:
        """A gradient was made, and so much of it stays."""
        last = self.segments[-1]
        last.made += num_bytes
        last.gradients = (
            *last.gradients,
            (self.meter.live - self._level, num_elements, self.meter.peak - self._level),
        )
        self.meter.mark()

    def follow(self, tag: Any) -> None:
        """The backward pass goes on with a node of this block."""
        last = self.segments[-1]
        if not last.backward or (last.kind, last.layer) != tag:
            kind, layer = tag
            self.begin(kind, layer, is_backward=True)


def trains(name: str, frozen: frozenset[str], adapter: Adapter | None) -> bool:
    """Whether a parameter is trained."""
    return name not in frozen if adapter is None else adapter.trains(name)


def run(setting: Setting, model: Callable[[Context], SymbolicTensor]) -> list[Segment]:
    """Go through a model's forward pass and, where it trains, its backward pass; its blocks in their order."""
    context = Context(setting)
    context.meter.on_node, context.meter.widens, context.meter.on_gradient = (
        context.follow,
        setting.widens,
        context.note,
    )
    output = model(context)
    if setting.training:
        backward(output)
    del output
    context.close()
    context.meter.on_node = context.meter.on_gradient = None
    return context.segments


def of_stack(context: Context, num_layers: int, first: int = 0) -> list[int]:
    """The layers of a stack that are gone through: the first ones and the last, by their numbers in the
    model; all, where they differ."""
    if num_layers <= MOST_LAYERS or context.setting.frozen or _differ(context.setting.adapter):
        return list(range(first, first + num_layers))
    return [*range(first, first + MOST_LAYERS - 1), first + num_layers - 1]


def _differ(adapter: Adapter | None) -> bool:
    """Whether an adapter's patterns may tell one layer of a stack from another: they name a number."""
    patterns = (
        ()
        if adapter is None
        else adapter.train_also + (() if adapter.targets == "all-linear" else adapter.targets)
    )
    return any(character.isdigit() or character in "?[" for pattern in patterns for character in pattern)


def spread(segments: list[Segment]) -> list[Segment]:
    """The blocks of a model of which some layers were left out, with all of them: they are as the one before
    the gap."""
    result: list[Segment] = []
    for segment in segments:
        before = result[-1] if result else None
        if (
            before is not None
            and segment.kind == before.kind == "layer"
            and segment.backward == before.backward
        ):
            step = -1 if segment.backward else 1
            inner = segment if segment.backward else before
            missing = range(before.layer + step, segment.layer, step)
            result += [replace(inner, layer=number) for number in missing]
        result.append(segment)
    return result


class Program(Protocol):
    """A model at the level of sizes."""

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return what is outside of the layers, and each layer, with what of them trains."""
        ...

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, all layers of the model among them."""
        ...

    def __hash__(self) -> int: ...


class SymbolicProgram(ABC):
    """A model written down as code over shadows."""

    @abstractmethod
    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer."""

    @abstractmethod
    def forward(self, context: Context) -> SymbolicTensor:
        """The loss of one micro-batch."""

    @functools.cached_property
    def _gone_through(self) -> dict[Setting, list[Segment]]:
        """A search over plans asks for the same blocks many times: they depend on no engine and no number of
        ranks."""
        return {}

    def blocks(self, setting: Setting) -> list[Segment]:
        """The blocks of one micro-batch, all layers of the model among them."""
        if setting not in self._gone_through:
            self._gone_through[setting] = spread(run(setting, self.forward))
        return self._gone_through[setting]
