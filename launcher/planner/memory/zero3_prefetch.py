"""Which parameters ZeRO-3 holds whole at a time, module by module.

Follows DeepSpeed's PartitionedParameterCoordinator (0.19.8).

It fetches what a module needs, then what by the trace of the step before comes next, and lets go of what is
not used again soon.
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
"""Where nothing is fetched any more: what the last gradients are sent beside."""

GLOO_THREADS = 2
"""Threads of a gloo process group (`ProcessGroupGloo.Options`), each at one message at a time; a test holds
it equal."""


@dataclass
class Module:
    """A module at one place of the trace. Those without parameters of their own count too: each call of one
    fetches ahead."""

    weights: tuple[Weight, ...]
    key: Key
    """The block that it is part of: kind, layer, backward."""
    leaves: bool = True
    """Whether it lets go of its parameters here; an embedding has no input that a gradient goes to, and so no
    such moment."""
    small: int = 0
    """Elements of parameters that are always whole."""
    keeps: bool = False
    """Whether the graph keeps what a product with one of its matrices needs in the backward pass."""


@dataclass
class Message:
    """Parameters on their way in one buffer."""

    total: int
    """Elements."""
    awaited: set[str]
    """Those whose module has not come yet: the buffer stays until the last one's has, though all are copied
    out at the first."""
    arrived: bool = False


@dataclass
class Coordinator:
    """The state of a rank's gathered parameters."""

    trace: list[Module]
    prefetch: int
    max_live: int
    max_reuse: int
    copied_below: float
    """Elements; gloo copies messages of fewer, and no others."""
    external: frozenset[str] = frozenset()
    whole: set[str] = field(default_factory=set)
    """Names of what is there."""
    flying: dict[str, Message] = field(default_factory=dict)
    """What brings a parameter whose module has not come yet."""
    kept: set[str] = field(default_factory=set)
    """What was let go of in the forward pass, and is still there: where a matrix is multiplied with as a view
    of it, autograd saves that view, which DeepSpeed's emptying of the parameter does not reach."""
    held: int = 0
    """Elements of all three, kept as they come and go: summed at each of a large model's messages they took
    most of a plan's time."""
    num_available: int = 0
    most: dict[Key, int] = field(default_factory=dict)

    def go(self) -> dict[Key, int]:
        """Return the most elements that are held during each block, in a micro-batch whose trace is known,
        and those at its end.

        It begins with nothing whole.
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
            # A thread of gloo gathers into a buffer of its own. How long that takes is up to the other ranks,
            # which may be behind: the largest messages that the threads can be at are counted twice. NCCL, and
            # ranks of one machine, gather in place.
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
        """Wait for a parameter. Several of one message are copied out of it; one alone is the message itself."""
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
        """Return whether it is used from this step on before so many elements of others have been."""
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
        """Elements that are used before each step."""


class Tracer:
    """The modules of a step in their order: forward, and backward in reverse, each behind those that it is
    in."""

    def __init__(self, root: Unit, layers: list[Unit], persistence: int, head: Weight | None) -> None:
        self.root, self.layers, self.persistence, self.head = root, layers, persistence, head
        self._inside: tuple[str, ...] = ()
        """The path of the module before."""

    def trace(self, segments: list[Segment], recomputes: bool) -> list[Module]:
        """Return all modules of a micro-batch. The head is multiplied with outside of its module, and
        registered with the whole model."""
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
        """Return the weights of one block. What is outside of the layers and not before them stands between
        two stacks, where there are two."""
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
            # Those that are called on the way from the one before; a list of layers, whose parts have numbers,
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
