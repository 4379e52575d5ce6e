"""Calls of a model's own class, or of its decoder alone, with the inputs that it accepts."""

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
"""The further inputs of a vision model's decoder: images, and the marks of their tokens."""


def own_forward(model: PreTrainedModel, inputs: Batch) -> Any:
    """Return the outputs of the model's own class; inputs that it does not know are left out."""
    kind = model_class_of(model)
    if "use_cache" in inspect.signature(kind.forward).parameters:
        # A recomputed layer would add its keys to the cache a second time.
        inputs = {"use_cache": False, **inputs}
    return kind.forward(model, **accepted(kind, inputs))


def model_class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the model's class without the subclass that sharding adds."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def output_embeddings_of(model: PreTrainedModel) -> Any:
    """Return the module that computes a model's logits; None if it has none.

    BLIP's class names none: it is in the text decoder.
    """
    writes = getattr(model, "text_decoder", None)
    own = model.get_output_embeddings()
    return own if own is not None or writes is None else writes.get_output_embeddings()


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal LM whose `last_hidden_state` goes into its head: its forward calls it
    first.

    Raises NotImplementedError if a class (from a model's own code, for example) does not name that part.
    """
    # In Llama 4 neither name leads to it.
    inside = (part for part in model.children() if isinstance(part, PreTrainedModel))
    for part in (model.base_model, model.get_decoder(), *inside):
        if part is not model:
            return part
    raise NotImplementedError(f"{type(model).__name__} does not say which of its parts is the decoder")


def decoder_inputs(batch: Batch) -> Batch:
    """Return the inputs of a decoder, with lengths under the names of transformers' FlashAttentionKwargs."""
    names = ("input_ids", "attention_mask", "position_ids", *SEES)
    inputs = {key: batch[key] for key in names if key in batch} | {"use_cache": False}
    if "cu_seq_lens" in batch:
        if "lengths" in batch:
            note_lengths(batch["cu_seq_lens"], batch["lengths"])
        inputs |= {"cu_seq_lens_q": batch["cu_seq_lens"], "cu_seq_lens_k": batch["cu_seq_lens"]}
        inputs |= {"max_length_q": batch["max_length"], "max_length_k": batch["max_length"]}
    return inputs


def accepted(kind: type[nn.Module], inputs: Batch) -> Batch:
    """Return the inputs that the forward of a class accepts."""
    names = _parameters(kind.forward)
    return inputs if names is None else {key: value for key, value in inputs.items() if key in names}


@lru_cache(maxsize=32)
def _parameters(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Return the argument names of a forward; None if it accepts any."""
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_any else frozenset(parameters)


@contextlib.contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """Collect the module's outputs in a list, inside."""
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def answering(decoder: nn.Module, outputs: Any, **changes: Any) -> Iterator[None]:
    """Make the decoder return `outputs` with these changes, inside, without computing anything."""
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
