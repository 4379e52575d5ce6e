"""Call a model's own class, or its decoder alone, with the inputs that it accepts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from launcher.training.model.packed_kernel import note_lengths

Batch = dict[str, Any]
SEES = (*("pixel_values", "pixel_attention_mask", "image_grid_thw"), *("token_type_ids", "mm_token_type_ids"))
"""What a decoder that sees is called with beside its tokens: images, and which tokens are theirs."""


def own_forward(model: PreTrainedModel, inputs: Batch) -> Any:
    """Return the outputs of the model's own class; inputs that it does not know are left out."""
    kind = model_class_of(model)
    if "use_cache" in inspect.signature(kind.forward).parameters:
        # A layer that is computed again would add its keys to the cache a second time.
        inputs = {"use_cache": False, **inputs}
    return kind.forward(model, **accepted(kind, inputs))


def model_class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the model's class as it was before sharding put one of its own in front."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def output_embeddings_of(model: PreTrainedModel) -> Any:
    """Return the matrix that makes a model's logits, as a module; None where it has none.

    BLIP's class names none of its own: it is that of the part which writes.
    """
    writes = getattr(model, "text_decoder", None)
    own = model.get_output_embeddings()
    return own if own is not None or writes is None else writes.get_output_embeddings()


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal LM whose `last_hidden_state` goes into its head: what its own forward calls
    first.

    Raises NotImplementedError where a class, as one that came with a model, does not say which part that is.
    """
    # Llama 4 names neither by the name that its class has for it.
    inside = (part for part in model.children() if isinstance(part, PreTrainedModel))
    for part in (model.base_model, model.get_decoder(), *inside):
        if part is not model:
            return part
    raise NotImplementedError(f"{type(model).__name__} does not say which of its parts is the decoder")


def decoder_inputs(batch: Batch) -> Batch:
    """Return what a decoder is called with: names of lengths as transformers' FlashAttentionKwargs have
    them."""
    names = ("input_ids", "attention_mask", "position_ids", *SEES)
    inputs = {key: batch[key] for key in names if key in batch} | {"use_cache": False}
    if "cu_seq_lens" in batch:
        if "lengths" in batch:
            note_lengths(batch["cu_seq_lens"], batch["lengths"])
        inputs |= {"cu_seq_lens_q": batch["cu_seq_lens"], "cu_seq_lens_k": batch["cu_seq_lens"]}
        inputs |= {"max_length_q": batch["max_length"], "max_length_k": batch["max_length"]}
    return inputs


def accepted(kind: type[nn.Module], inputs: Batch) -> Batch:
    """Return those of the inputs that the forward of a class takes."""
    names = _parameters(kind.forward)
    return inputs if names is None else {key: value for key, value in inputs.items() if key in names}


@lru_cache(maxsize=32)
def _parameters(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names that a forward takes; None where it takes any."""
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_any else frozenset(parameters)


@contextlib.contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what the module returns in a list, while inside."""
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def answering(decoder: nn.Module, outputs: Any, **changes: Any) -> Iterator[None]:
    """Have the decoder return `outputs` with these changes, while inside, without computing anything."""
    answer = type(outputs)(**{**outputs, **changes})
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
