"""Attention on symbolic tensors: PyTorch's flash kernels, and its formula written out."""

from __future__ import annotations

from launcher.planner.memory.operators import add, cast, dropout, multiply, pointwise, product, scale
from launcher.planner.memory.symbolic import Storage, SymbolicTensor, new, node_of


def rotate(x: SymbolicTensor, cosine: SymbolicTensor, sine: SymbolicTensor) -> SymbolicTensor:
    """Return `x * cos + rotate_half(x) * sin`."""
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
    hidden: int = 0,
) -> SymbolicTensor:
    """Return `scaled_dot_product_attention` by a flash kernel, which saves query, key, value, output, and an
    fp32 number per head and query. The backward pass takes and frees `hidden` more bytes within itself."""
    meter, size = query.meter, query.itemsize
    sizes = [tensor.num_elements * size for tensor in (query, key, value)]

    def gradients(gradient: Storage) -> list[Storage | None]:
        of_inputs: list[Storage | None] = [Storage(meter, num_bytes) for num_bytes in sizes]
        meter.transient(hidden)
        return of_inputs

    node = node_of(meter, (query, key, value), gradients)
    if node is not None:
        for tensor in (query, key, value):
            node.save(tensor.storage)
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
    probability: float,
    cuda: bool,
) -> SymbolicTensor:
    """Return one sample's attention by `_scaled_dot_product_attention_math`, which writes out the scores in
    fp32. A CPU uses it for dropout on the scores."""
    size = query.itemsize
    wide = [cast(tensor, 4) for tensor in (query, key, value)]
    scaled = scale(wide[0])
    scores = product(scaled, scale(wide[1]), num_scores)
    weights = pointwise(scores, "output")
    del scores
    weights.meter.transient(num_scores)
    if probability:
        weights = pointwise(weights, "nothing")
        weights = dropout(weights, probability, cuda)
    mixed = product(weights, wide[2], query.num_elements)
    result = cast(mixed, size)
    if size != 4:
        weights.meter.transient(num_scores * size)
    return result
