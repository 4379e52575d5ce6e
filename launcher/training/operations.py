"""Floating-point operations per token, from a model's parameters."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from launcher.training.model import adapters
from launcher.training.model import loading as models
from launcher.training.model.forward import output_embeddings_of


def used_share(config: Any, shape: tuple[int, ...]) -> float:
    """Return the share of a parameter of this shape that one token is multiplied with: of all experts in one
    tensor, those that are chosen."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen and len(shape) == 3 and shape[0] == experts else 1.0


def _table_size(model: PreTrainedModel) -> int:
    """Return the elements of the table of words; 0 for a model that reads something else."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return 0
    return 0 if table is None else models.whole_shape(table).numel()


def flops_per_token(model: PreTrainedModel, config: Any, length: int) -> float:
    """Return the floating-point operations of one token, forward and backward, of samples of `length` tokens.

    6 for each matrix parameter (Kaplan et al. 2020, arXiv 2001.08361, table 1, forward 2 and backward 4) but
    for experts that are not chosen, and for attention 12 x layers x hidden x length, halved as causal
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Beside an adapter a matrix that does not train
    takes 4: there is no gradient of its own to make.
    """
    # A table that is the head too is multiplied with; a classifier of texts has no such head, whatever its
    # config says.
    tied = getattr(config, "tie_word_embeddings", False) and output_embeddings_of(model) is not None
    embeddings = 0 if tied else _table_size(model)
    shapes = [models.whole_shape(parameter) for parameter in model.parameters()]
    matrices = (
        sum(shape.numel() * used_share(config, tuple(shape)) for shape in shapes if len(shape) >= 2)
        - embeddings
    )
    layers, hidden = (getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0))
    beside = any(adapters.is_own(name) for name, _ in adapters.named_parameters(model))
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
