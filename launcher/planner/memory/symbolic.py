"""Symbolic tensors: forward and backward pass at the level of sizes, in plain Python.

A `SymbolicTensor` represents a tensor. Its `Storage` counts its bytes on a `Meter` as long as anything refers
to it, by Python's own reference counts. So a layer that is written like its PyTorch code keeps and frees the
same tensors. The tensors that an operator saves for its backward pass, and those that it allocates there,
follow PyTorch's `derivatives.yaml` (torch 2.13).
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


class Meter:
    """Live bytes now, and their peak since `mark`."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.written = 0
        """Bytes of all tensors that were allocated."""
        self.num_made = 0
        self.frame: Frame | None = None
        """The checkpointed call that is running, if any."""
        self.sequence = 0
        self.on_node: Callable[[Any], None] | None = None
        """Called with the tag of each node before its backward pass."""
        self.tag: Any = None
        self.on_gradient: Callable[[int, int], None] | None = None
        """Called when a gradient is computed, with its elements and the bytes that are kept of it."""
        self.widens = False
        """Whether gradients are kept in fp32, in whatever precision they are computed."""
        self.packs = False
        """Whether products copy their operands block by block, as a CPU's do in half precision."""

    def add(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.written += num_bytes
        self.num_made += 1
        if self.live > self.peak:
            self.peak = self.live

    def mark(self) -> int:
        """Start a new peak, and return the live bytes."""
        self.peak = self.live
        return self.live

    def transient(self, num_bytes: float) -> None:
        """Count bytes that are allocated and freed within one operator."""
        self.peak = max(self.peak, self.live + int(num_bytes))


class Storage:
    """Memory of one tensor; freed when nothing refers to it."""

    __slots__ = ("meter", "num_bytes")

    def __init__(self, meter: Meter, num_bytes: int) -> None:
        self.meter, self.num_bytes = meter, int(num_bytes)
        meter.add(self.num_bytes)

    def __del__(self) -> None:
        self.meter.live -= self.num_bytes


class Parameter:
    """A parameter. Its own memory is counted by an engine, its gradient here."""

    __slots__ = ("arrived", "expected", "gradient", "num_elements", "trains")

    def __init__(self, num_elements: int, trains: bool = True) -> None:
        self.num_elements, self.trains = num_elements, trains
        self.gradient: Storage | None = None
        self.expected = 0
        """Number of operators that use it; it gets its gradient once theirs are all summed."""
        self.arrived: Storage | None = None


class SymbolicTensor:
    """A tensor: number of elements, bytes per element, storage, and the node that computed it."""

    __slots__ = ("itemsize", "node", "num_elements", "storage")

    def __init__(self, num_elements: int, itemsize: int, storage: Storage, node: Node | None = None) -> None:
        self.num_elements, self.itemsize, self.storage, self.node = num_elements, itemsize, storage, node

    @property
    def meter(self) -> Meter:
        return self.storage.meter

    @property
    def needs_gradient(self) -> bool:
        return self.node is not None


class StopRecomputing(Exception):
    """Raised once all tensors that the backward pass needs have been recomputed."""


class Frame:
    """One checkpointed call: the number of tensors that it saves, and after recomputation the tensors."""

    def __init__(self, selective: bool) -> None:
        self.selective = selective
        self.num_saved = 0
        self.cached: list[Storage] = []
        self.again: list[list[Storage]] | None = None
        self.recomputing = False
        self.count = 0
        self.run: Callable[[], Any] = lambda: None

    def compute_again(self, meter: Meter) -> None:
        """Run the forward pass again, for the tensors that it saves."""
        self.again, self.recomputing, self.count = [], True, 0
        outer, meter.frame = meter.frame, self
        tag, sequence = meter.tag, meter.sequence
        try:
            self.run()
        except StopRecomputing:
            pass
        finally:
            meter.frame, meter.tag, meter.sequence, self.recomputing = outer, tag, sequence, False
            self.cached = []


class Node:
    """An operator in the backward pass."""

    __slots__ = ("backward", "frame", "inputs", "meter", "ordinal", "saved", "sequence", "tag")

    def __init__(
        self,
        meter: Meter,
        inputs: Sequence[Node | Parameter | None],
        backward: Callable[[Storage], list[Any]],
    ) -> None:
        self.meter, self.inputs, self.backward = meter, inputs, backward
        self.saved: list[Storage] = []
        self.frame: Frame | None = meter.frame
        self.tag = meter.tag
        meter.sequence += 1
        self.sequence = meter.sequence
        self.ordinal = 0

    def save(self, storage: Storage | None) -> None:
        """Save a tensor for the backward pass; None stands for a parameter, which an engine counts."""
        frame = self.frame
        if frame is None:
            if storage is not None:
                self.saved.append(storage)
            return
        if frame.recomputing:
            assert frame.again is not None
            frame.count += 1
            if storage is not None:
                frame.again[-1].append(storage)
            if frame.count == frame.num_saved:
                raise StopRecomputing
            return
        frame.num_saved += 1

    def kept(self) -> list[Storage]:
        """Return the saved tensors; under checkpointing, recompute them first unless that was done."""
        if self.frame is None:
            saved, self.saved = self.saved, []
            return saved
        if self.frame.again is None:
            self.frame.compute_again(self.meter)
        assert self.frame.again is not None
        if self.ordinal >= len(self.frame.again):
            return []
        saved = self.frame.again[self.ordinal]
        self.frame.again[self.ordinal] = []
        return saved


def node_of(
    meter: Meter,
    inputs: Sequence[SymbolicTensor | Parameter | None],
    backward: Callable[[Storage], list[Any]],
) -> Node | None:
    """Return an operator's node in the backward pass; None if no input needs a gradient."""
    edges = [
        i.node if isinstance(i, SymbolicTensor) else i if isinstance(i, Parameter) and i.trains else None
        for i in inputs
    ]
    if all(edge is None for edge in edges):
        return None
    node = Node(meter, edges, backward)
    frame = meter.frame
    if frame is None or not frame.recomputing:
        for edge in edges:
            if isinstance(edge, Parameter):
                edge.expected += 1
    if frame is not None:
        if frame.recomputing:
            assert frame.again is not None
            node.ordinal = len(frame.again)
            frame.again.append([])
        else:
            node.ordinal = frame.count
            frame.count += 1
    return node


def new(
    meter: Meter, num_elements: int, itemsize: int, node: Node | None = None, kept_by_selective: bool = False
) -> SymbolicTensor:
    """Return a new tensor; recomputation reuses those that selective checkpointing keeps."""
    frame = meter.frame
    if kept_by_selective and frame is not None and frame.selective:
        if frame.recomputing:
            return SymbolicTensor(num_elements, itemsize, frame.cached.pop(0), node)
        storage = Storage(meter, num_elements * itemsize)
        frame.cached.append(storage)
        return SymbolicTensor(num_elements, itemsize, storage, node)
    return SymbolicTensor(num_elements, itemsize, Storage(meter, num_elements * itemsize), node)


def checkpoint(meter: Meter, mode: str, function: Callable[..., Result], *inputs: Any) -> Result:
    """Return `function(*inputs)`, keeping tensors as the mode says: `none` keeps all, `full` only the inputs,
    `selective` the inputs and matrix products."""
    if mode == "none":
        return function(*inputs)
    frame = Frame(mode == "selective")
    outer, meter.frame = meter.frame, frame
    result = function(*inputs)
    meter.frame = outer
    frame.run = lambda: function(*inputs)
    frame.count = 0
    return result


def backward(output: SymbolicTensor) -> None:
    """Run the backward pass of a scalar: nodes in reverse order of creation, gradients summed where they
    meet."""
    meter = output.meter
    assert output.node is not None
    waiting: list[tuple[int, Node]] = [(-output.node.sequence, output.node)]
    arrived: dict[int, Storage] = {
        output.node.sequence: Storage(meter, output.num_elements * output.itemsize)
    }
    while waiting:
        _, node = heapq.heappop(waiting)
        if meter.on_node is not None:
            meter.on_node(node.tag)
        held = [arrived.pop(node.sequence)]
        saved = node.kept()
        gradients = node.backward(held[0])
        del saved
        held.clear()
        node.frame = None
        for edge, gradient in zip(node.inputs, gradients, strict=True):
            if edge is None or gradient is None:
                continue
            if isinstance(edge, Parameter):
                _accumulate(meter, edge, gradient)
            elif edge.sequence in arrived:
                arrived[edge.sequence] = _sum(meter, arrived.pop(edge.sequence))
            else:
                arrived[edge.sequence] = gradient
                heapq.heappush(waiting, (-edge.sequence, edge))
        del gradients


def _sum(meter: Meter, first: Storage) -> Storage:
    """Return the storage of two gradients' sum: the first one's, unless something else still refers to it."""
    shared = sys.getrefcount(first) > 3
    return Storage(meter, first.num_bytes) if shared else first


def _accumulate(meter: Meter, parameter: Parameter, gradient: Storage) -> None:
    """Keep a parameter's gradient as it is, or in fp32 if the engine accumulates in fp32; a second one is
    added to the first."""
    parameter.expected -= 1
    if parameter.arrived is None:
        parameter.arrived = gradient
    if parameter.expected > 0:
        return
    gradient, parameter.arrived = parameter.arrived, None
    first = parameter.gradient is None
    if meter.on_gradient is not None:
        meter.on_gradient(
            parameter.num_elements,
            (parameter.num_elements * 4 if meter.widens else gradient.num_bytes) if first else 0,
        )
    if meter.widens:
        wide = Storage(meter, parameter.num_elements * 4)
        if first:
            parameter.gradient = wide
    elif first:
        parameter.gradient = gradient
