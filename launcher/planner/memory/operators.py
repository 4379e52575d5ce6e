"""Operators on symbolic tensors, with their results and saved tensors (torch 2.13, eager)."""

from __future__ import annotations

from launcher.planner.memory.kernel_bytes import packed_bytes
from launcher.planner.memory.symbolic import Parameter, Storage, SymbolicTensor, new, node_of


def linear(
    x: SymbolicTensor, num_in: int, num_out: int, weight: Parameter, bias: Parameter | None = None
) -> SymbolicTensor:
    """Multiply by a weight, [rows, in] -> [rows, out]; `x` is saved if the weight trains."""
    meter, rows, size = x.meter, x.num_elements // num_in, x.itemsize
    trained = weight.trains

    def gradients(gradient: Storage) -> list[Storage | None]:
        of_bias = Storage(meter, num_out * size) if bias is not None and bias.trains else None
        of_x = Storage(meter, rows * num_in * size) if x_needs else None
        of_weight = Storage(meter, weight.num_elements * size) if trained else None
        if trained and meter.packs:
            meter.transient(packed_bytes(rows, num_out))
        return [of_x, of_weight, of_bias]

    x_needs = x.needs_gradient
    node = node_of(meter, (x, weight, bias), gradients)
    if node is not None:
        if trained:
            node.save(x.storage)
        if x_needs:
            node.save(None)
    return new(meter, rows * num_out, size, node, kept_by_selective=True)


def product(a: SymbolicTensor, b: SymbolicTensor, num_elements: int) -> SymbolicTensor:
    """Multiply two activations as batches of matrices; both are saved."""
    meter, size = a.meter, a.itemsize
    bytes_a, bytes_b = a.num_elements * size, b.num_elements * size
    a_needs, b_needs = a.needs_gradient, b.needs_gradient

    def gradients(gradient: Storage) -> list[Storage | None]:
        return [Storage(meter, bytes_a) if a_needs else None, Storage(meter, bytes_b) if b_needs else None]

    node = node_of(meter, (a, b), gradients)
    if node is not None:
        if b_needs:
            node.save(a.storage)
        if a_needs:
            node.save(b.storage)
    return new(meter, num_elements, size, node, kept_by_selective=True)


def pointwise(
    x: SymbolicTensor,
    saves: str = "input",
    itemsize: int | None = None,
    num_elements: int | None = None,
    temporaries: int = 0,
) -> SymbolicTensor:
    """Apply a function of one tensor, which saves its `input`, its `output` or `nothing`. The backward pass
    allocates and frees `temporaries` tensors."""
    meter, before = x.meter, x.num_elements * x.itemsize

    def gradients(gradient: Storage) -> list[Storage | None]:
        meter.transient(before * (1 + temporaries))
        return [Storage(meter, before)]

    node = node_of(meter, (x,), gradients)
    if node is not None and saves == "input":
        node.save(x.storage)
    result = new(
        meter, x.num_elements if num_elements is None else num_elements, itemsize or x.itemsize, node
    )
    if node is not None and saves == "output":
        node.save(result.storage)
    return result


def cast(x: SymbolicTensor, itemsize: int) -> SymbolicTensor:
    """Return the tensor in another precision, or itself if it already has that."""
    return x if x.itemsize == itemsize else pointwise(x, "nothing", itemsize)


def copy(x: SymbolicTensor) -> SymbolicTensor:
    """Copy the values into new memory (contiguous, cat, repeat_interleave)."""
    return pointwise(x, "nothing")


def scale(x: SymbolicTensor) -> SymbolicTensor:
    """Multiply by, or add, a constant or a smaller tensor that needs no gradient."""
    return pointwise(x, "nothing")


def add(a: SymbolicTensor, b: SymbolicTensor) -> SymbolicTensor:
    """Add two tensors of one size: nothing is saved, and the gradient is passed on unchanged."""
    node = node_of(a.meter, (a, b), lambda gradient: [gradient, gradient])
    return new(a.meter, max(a.num_elements, b.num_elements), max(a.itemsize, b.itemsize), node)


def multiply(a: SymbolicTensor, b: SymbolicTensor) -> SymbolicTensor:
    """Multiply two tensors, the smaller one broadcast; each is saved for the other's gradient."""
    meter, most = a.meter, max(a.num_elements, b.num_elements)
    size = max(a.itemsize, b.itemsize)
    own = a.num_elements, a.itemsize, b.num_elements, b.itemsize
    a_needs, b_needs = a.needs_gradient, b.needs_gradient

    def gradients(gradient: Storage) -> list[Storage | None]:
        num_a, size_a, num_b, size_b = own
        of_a = Storage(meter, most * size) if a_needs else None
        of_b = Storage(meter, most * size) if b_needs else None
        # A gradient is summed over the broadcast dimensions while both gradients exist.
        if of_a is not None and num_a * size_a < of_a.num_bytes:
            of_a = Storage(meter, num_a * size_a)
        if of_b is not None and num_b * size_b < of_b.num_bytes:
            of_b = Storage(meter, num_b * size_b)
        return [of_a, of_b]

    node = node_of(meter, (a, b), gradients)
    if node is not None:
        if b_needs:
            node.save(a.storage)
        if a_needs:
            node.save(b.storage)
    return new(meter, most, size, node)


def multiply_parameter(weight: Parameter, x: SymbolicTensor) -> SymbolicTensor:
    """Multiply every row by a weight of one row's size."""
    meter, size, num_bytes, x_needs = x.meter, x.itemsize, x.num_elements * x.itemsize, x.needs_gradient

    def gradients(gradient: Storage) -> list[Storage | None]:
        of_weight = Storage(meter, num_bytes) if weight.trains else None
        of_x = Storage(meter, num_bytes) if x_needs else None
        if of_weight is not None:
            of_weight = Storage(meter, weight.num_elements * size)
        return [of_weight, of_x]

    node = node_of(meter, (weight, x), gradients)
    if node is not None:
        if weight.trains:
            node.save(x.storage)
        if x_needs:
            node.save(None)
    return new(meter, x.num_elements, size, node)


def layer_norm(x: SymbolicTensor, width: int, weight: Parameter, bias: Parameter | None) -> SymbolicTensor:
    """Normalise each row; the input and two numbers per row are saved."""
    meter, size, rows = x.meter, x.itemsize, x.num_elements // width
    num_bytes, x_needs = x.num_elements * size, x.needs_gradient

    def gradients(gradient: Storage) -> list[Storage | None]:
        of_x = Storage(meter, num_bytes) if x_needs else None
        of_weight = Storage(meter, width * size) if weight.trains else None
        of_bias = Storage(meter, width * size) if bias is not None and bias.trains else None
        return [of_x, of_weight, of_bias]

    node = node_of(meter, (x, weight, bias), gradients)
    result = new(meter, x.num_elements, size, node)
    statistics = Storage(meter, 2 * rows * size)
    if node is not None:
        node.save(x.storage)
        node.save(statistics)
    return result


def rms_norm(x: SymbolicTensor, width: int, weight: Parameter) -> SymbolicTensor:
    """Normalise as transformers' LlamaRMSNorm does: in fp32, operator by operator."""
    wide = cast(x, 4)
    rows = x.num_elements // width
    square = pointwise(wide, "input", temporaries=1)
    mean = pointwise(square, "nothing", num_elements=rows)
    del square
    mean = pointwise(mean, "nothing")
    root = pointwise(mean, "output")
    del mean
    scaled = multiply(wide, root)
    del wide, root
    narrow = cast(scaled, x.itemsize)
    del scaled
    return multiply_parameter(weight, narrow)


def dropout(x: SymbolicTensor, probability: float, cuda: bool) -> SymbolicTensor:
    """Drop some values. The mask is saved: on a CPU in the input's precision, on a GPU in bytes."""
    if not probability:
        return x
    meter, num_bytes = x.meter, x.num_elements * x.itemsize
    node = node_of(meter, (x,), lambda gradient: [Storage(meter, num_bytes)])
    mask = Storage(meter, x.num_elements if cuda else num_bytes)
    if node is not None:
        node.save(mask)
    return new(meter, x.num_elements, x.itemsize, node)


def embedding(
    meter_of: SymbolicTensor, num_tokens: int, width: int, itemsize: int, weight: Parameter
) -> SymbolicTensor:
    """Look up rows of a table. The indices are saved; the table's gradient is as large as the table."""
    meter = meter_of.meter
    node = node_of(meter, (weight,), lambda gradient: [Storage(meter, weight.num_elements * itemsize)])
    return new(meter, num_tokens * width, itemsize, node)


def concatenate(*tensors: SymbolicTensor) -> SymbolicTensor:
    """Concatenate tensors; nothing is saved, and their gradients are slices of one."""
    meter, size = tensors[0].meter, tensors[0].itemsize
    number = len(tensors)
    node = node_of(meter, tensors, lambda gradient: [gradient] * number)
    return new(meter, sum(tensor.num_elements for tensor in tensors), size, node)
