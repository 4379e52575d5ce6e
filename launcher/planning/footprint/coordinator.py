"""Which parameters ZeRO-3 holds whole at a time: DeepSpeed's PartitionedParameterCoordinator (0.19.8), gone through module by module.

It fetches what a module needs, then what by the trace of the step before comes next, and lets go of what is not used again soon.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from launcher.planning.footprint.program import Segment, Unit, Weight

Key = tuple[str, int, bool]


@dataclass
class Module:
    """A module that has parameters of its own, at one place of the trace."""

    weights: tuple[Weight, ...]
    key: Key
    """The block that it is part of: kind, layer, backward."""
    leaves: bool = True
    """Whether it lets go of its parameters here; what is computed again is let go after its backward pass."""


@dataclass
class Coordinator:
    """The state of a rank's gathered parameters."""

    trace: list[Module]
    prefetch: int
    max_live: int
    max_reuse: int
    ranks: int
    gloo: bool
    external: frozenset[str] = frozenset()
    whole: dict[str, int] = field(default_factory=dict)
    """Elements by name of what is there."""
    flying: dict[str, int] = field(default_factory=dict)
    """The message by number that brings a parameter which no one has waited for yet."""
    messages: dict[int, list[Weight]] = field(default_factory=dict)
    num_available: int = 0
    most: dict[Key, int] = field(default_factory=dict)

    def go(self) -> dict[Key, int]:
        """The most elements that are held during each block, in a step after the first."""
        for _ in range(2):
            self.num_available, self._fetched = 0, dict[str, int]()
            self._queue = deque((weight, step) for step, module in enumerate(self.trace) for weight in module.weights)
            for step, module in enumerate(self.trace):
                self._fetch(module, step)
                if module.leaves:
                    self._release(module, step + 1)
        return self.most

    def _note(self, key: Key, passing: int = 0) -> None:
        held = sum(self.whole.values())
        if self.gloo:
            # A message under way is there twice.
            held += sum(self.whole[name] for name in self.flying)
        self.most[key] = max(self.most.get(key, 0), held + passing)

    def _gather(self, weights: list[Weight], key: Key) -> None:
        number = len(self.messages)
        total = sum(weight.num_elements for weight in weights)
        self.messages[number] = weights
        self._note(key, total * (2 if self.gloo else 1) + total // self.ranks)
        for weight in weights:
            self.whole[weight.name], self.flying[weight.name] = weight.num_elements, number
        self.num_available += total

    def _fetch(self, module: Module, step: int) -> None:
        missing = [weight for weight in module.weights if weight.name not in self.whole]
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
        number = self.flying.get(weight.name)
        if number is None:
            return
        arrived = self.messages.pop(number)
        self.messages[number] = []
        # Several in one message are copied out of it.
        self._note(key, sum(one.num_elements for one in arrived) if len(arrived) > 1 else 0)
        for one in arrived:
            self.flying.pop(one.name, None)

    def _ahead(self, key: Key) -> None:
        room, wanted, total = min(self.max_live - self.num_available, self.prefetch), list[Weight](), 0
        while self._queue and total < room:
            weight, used = self._queue.popleft()
            self._fetched[weight.name] = max(self._fetched.get(weight.name, -1), used)
            if weight.name not in self.whole and weight not in wanted:
                wanted.append(weight)
                total += weight.num_elements
        if wanted:
            self._gather(wanted, key)

    def _release(self, module: Module, step: int) -> None:
        going = {weight.name for weight in module.weights if self._fetched.get(weight.name, -1) <= step} - self.external
        passed = 0
        for later in self.trace[step:]:
            if passed >= self.max_reuse or not going:
                break
            for weight in later.weights:
                going.discard(weight.name)
                passed += weight.num_elements
        for name in going:
            if name in self.whole and name not in self.flying:
                self.num_available -= self.whole.pop(name)


def trace_of(root: Unit, layers: list[Unit], segments: list[Segment], persistence: int, recomputes: bool) -> list[Module]:
    """The modules of a step in their order: forward, and backward in reverse."""
    trace: list[Module] = []
    head = root.weights[-1] if len(root.weights[-1].shape) > 1 else None
    for segment in segments:
        key = (segment.kind, segment.layer, segment.backward)
        if segment.kind == "layer":
            modules = _modules(layers[segment.layer], persistence)
        else:
            kept = [w for w in root.weights if (w is head) == (segment.kind == "tail")] if head is not None else list(root.weights)
            modules = _modules(Unit(tuple(kept)), persistence)
        if segment.backward and segment.kind == "layer" and recomputes:
            trace += [Module(weights, key, leaves=True) for weights in modules]
        trace += [Module(weights, key) for weights in (reversed(modules) if segment.backward else modules)]
    return trace


def _modules(unit: Unit, persistence: int) -> list[tuple[Weight, ...]]:
    """The parameters of a unit by the module that they are in; small ones are always whole, and no matter here."""
    grouped: dict[str, list[Weight]] = {}
    for weight in unit.weights:
        if weight.num_elements > persistence:
            grouped.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    return [tuple(weights) for weights in grouped.values()]
