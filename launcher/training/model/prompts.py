"""Prompt tuning and P-tuning: learned vectors in the place of the embeddings of virtual tokens.

These have negative ids. In P-tuning a learned encoder makes the vectors of others.

peft embeds the words, and joins the vectors of virtual tokens before them. Here the input embeddings themselves
do it, by the ids that a task has put before each sample. So a model's own code sees one sequence of tokens:
samples can be padded, packed, generated from and classified as without a prompt, each behind its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import ENCODER, PROMPT, Adapter

WEIGHTS = "adapter_model.safetensors"
"""The file with the values in an adapter's directory."""


def embeddings_of(model: PreTrainedModel, method: str = "prompt-tuning") -> Any:
    """Return the module that embeds the words of a text: of an encoder-decoder, its encoder's.

    Raises ConfigurationError for a class without one, which `method` needs.
    """
    try:
        reads: Any = model.get_encoder() if model.config.is_encoder_decoder else model
        embedding = reads.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        reason = f"{type(model).__name__} names no table of input embeddings for virtual tokens; write lora"
        raise ConfigurationError(Problem("model.adapter.method", method, reason))
    return embedding


class Prompted:
    """The virtual tokens of one model. What is learned of them can be removed temporarily from its modules."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        """Insert them, in fp32 and without memory yet."""
        self._embedding = embedding = embeddings_of(model, adapter.method)
        if adapter.has_encoder:
            with torch.device("meta"):
                embedding.add_module(ENCODER, _new_encoder(adapter, model))
        else:
            shape = adapter.virtual_tokens, embedding.embedding_dim
            embedding.register_parameter(PROMPT, nn.Parameter(torch.empty(shape, device="meta")))
        words = embedding.forward

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            embedded = words(input_ids.clamp(min=0))
            if adapter.has_encoder:
                vectors = _put_out(getattr(embedding, ENCODER), input_ids.device)
            else:
                vectors = getattr(embedding, PROMPT)
            vectors = vectors.to(embedded.dtype)
            virtual = functional.embedding((-1 - input_ids).clamp(min=0), vectors)
            return torch.where((input_ids < 0).unsqueeze(-1), virtual, embedded)

        embedding.forward = forward
        self._own = embedding._modules if adapter.has_encoder else embedding._parameters
        self._name = ENCODER if adapter.has_encoder else PROMPT
        self._learned: Any = None

    def take_out(self) -> None:
        """Restore the modules without them."""
        self._learned = self._own.pop(self._name)

    def put_back(self) -> None:
        """Restore the modules with them."""
        self._own[self._name] = self._learned


def _new_encoder(adapter: Adapter, model: PreTrainedModel) -> nn.Module:
    """Return P-tuning's encoder with peft's own start, by torch's random numbers."""
    from peft import PromptEncoder

    return PromptEncoder(settings(adapter, model))


def _put_out(encoder: nn.Module, device: torch.device) -> torch.Tensor:
    """Return the vectors of an encoder, [virtual tokens, width]; peft also asks for all of them at once."""
    number: Any = encoder.get_submodule("embedding").num_embeddings
    # cuDNN and oneDNN would copy an LSTM's sharded weights into one piece in each pass: of a large model, GB.
    with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
        vectors: torch.Tensor = encoder(torch.arange(number, device=device)[None])[0]
    return vectors


def put_out(adapter: Adapter, model: PreTrainedModel, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the vectors that an encoder makes with these values, by parameter name in the model; fp32
    [virtual tokens, width]."""
    encoder = _new_encoder(adapter, model)
    encoder.load_state_dict({name.rpartition(f".{ENCODER}.")[2]: one.float() for name, one in values.items()})
    with torch.no_grad():
        return _put_out(encoder, torch.device("cpu"))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return the random numbers of a run's seed for what has this name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def beginning(
    model: PreTrainedModel, adapter: Adapter, seed: int, tokenizer: Callable[[], Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the values that training starts from, fp32, by parameter name. Called by all ranks together.

    Vectors [virtual tokens, width] are those of a directory, or the embeddings of tokens: of `init_text` as in
    peft, else drawn from the whole vocabulary by the seed alone. An encoder starts as peft's own, by the seed
    alone. Raises ConfigurationError for a directory of another size, and for a text without tokens.
    """
    embedding = embeddings_of(model)
    place = next(name for name, module in model.named_modules() if module is embedding)
    if adapter.has_encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_of(seed, ENCODER).initial_seed())
            encoder = _new_encoder(adapter, model)
        for name, parameter in encoder.named_parameters():
            yield f"{place}.{ENCODER}.{name}", parameter.detach()
        return
    if adapter.weights is not None:
        yield f"{place}.{PROMPT}", _stored(adapter, model)
        return
    if adapter.init_text is None:
        generator = generator_of(seed, PROMPT)
        ids = torch.randint(embedding.num_embeddings, (adapter.virtual_tokens,), generator=generator)
    else:
        ids = _tokens(adapter, tokenizer())
    yield f"{place}.{PROMPT}", _embedded(embedding, ids)


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
    from peft import PromptEncoderConfig, PromptTuningConfig

    text, width = model.config.get_text_config(), embeddings_of(model).embedding_dim
    kind: Any = PromptTuningConfig
    if adapter.has_encoder:
        kind = PromptEncoderConfig
        more["encoder_reparameterization_type"] = adapter.encoder.upper()
        more["encoder_hidden_size"] = adapter.encoder_hidden_size or width
        more["encoder_num_layers"] = adapter.encoder_num_layers
    return kind(
        num_virtual_tokens=adapter.virtual_tokens,
        token_dim=width,
        # For an encoder-decoder peft would store as many vectors again, which it never reads.
        num_transformer_submodules=1,
        num_layers=getattr(text, "num_hidden_layers", 1),
        num_attention_heads=getattr(text, "num_attention_heads", 1),
        **more,
    )
