"""Attention on symbolic tensors: PyTorch's fused kernels and transformers' eager one."""

from __future__ import annotations

from launcher.planner.memory.operators import add, cast, copy, dropout, multiply, pointwise, product, scale
from launcher.planner.memory.symbolic import Storage, SymbolicTensor, new, node_of


def rotate(x: SymbolicTensor, cosine: SymbolicTensor, sine: SymbolicTensor) -> SymbolicTensor:
    """`x * cos + rotate_half(x) * sin`."""
    first = multiply(x, cosine)
    half = pointwise(x, "nothing", num_elements=x.num_elements // 2)
    turned = pointwise(x, "nothing")
    del half
    second = multiply(turned, sine)
    del turned
    return add(first, second)


def fused(
    query: SymbolicTensor,
    key: SymbolicTensor,
    value: SymbolicTensor,
    num_heads: int,
    num_queries: int,
    mask: int = 0,
    bias: SymbolicTensor | None = None,
    hidden: int = 0,
) -> SymbolicTensor:
    """`scaled_dot_product_attention`, flash: it keeps query, key, value, its output, one fp32 number of each
    head and query, and the mask, of which it makes one in its own precision (`mask` is its number of
    elements). A `bias` is kept as it is; the gradient of one that is learned, which a GPU's memory-efficient
    kernel makes, is one of every sample before it is summed. `hidden` bytes are taken and given back within
    the backward pass."""
    meter, size = query.meter, query.itemsize
    sizes = [tensor.num_elements * size for tensor in (query, key, value)]
    learned = bias.num_elements * size if bias is not None and bias.needs_gradient else 0
    scores = num_heads * num_queries * (key.num_elements * num_queries // query.num_elements) * size

    def gradients(gradient: Storage) -> list[Storage | None]:
        made: list[Storage | None] = [Storage(meter, num_bytes) for num_bytes in sizes]
        meter.transient(hidden)
        if not learned:
            return [*made, None]
        of_all = Storage(meter, scores)
        return [*made, of_all if scores == learned else Storage(meter, learned)]

    node = node_of(meter, (query, key, value, bias), gradients)
    if node is not None:
        for tensor in (query, key, value) if bias is None else (query, key, value, bias):
            node.save(tensor.storage)
    if mask:
        written = Storage(meter, mask * size)
        if node is not None:
            node.save(written)
    result = new(meter, query.num_elements, size, node, kept_by_selective=True)
    sums = Storage(meter, num_heads * num_queries * 4)
    if node is not None:
        node.save(result.storage)
        node.save(sums)
    return result


def plain(
    query: SymbolicTensor,
    key: SymbolicTensor,
    value: SymbolicTensor,
    num_scores: int,
    batch: int,
    probability: float,
    cuda: bool,
    bias: SymbolicTensor | None = None,
) -> SymbolicTensor:
    """`_scaled_dot_product_attention_math`: in fp32, the scores written out. A CPU takes it to drop some of
    them, or to learn a bias."""
    size = query.itemsize
    wide = [cast(tensor, 4) for tensor in (query, key, value)]
    scaled = scale(wide[0])
    scores = product(_batched(scaled, batch), _batched(scale(wide[1]), batch), num_scores)
    if bias is not None:
        scores = _added(scores, bias)
    weights = pointwise(scores, "output")
    del scores
    weights.meter.transient(num_scores)
    if probability:
        weights = pointwise(weights, "nothing")
        weights = dropout(weights, probability, cuda)
    mixed = product(weights, _batched(wide[2], batch), query.num_elements)
    result = cast(mixed, size)
    if size != 4:
        weights.meter.transient(num_scores * size)
    return result


def _batched(tensor: SymbolicTensor, batch: int) -> SymbolicTensor:
    """In the order that a batched product wants, [samples x heads, ...]: one sample's lies so already."""
    return copy(tensor) if batch > 1 else tensor


def _added(scores: SymbolicTensor, bias: SymbolicTensor) -> SymbolicTensor:
    """A bias added in place, learned or not; not in place under selective checkpointing, whose dispatch mode
    PyTorch heeds."""
    meter, size = bias.meter, bias.num_elements * bias.itemsize
    node = node_of(
        meter,
        (scores, bias),
        lambda gradient: [gradient, Storage(meter, size) if size < gradient.num_bytes else gradient],
    )
    if meter.frame is not None and meter.frame.selective:
        result = new(meter, scores.num_elements, scores.itemsize, node)
    else:
        result = SymbolicTensor(scores.num_elements, scores.itemsize, scores.storage, node)
    # A CPU adds in one precision, and takes a copy of what comes in another.
    meter.transient(bias.num_elements * scores.itemsize * (bias.itemsize != scores.itemsize))
    return result
