"""Hidden states of a causal LM in the place of its logits: computed for `predict --logits`, and learned from.

The last hidden states and the output matrix are all that a language model's logits depend on. Their product is
computed when a student learns, in the chunks of its own loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import PreTrainedModel

from launcher.errors import DataError
from launcher.planner.plan import Plan
from launcher.tasks.task import Output
from launcher.tasks.written_logits import KEY, Manifest
from launcher.training.data.written_logits import as_stored, hash_of_matrix, mapped
from launcher.training.loss import LogitTransform, at
from launcher.training.model.forward import Batch, accepted, decoder_inputs, decoder_of
from launcher.training.own_head import places_of
from launcher.training.precision import DTYPES


class OutputMatrix(nn.Module):
    """A teacher's output matrix, frozen: hidden states [n, width] to logits [n, vocabulary]."""

    def __init__(
        self, transform: LogitTransform, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Take `weight` [vocabulary, width] and `bias` [vocabulary] in the precision of the hidden states."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.transform = transform

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, in the precision of the hidden states, as the teacher's own class computes them."""
        if self.bias is None:
            return self.transform.forward(hidden @ self.weight.t())
        return self.transform.forward(torch.addmm(self.bias, hidden, self.weight.t()))


def load_matrix(plan: Plan, directory: str) -> OutputMatrix:
    """Return the output matrix in a directory of written states, on the plan's device, sharded over its ranks as
    a teacher is. Called by all ranks together.

    Raises DataError if it is not the one that was written.
    """
    folder = Path(directory)
    manifest = Manifest.read(folder)
    hidden = manifest.hidden
    assert hidden is not None  # the task was compared before
    parts = []
    for name in ("matrix", "bias") if hidden.has_bias else ("matrix",):
        array = mapped(folder, manifest, name)
        parts.append(torch.empty(array.shape, dtype=DTYPES[manifest.precision]))
        as_stored(parts[-1])[...] = array  # on the CPU it shares the tensor's memory
    if hash_of_matrix(*map(as_stored, parts)) != hidden.matrix_hash:
        reason = "the output matrix is not the one that was written; write the logits anew"
        raise DataError(f"{KEY}: {folder / 'matrix.npy'}: {reason}")
    matrix = OutputMatrix(LogitTransform(hidden.scale, hidden.softcap), *parts)
    offloads, mesh = plan.offload == "parameters", plan.mesh
    if mesh.world_size == 1 and not offloads:
        return matrix.to(mesh.device)
    options: dict[str, Any] = {"reshard_after_forward": True}
    if offloads:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device == "cuda")
    sizes = {"dp_replicate": mesh.dp_replicate, "fsdp": mesh.dp_shard}
    sizes = {name: number for name, number in sizes.items() if name == "fsdp" or number > 1}
    ranks = init_device_mesh(mesh.device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    fully_shard(matrix, mesh=ranks, **options)
    return matrix


@contextlib.contextmanager
def giving_states(
    model: PreTrainedModel, dtype: torch.dtype, take: Callable[[str, torch.Tensor], None] | None
) -> Iterator[None]:
    """Make the model's forward pass return the hidden states of supervised tokens as predictions, [n, width] of
    `dtype`, and no loss, within this context.

    The first pass, in which the output matrix is whole, gives it to `take`: `matrix`, [vocabulary, width], and
    `bias`, [vocabulary], if it has one.
    """
    before, taker = model.forward, [] if take is None else [take]

    def forward(batch: Batch) -> Output:
        decoder = decoder_of(model)
        outputs = decoder(**accepted(type(decoder), decoder_inputs(batch)))
        hidden, _ = at(places_of(batch), outputs.last_hidden_state.flatten(0, 1), batch["targets"])
        for take in taker:
            for name, part in parts_of_head(model).items():
                take(name, part.detach())
        taker.clear()
        nothing = hidden.new_zeros((), dtype=torch.float32)
        return Output(nothing, nothing, hidden.to(dtype))

    model.forward = forward
    try:
        yield
    finally:
        model.forward = before


def parts_of_head(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a causal LM's output `matrix`, and its `bias` if it has one; a rank's own part of each outside of a
    forward pass."""
    head: Any = model.get_output_embeddings()
    return {name: part for name, part in (("matrix", head.weight), ("bias", head.bias)) if part is not None}
