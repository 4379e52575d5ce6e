"""Memory of the trainer's losses, which compute logits chunk by chunk."""

from __future__ import annotations

from launcher.planner.limits import chunk_length
from launcher.planner.memory.symbolic import Parameter, Storage, SymbolicTensor, new, node_of
from launcher.planner.memory.symbolic_program import Context

MOST_CHUNKS = 3


def cross_entropy(
    context: Context, hidden: SymbolicTensor, width: int, vocabulary: int, supervised: int, weight: Parameter
) -> SymbolicTensor:
    """Return chunked cross entropy. Its forward pass computes the gradients of hidden states and weight
    (`_ChunkedCrossEntropy`)."""
    meter, size = context.meter, hidden.itemsize
    num_tokens = hidden.num_elements // width
    chosen = hidden
    if supervised < num_tokens:
        of_all = hidden.num_elements * size
        select = node_of(meter, (hidden,), lambda gradient: [Storage(meter, of_all)])
        chosen = new(meter, supervised * width, size, select)
    learns = context.setting.training
    needs_hidden, needs_weight = learns and chosen.needs_gradient, learns and weight.trains
    kept: dict[str, Storage] = {}
    if needs_hidden:
        kept["hidden"] = Storage(meter, supervised * width * size)
    if needs_weight:
        kept["weight"] = Storage(meter, vocabulary * width * 4)
    _chunks(context, supervised, width, vocabulary, size, needs_hidden or needs_weight, needs_weight)

    def gradients(gradient: Storage) -> list[Storage | None]:
        of_hidden = kept.pop("hidden", None)
        of_weight = kept.pop("weight", None)
        if of_weight is not None and size != 4:
            of_weight = Storage(meter, vocabulary * width * size)
        return [of_hidden, of_weight]

    node = node_of(meter, (chosen, weight), gradients)
    return new(meter, 1, 4, node)


def _chunks(
    context: Context, rows: int, width: int, vocabulary: int, size: int, learns: bool, needs_weight: bool
) -> None:
    """Go through the chunks. An iteration's variables hold their tensors until the next one replaces them."""
    meter, cuda = context.meter, context.setting.cuda
    chunk = chunk_length(vocabulary, cuda)
    whole, rest = divmod(rows, chunk)
    lengths = [chunk] * min(whole, MOST_CHUNKS) + [rest] * bool(rest)
    raw = logits = kept = gradient = None
    for length in lengths:
        elements = length * vocabulary
        raw = Storage(meter, elements * size)
        logits = raw if size == 4 else Storage(meter, elements * 4)
        meter.transient(elements * 4)  # logsumexp: exp(logits - max)
        if not learns:
            continue
        kept = logits
        gradient = None if size == 4 else Storage(meter, elements * size)
        if size == 4:
            gradient = logits
        if needs_weight and size != 4 and not cuda:
            # The product, and a copy in fp32 to accumulate; a GPU's product accumulates in fp32 itself.
            meter.transient(vocabulary * width * (size + 4))
    del raw, logits, kept, gradient
