"""Floating-point operations per token, from a model's parameters."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from launcher.job.adapter import is_of_virtual_tokens
from launcher.training.model import adapters
from launcher.training.model import loading as models
from launcher.training.model.forward import output_embeddings_of


def used_share(config: Any, shape: tuple[int, ...]) -> float:
    """Return the share of a parameter of this shape that one token is multiplied with: for a tensor of all
    experts, the chosen ones."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen and len(shape) == 3 and shape[0] == experts else 1.0


def _table_size(model: PreTrainedModel) -> int:
    """Return the number of elements of the token embedding; 0 for a model with another kind of input."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return 0
    return 0 if table is None else models.whole_shape(table).numel()


def flops_per_token(model: PreTrainedModel, config: Any, length: int) -> float:
    """Return the floating-point operations per token, forward and backward, for samples of `length` tokens.

    Each matrix parameter counts 6, except experts that are not chosen (Kaplan et al. 2020, arXiv 2001.08361,
    table 1: forward 2 and backward 4). Attention counts 12 x layers x hidden x length, halved because it is
    causal (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). With an adapter, a frozen matrix counts 4: it
    has no weight gradient.
    """
    # A tied embedding is also the head, so it counts as a product. A text classifier has no such head, whatever
    # its config says.
    tied = getattr(config, "tie_word_embeddings", False) and output_embeddings_of(model) is not None
    embeddings = 0 if tied else _table_size(model)
    named = list(adapters.named_parameters(model))
    multiplied = [parameter for name, parameter in named if not is_of_virtual_tokens(name)]
    shapes = [models.whole_shape(parameter) for parameter in multiplied]
    matrices = (
        sum(shape.numel() * used_share(config, tuple(shape)) for shape in shapes if len(shape) >= 2)
        - embeddings
    )
    layers, hidden = (getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0))
    beside = any(adapters.is_own(name) for name, _ in named)
    still = [
        models.whole_shape(parameter)
        for parameter in model.parameters()
        if beside and not parameter.requires_grad
    ]
    spared = 2.0 * max(
        0,
        sum(shape.numel() * used_share(config, tuple(shape)) for shape in still if len(shape) >= 2)
        - embeddings,
    )
    return 6.0 * matrices - spared + 6.0 * layers * hidden * length
