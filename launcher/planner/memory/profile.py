"""A model's block profile: the memory of each block, as lines in the number of samples.

A trace of the model's own class records it (`launcher/training/tracing`), at one, two and eight samples. From
two samples on, the size of every tensor of a block is affine in their number. So each level of memory is a
line through its values at two and eight samples, and a block's peak is the highest of its lines. Plans then
need only arithmetic.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Literal

from launcher.planner.memory.program import Segment, Setting, Unit, Weight

RECOMPUTATIONS = ("none", "selective", "full")
FEW, MANY = 2, 8
"""The two numbers of samples at which lines are recorded."""
Stays = Literal["gradient", "nothing", "fp32"]
"""How a new gradient is kept: as it is, not at all because it was added to an existing one, or as a copy in
fp32."""
Line = tuple[int, int]
"""Bytes at `FEW` and at `MANY` samples."""


@dataclass(frozen=True)
class Scale:
    """A point on the lines: a micro-batch's samples, and their length relative to the trace's."""

    samples: int
    length: float = 1.0

    def at(self, line: Line) -> int:
        """Return the bytes of a line at this point. Shorter samples count in proportion to their length,
        which is never too low."""
        few, many = line
        slope = (many - few) / (MANY - FEW)
        return round(few - FEW * slope + slope * self.samples * self.length)


@dataclass(frozen=True)
class Gradient:
    """A gradient at the moment when it is computed."""

    level: Line
    """Bytes above the level at which the block began."""
    num_elements: int
    itemsize: int


@dataclass(frozen=True)
class Block:
    """One block of a forward or backward pass, recorded with each gradient kept as it is."""

    kind: str
    layer: int
    backward: bool
    added: Line
    gaps: tuple[tuple[Line, ...], ...]
    """Candidates for the highest level before each gradient and after the last one, above the level at which
    the block began."""
    gradients: tuple[Gradient, ...]
    traffic: Line
    num_made: int

    def segment(self, scale: Scale, stays: Stays, traffic_scale: Scale | None = None) -> Segment:
        """Return the block's bytes for a number of samples, with gradients kept as `stays` says."""
        own = kept = reached = 0
        gradients = []
        for lines, gradient in zip(self.gaps, self.gradients, strict=False):
            high = max(reached, self._top(lines, scale) - own + kept)
            num_bytes = gradient.num_elements * gradient.itemsize
            # A gradient that was added to an existing one is freed before the hook on gradients is called.
            level = scale.at(gradient.level) - own + kept - num_bytes * (stays == "nothing")
            gradients.append((level, gradient.num_elements, max(high, level)))
            own, reached = own + num_bytes, level
            if stays == "fp32":
                reached = level + 4 * gradient.num_elements
                kept += 4 * gradient.num_elements
            elif stays == "gradient":
                kept = own
        rest = max(reached, self._top(self.gaps[-1], scale) - own + kept)
        wide = stays == "fp32"
        return Segment(
            self.kind, self.layer, self.backward,
            added=scale.at(self.added) - own + kept,
            peak=max([rest, *(high for _, _, high in gradients)]),
            gradients=tuple(gradients),
            rest=rest,
            made=kept,
            traffic=(traffic_scale or scale).at(self.traffic) + kept * wide,
            num_made=self.num_made + len(gradients) * wide,
        )  # fmt: skip

    @staticmethod
    def _top(lines: Sequence[Line], scale: Scale) -> int:
        return max((scale.at(line) for line in lines), default=-(1 << 62))


def envelope(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Return the lines that are the highest for some number of samples from `FEW` on."""
    steepest: dict[int, int] = {}
    for few, many in lines:
        steepest[many - few] = max(few, steepest.get(many - few, few))
    upper: list[tuple[int, int]] = []  # by slope, the flattest first
    for slope, few in sorted(steepest.items()):
        while upper and few >= upper[-1][1]:
            upper.pop()
        while len(upper) > 1 and _meet(upper[-1], (slope, few)) <= _meet(upper[-2], upper[-1]):
            upper.pop()
        upper.append((slope, few))
    return tuple((few, few + slope) for slope, few in upper)


def _meet(flat: tuple[int, int], steep: tuple[int, int]) -> float:
    """Return the number of samples beyond `FEW` from which the steeper line is above the flatter one."""
    return (flat[1] - steep[1]) / (steep[0] - flat[0])


@dataclass(frozen=True)
class Pass:
    """The blocks of a pass in order; equal layers share one block."""

    blocks: tuple[Block, ...]
    order: tuple[tuple[int, int], ...]
    """For each step of the pass: the index in `blocks`, and the layer."""

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Pass:
        """Return a pass of these blocks."""
        distinct: dict[Block, int] = {}
        order = []
        for block in blocks:
            of_any_layer = replace(block, layer=min(block.layer, 0))
            order.append((distinct.setdefault(of_any_layer, len(distinct)), block.layer))
        return cls(tuple(distinct), tuple(order))

    def __iter__(self) -> Iterator[Block]:
        return (self.blocks[number] for number, _ in self.order)

    def segments(self, scale: Scale, stays: Stays, traffic_scale: Scale) -> list[Segment]:
        """Return the bytes of each block for a number of samples."""
        distinct = [block.segment(scale, stays, traffic_scale) for block in self.blocks]
        return [
            distinct[number] if layer < 0 else replace(distinct[number], layer=layer)
            for number, layer in self.order
        ]


@dataclass(eq=False)
class Profile:
    """A program traced from a model's own class: its parameters, and its passes with one sample and with
    several."""

    length: int
    """Positions of each sample in the trace."""
    root: Unit
    layers: tuple[Unit, ...]
    passes: Mapping[str, tuple[Pass, Pass]] = field(default_factory=dict)
    """By activation checkpointing, and `evaluation`: the pass of one sample, and the lines for several."""
    tails: Mapping[str, tuple[tuple[int, Block], ...]] = field(default_factory=dict)
    """The block after the layers, in training and in evaluation, by number of samples, if its chunked loss is
    not affine in them."""
    quadratic: float = 0.0
    """The share of a sample's written bytes that grows with the square of its length."""
    untraceable: str | None = None
    """The reason why there are no passes."""
    _known: dict[Setting, list[Segment]] = field(init=False, default_factory=dict, repr=False)

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the parameters outside of the layers as one unit, and a unit for each layer."""
        return self.root, list(self.layers)

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, with every layer of the model."""
        if setting not in self._known:
            self._known[setting] = self._blocks(setting)
        return self._known[setting]

    def _blocks(self, setting: Setting) -> list[Segment]:
        samples, share = len(setting.batch.lengths), max(setting.batch.lengths) / self.length
        stays: Stays = "nothing" if setting.accumulates else "fp32" if setting.widens else "gradient"
        one, several = self.passes[setting.checkpointing if setting.training else "evaluation"]
        written = Scale(samples, (1 - self.quadratic) * share + self.quadratic * share * share)
        taken = one if samples == 1 and share == 1 else several
        segments = taken.segments(Scale(samples, share), stays, written)
        tails = self.tails.get("training" if setting.training else "evaluation", ())
        return [
            _tail(tails, samples * share) if tails and each.kind == "tail" and not each.backward else each
            for each in segments
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return {
            "length": self.length,
            "root": _unit_to_json(self.root),
            "layers": [_unit_to_json(unit) for unit in self.layers],
            "passes": {
                name: [{"blocks": [astuple(b) for b in each.blocks], "order": each.order} for each in pair]
                for name, pair in self.passes.items()
            },
            "tails": {
                name: [(number, astuple(block)) for number, block in tails]
                for name, tails in self.tails.items()
            },
            "quadratic": self.quadratic,
            "untraceable": self.untraceable,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Profile:
        """Return a profile from JSON. Raises KeyError, TypeError or ValueError if it is none."""
        passes = {}
        for name, (one, several) in content["passes"].items():
            passes[name] = _pass_of_json(one), _pass_of_json(several)
        tails = {
            name: tuple((number, _block_of_json(block)) for number, block in tails)
            for name, tails in content["tails"].items()
        }
        layers = tuple(_unit_of_json(unit) for unit in content["layers"])
        root, length = _unit_of_json(content["root"]), content["length"]
        return cls(length, root, layers, passes, tails, content["quadratic"], content["untraceable"])


def _tail(tails: Sequence[tuple[int, Block]], samples: float) -> Segment:
    """Return the block after the layers, interpolated between the two nearest traced numbers of samples.
    Those on both sides of a chunk's end were traced."""
    numbers = [number for number, _ in tails]
    place = bisect_left(numbers, samples)
    at = [block.segment(Scale(FEW), "gradient") for _, block in tails]
    if place < len(tails) and (numbers[place] == samples or place == 0):
        return at[place]
    low, high = (place - 1, place) if place < len(tails) else (-2, -1)
    part = (samples - numbers[low]) / (numbers[high] - numbers[low])

    def between(name: str) -> int:
        less, more = getattr(at[low], name), getattr(at[high], name)
        return round(less + part * (more - less))

    return replace(
        at[high],
        added=between("added"),
        peak=between("peak"),
        rest=between("rest"),
        traffic=between("traffic"),
        num_made=between("num_made"),
    )


def _unit_to_json(unit: Unit) -> dict[str, Any]:
    return {
        "num_first": unit.num_first,
        "weights": [list(asdict(weight).values()) for weight in unit.weights],
    }


def _unit_of_json(content: dict[str, Any]) -> Unit:
    weights = (Weight(name, tuple(shape), *others) for name, shape, *others in content["weights"])
    return Unit(tuple(weights), content["num_first"])


def _pass_of_json(content: dict[str, Any]) -> Pass:
    order = tuple((number, layer) for number, layer in content["order"])
    return Pass(tuple(_block_of_json(block) for block in content["blocks"]), order)


def _block_of_json(content: list[Any]) -> Block:
    kind, layer, backward, (few, many), gaps, gradients, traffic, num_made = content
    own = tuple(
        Gradient((level[0], level[1]), num_elements, itemsize) for level, num_elements, itemsize in gradients
    )
    lines = tuple(tuple((low, high) for low, high in gap) for gap in gaps)
    return Block(kind, layer, backward, (few, many), lines, own, (traffic[0], traffic[1]), num_made)
