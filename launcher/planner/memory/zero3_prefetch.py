"""ZeRO-3's gathered parameters at each moment, module by module.

Follows DeepSpeed's PartitionedParameterCoordinator (0.19.8).

It fetches a module's parameters, prefetches those that come next in the previous step's trace, and releases
parameters that are not used again soon.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, groupby

from launcher.planner.memory.program import Segment, Unit, Weight

Key = tuple[str, int, bool]
END: Key = ("end", -1, True)
"""The end of a micro-batch, when nothing is fetched any more and the last gradients are sent."""

GLOO_THREADS = 2
"""Threads of a gloo process group (`ProcessGroupGloo.Options`), each with one message at a time; a test
compares it."""


@dataclass
class Module:
    """A module at one place of the trace. Modules without parameters of their own count too, since each call
    prefetches."""

    weights: tuple[Weight, ...]
    key: Key
    """Its block: kind, layer, backward."""
    leaves: bool = True
    """Whether it releases its parameters here. An embedding does not in the backward pass, since its input
    has no gradient."""
    small: int = 0
    """Elements of its parameters that are always gathered, as they are small."""
    keeps: bool = False
    """Whether the graph saves tensors for the backward pass of products with its matrices."""


@dataclass
class Message:
    """Parameters that are being gathered in one buffer."""

    total: int
    """Elements."""
    awaited: set[str]
    """Parameters whose module has not run yet. The buffer stays until the last one's has, though all are
    copied out at the first one's."""
    arrived: bool = False


@dataclass
class Coordinator:
    """The state of a rank's gathered parameters."""

    trace: list[Module]
    prefetch: int
    max_live: int
    max_reuse: int
    copied_below: float
    """Elements; gloo copies only messages with fewer."""
    external: frozenset[str] = frozenset()
    whole: set[str] = field(default_factory=set)
    """Names of the gathered parameters."""
    flying: dict[str, Message] = field(default_factory=dict)
    """The message of each parameter whose module has not run yet."""
    kept: set[str] = field(default_factory=set)
    """Parameters that were released in the forward pass and are still in memory: autograd saves the view
    through which a matrix was multiplied, and DeepSpeed empties only the parameter itself."""
    held: int = 0
    """Elements of all three, updated incrementally: summing them at each message of a large model took most
    of a plan's time."""
    num_available: int = 0
    most: dict[Key, int] = field(default_factory=dict)

    def go(self) -> dict[Key, int]:
        """Return the peak elements during each block of a micro-batch with a known trace, and those at its
        end.

        It begins with nothing gathered.
        """
        self._fetched = dict[str, int]()
        self._queue = deque(
            (weight, step) for step, module in enumerate(self.trace) for weight in module.weights
        )
        for step, module in enumerate(self.trace):
            self._fetch(module, step)
            if module.leaves:
                self._release(module, step + 1)
        self.most[END] = self.held
        return self.most

    def _note(self, key: Key) -> None:
        held = self.held
        if self.copied_below and self.flying:
            # A thread of gloo gathers into a buffer of its own, for as long as other ranks lag behind. So the
            # largest messages, one per thread, are counted twice. NCCL, and ranks of one machine, gather in
            # place.
            on_the_way = {
                id(message): message.total
                for message in self.flying.values()
                if not message.arrived and message.total < self.copied_below
            }
            held += sum(sorted(on_the_way.values(), reverse=True)[:GLOO_THREADS])
        self.most[key] = max(self.most.get(key, 0), held)

    def _gather(self, weights: list[Weight], key: Key) -> None:
        total = sum(weight.num_elements for weight in weights)
        message = Message(total, {weight.name for weight in weights})
        self.flying |= dict.fromkeys(message.awaited, message)
        self.held += total
        self.num_available += total
        self._note(key)

    def _fetch(self, module: Module, step: int) -> None:
        missing = [
            weight
            for weight in module.weights
            if weight.name not in self.whole and weight.name not in self.flying
        ]
        if missing:
            self._gather(missing, module.key)
        for weight in module.weights:
            self._wait(weight, module.key)
        fresh = {weight.name for weight in module.weights if self._fetched.get(weight.name, -1) < step}
        popped: set[str] = set()
        while self._queue and len(popped) < len(fresh):
            weight, used = self._queue.popleft()
            self._fetched[weight.name] = used
            popped.add(weight.name)
        self._ahead(module.key)
        self._note(module.key)

    def _wait(self, weight: Weight, key: Key) -> None:
        """Wait for a parameter. Several in one message are copied out of it; a single one uses its buffer."""
        message = self.flying.get(weight.name)
        if message is None:
            return
        if not message.arrived:
            message.arrived = True
            self.whole |= message.awaited
            self.held += sum(self._sizes[name] for name in message.awaited)
            if len(message.awaited) == 1:
                self.held -= message.total
                message.total = 0
            self._note(key)
        message.awaited.discard(weight.name)
        del self.flying[weight.name]
        if not message.awaited:
            self.held -= message.total

    def _ahead(self, key: Key) -> None:
        room, wanted, total = min(self.max_live - self.num_available, self.prefetch), list[Weight](), 0
        while self._queue and total < room:
            weight, used = self._queue.popleft()
            self._fetched[weight.name] = max(self._fetched.get(weight.name, -1), used)
            if weight.name not in self.whole and weight.name not in self.flying and weight not in wanted:
                wanted.append(weight)
                total += weight.num_elements
        if wanted:
            self._gather(wanted, key)

    def _release(self, module: Module, step: int) -> None:
        for weight in module.weights:
            name = weight.name
            if module.key[2] and name in self.kept:
                self.kept.remove(name)
                self.held -= weight.num_elements
            done = self._fetched.get(name, -1) <= step and name not in self.external
            if done and not self._used_soon(name, step) and name in self.whole and name not in self.flying:
                self.whole.remove(name)
                self.num_available -= weight.num_elements
                if module.keeps and weight.viewed and name not in self.kept:
                    self.kept.add(name)
                else:
                    self.held -= weight.num_elements

    def _used_soon(self, name: str, step: int) -> bool:
        """Return whether a parameter is used again before `max_reuse` elements of others are, from this step
        on."""
        uses = self._uses[name]
        index = bisect_left(uses, step)
        return index < len(uses) and self._passed[uses[index]] - self._passed[step] < self.max_reuse

    def __post_init__(self) -> None:
        self._sizes = {weight.name: weight.num_elements for module in self.trace for weight in module.weights}
        self._uses: dict[str, list[int]] = {}
        for step, module in enumerate(self.trace):
            for weight in module.weights:
                self._uses.setdefault(weight.name, []).append(step)
        own = (module.small + sum(weight.num_elements for weight in module.weights) for module in self.trace)
        self._passed = [0, *accumulate(own)]
        """Elements used before each step."""


class Tracer:
    """The modules of a step in order: forward, then backward in reverse, each after the modules that contain
    it."""

    def __init__(self, root: Unit, layers: list[Unit], persistence: int, head: Weight | None) -> None:
        self.root, self.layers, self.persistence, self.head = root, layers, persistence, head
        self._inside: tuple[str, ...] = ()
        """The path of the previous module."""

    def trace(self, segments: list[Segment], recomputes: bool) -> list[Module]:
        """Return all modules of a micro-batch. The head is multiplied outside of its module, and so
        registered with the model."""
        trace: list[Module] = []
        kinds, turned = {segment.kind for segment in segments}, None
        self._learning = {(segment.kind, segment.layer) for segment in segments if segment.backward}
        self._recomputes = recomputes
        for segment in segments:
            key = (segment.kind, segment.layer, segment.backward)
            if turned is not segment.backward:
                turned, self._inside = segment.backward, ()
                trace.append(self._module([self.head] if self.head is not None else [], key))
            weights = self._weights(segment, "bridge" in kinds)
            if segment.backward and segment.kind == "layer" and recomputes:
                trace += self._modules(weights, key)
            trace += self._modules(weights[::-1] if segment.backward else weights, key) or [Module((), key)]
        return trace

    def _weights(self, segment: Segment, bridged: bool) -> tuple[Weight, ...]:
        """Return the weights of one block. If there are two stacks of layers, the weights after the stem are
        those between the stacks."""
        if segment.kind == "layer":
            return self.layers[segment.layer].weights
        first, last = self.root.weights[: self.root.num_first], self.root.weights[self.root.num_first :]
        if segment.kind == "stem":
            return first
        own = tuple(weight for weight in last if weight is not self.head)
        return own if bridged == (segment.kind == "bridge") else ()

    def _modules(self, weights: Iterable[Weight], key: Key) -> list[Module]:
        modules: list[Module] = []
        for path, own in groupby(weights, lambda weight: tuple(weight.name.split(".")[:-1])):
            # Modules entered on the way from the previous one. A list of layers, whose children have numbers,
            # is not called.
            before, self._inside = self._inside, path
            outer = [path[:depth] for depth in range(1, len(path)) if not path[depth].isdigit()]
            num_entered = sum(before[: len(prefix)] != prefix for prefix in outer)
            modules += [*[Module((), key)] * num_entered, self._module(list(own), key)]
        return modules

    def _module(self, weights: list[Weight], key: Key) -> Module:
        large = tuple(weight for weight in weights if weight.num_elements > self.persistence)
        small = sum(weight.num_elements for weight in weights if weight not in large)
        keeps = (
            key[:2] in self._learning
            and key[0] != "stem"
            and not key[2]
            and not (self._recomputes and key[0] == "layer")
        )
        return Module(large, key, leaves=not (key[0] == "stem" and key[2]), small=small, keeps=keeps)
