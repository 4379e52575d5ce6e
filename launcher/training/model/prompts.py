"""Prompt tuning: learned vectors in the place of the embeddings of virtual tokens, which have negative ids.

peft embeds the words, and joins the vectors of virtual tokens before them. Here the input embeddings themselves
do it, by the ids that a task has put before each sample. So a model's own code sees one sequence of tokens:
samples can be padded, packed, generated from and classified as without a prompt, each behind its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import PROMPT, Adapter

WEIGHTS = "adapter_model.safetensors"
"""The file with the values in an adapter's directory."""


def embeddings_of(model: PreTrainedModel) -> Any:
    """Return the module that embeds the words of a text: of an encoder-decoder, its encoder's.

    Raises ConfigurationError for a class without one.
    """
    try:
        reads: Any = model.get_encoder() if model.config.is_encoder_decoder else model
        embedding = reads.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        reason = f"{type(model).__name__} names no table of input embeddings for virtual tokens; write lora"
        raise ConfigurationError(Problem("model.adapter.method", "prompt-tuning", reason))
    return embedding


class Prompted:
    """The virtual tokens of one model, whose vectors can be removed temporarily from its parameters."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        """Insert them, in fp32 and without memory yet."""
        self._embedding = embedding = embeddings_of(model)
        shape = adapter.virtual_tokens, embedding.embedding_dim
        embedding.register_parameter(PROMPT, nn.Parameter(torch.empty(shape, device="meta")))
        words = embedding.forward

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            embedded = words(input_ids.clamp(min=0))
            vectors = getattr(embedding, PROMPT).to(embedded.dtype)
            virtual = functional.embedding((-1 - input_ids).clamp(min=0), vectors)
            return torch.where((input_ids < 0).unsqueeze(-1), virtual, embedded)

        embedding.forward = forward
        self._vectors: nn.Parameter | None = None

    def take_out(self) -> None:
        """Restore the parameters without them."""
        self._vectors = self._embedding._parameters.pop(PROMPT)

    def put_back(self) -> None:
        """Restore the parameters with them."""
        self._embedding.register_parameter(PROMPT, self._vectors)


def name_in(model: nn.Module) -> str:
    """Return the name of the vectors among the model's parameters."""
    return next(name for name, _ in model.named_parameters() if name.endswith(f".{PROMPT}"))


def beginning(
    model: PreTrainedModel, adapter: Adapter, seed: int, tokenizer: Callable[[], Any]
) -> torch.Tensor:
    """Return the vectors that training starts from, fp32 [virtual tokens, width]. Called by all ranks together.

    They are those of a directory, or the embeddings of tokens: of `init_text` as in peft, else drawn from the
    whole vocabulary by the seed alone. Raises ConfigurationError for a directory of another size, and for a text
    without tokens.
    """
    if adapter.weights is not None:
        return _stored(adapter, model)
    embedding = embeddings_of(model)
    if adapter.init_text is None:
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed}/{PROMPT}".encode()).digest()[:7], "big")
        )
        ids = torch.randint(embedding.num_embeddings, (adapter.virtual_tokens,), generator=generator)
    else:
        ids = _tokens(adapter, tokenizer())
    return _embedded(embedding, ids)


def _tokens(adapter: Adapter, tokenizer: Any) -> torch.Tensor:
    """Return the tokens of `init_text`, int64 [virtual tokens], repeated or cut to that number as in peft."""
    ids = tokenizer(adapter.init_text)["input_ids"]
    if not ids:
        reason = "the model's tokenizer makes no tokens of it; leave it out, or write another text"
        raise ConfigurationError(Problem("model.adapter.init_text", adapter.init_text, reason))
    return torch.tensor(ids).repeat(-(-adapter.virtual_tokens // len(ids)))[: adapter.virtual_tokens]


def _embedded(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of tokens, fp32 [tokens, width], with the factor that some models' tables have.

    Only these rows of a sharded table are gathered.
    """
    weight = embedding.weight.detach()
    ids = ids.to(weight.device)
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        whole = DTensor.from_local(ids, mesh, [Replicate()] * mesh.ndim, run_check=False)
        looked_up: Any = functional.embedding(whole, weight)  # a DTensor
        rows: torch.Tensor = looked_up.full_tensor()
    else:
        rows = functional.embedding(ids, weight)
    # By the table's own code, which may multiply: for a moment it holds these rows alone.
    padding, embedding.padding_idx = embedding.padding_idx, None
    sharded = embedding._parameters["weight"]
    embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    try:
        rows = type(embedding).forward(embedding, torch.arange(len(rows), device=rows.device))
    finally:
        embedding.padding_idx, embedding._parameters["weight"] = padding, sharded
    return rows.float()


def _stored(adapter: Adapter, model: PreTrainedModel) -> torch.Tensor:
    """Return the vectors of the adapter's directory. Raises ConfigurationError if they are for another width."""
    shape = [adapter.virtual_tokens, embeddings_of(model).embedding_dim]
    with safe_open(Path(str(adapter.weights)) / WEIGHTS, "pt") as file:
        there = file.get_slice(PROMPT).get_shape() if PROMPT in file.keys() else None  # noqa: SIM118
        if there != shape:
            reason = f"the adapter is not of this model: its {PROMPT} are {there}, and {shape} are needed"
            raise ConfigurationError(Problem("model.adapter.weights", adapter.weights, reason))
        vectors: torch.Tensor = file.get_tensor(PROMPT)
    return vectors.float()


def settings(adapter: Adapter, model: PreTrainedModel, **more: Any) -> Any:
    """Return the virtual tokens as a peft config. Every size is written, which peft does not find in all."""
    from peft import PromptTuningConfig

    text = model.config.get_text_config()
    return PromptTuningConfig(
        num_virtual_tokens=adapter.virtual_tokens,
        token_dim=embeddings_of(model).embedding_dim,
        # For an encoder-decoder peft would store as many vectors again, which it never reads.
        num_transformer_submodules=1,
        num_layers=getattr(text, "num_hidden_layers", 1),
        num_attention_heads=getattr(text, "num_attention_heads", 1),
        **more,
    )
