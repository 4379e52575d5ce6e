"""A model's config, tokenizer and class, before any weight is read."""

from __future__ import annotations

import errno
import pickle
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from launcher import tasks
from launcher.errors import ConfigurationError, Problem, first_line
from launcher.planner.model import model_support
from launcher.planner.plan import Plan
from launcher.training.model import attention
from launcher.training.model.model_files import lacks_processor, own_code


def read_config(plan: Plan) -> Any:
    """Return the model's config, from its files or the job; with `resize_embeddings` it has a row for each
    token."""
    config = _made_up(plan) if plan.model.config is not None else _in_files(plan)
    if plan.model.resize_embeddings:
        text = config.get_text_config()
        if not hasattr(text, "vocab_size"):
            reason = f"a {config.model_type} model has no table of tokens that could grow; leave it out"
            raise ConfigurationError(Problem("model.resize_embeddings", True, reason))
        text.vocab_size = max(text.vocab_size, num_ids(read_tokenizer(plan)))
    return config


def _in_files(plan: Plan) -> Any:
    try:
        with own_code(plan):
            return AutoConfig.from_pretrained(
                plan.model.name,
                revision=plan.model.revision,
                trust_remote_code=plan.model.trust_remote_code,
                attn_implementation=attention.register(plan.attention),
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(Problem("model.name", plan.model.name, first_line(error))) from None


def settled(plan: Plan) -> Plan:
    """Return the plan with the attention, layout and head that the model's architecture needs, if the planner
    had no config.

    Raises ConfigurationError for a model that cannot be trained correctly, and for an unknown name.
    """
    config = read_config(plan.model_copy(update={"attention": "eager"}))
    data, trusted = plan.data, plan.model.trust_remote_code
    names = tasks.names_of(plan.task, data)
    known = model_support.support_of_tasks(names, config.to_dict(), trusted, data.max_length, data.one_length)
    if (adapter := plan.model.adapter) is not None and adapter.is_prompt:
        reason = model_support.why_no_prompt(adapter, plan.task, config.to_dict())
        if reason is not None:
            raise ConfigurationError(Problem("model.adapter.method", adapter.method, reason))
    planned = model_support.Way(plan.layout, plan.attention, plan.head)
    if known.ways and (
        known is model_support.untried(plan.task)
        or planned in known.ways
        or plan.attention == "flash_attention_2"
    ):
        return plan
    # A plan has no `auto`: for a missing model it has the values that most models support.
    requested = "auto" if plan.model.attention == "sdpa" else plan.model.attention
    way = model_support.choose(
        known, plan.model.name, config.model_type, requested, plan.data.packing, plan.batch.micro_batch_size
    )
    return plan.model_copy(update=way._asdict())


def _made_up(plan: Plan) -> Any:
    """Return the config that is written in the job file."""
    sizes = dict(plan.model.config or {})
    kind = sizes.pop("model_type", None)
    try:
        return AutoConfig.for_model(
            str(kind), attn_implementation=attention.register(plan.attention), **sizes
        )
    except Exception as error:  # transformers' classes check sizes, each with its own kind of error
        raise ConfigurationError(Problem("model.config", kind, first_line(error))) from None


def read_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; without a padding token it pads with its end token."""
    try:
        with own_code(plan):
            tokenizer = AutoTokenizer.from_pretrained(
                plan.model.name, revision=plan.model.revision, trust_remote_code=plan.model.trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            Problem("model.name", plan.model.name, f"no tokenizer: {first_line(error)}")
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def drop_limits(tokenizer: Any) -> None:
    """Undo the truncation and padding that the last call left in a fast tokenizer.

    They are part of its tokenizer.json, by which other programs would cut or pad every text.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()


def read_processor(plan: Plan) -> Any:
    """Return the processor of the plan's task, or the model's tokenizer."""
    task, model = tasks.unprepared(plan), plan.model
    if not task.has_processor:
        return read_tokenizer(plan)
    try:
        with own_code(plan):
            if model.config is None and not lacks_processor(plan):
                options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
                processor = task.read_processor(model.name, options)
            else:
                processor = task.usual_processor(read_config(plan))
    except (OSError, ValueError, ImportError) as error:
        what = "rows" if task.traits.unit == "token" else f"{task.traits.unit}s"
        reason = f"no processor of its {what}: {first_line(error)}"
        raise ConfigurationError(Problem("model.name", model.name, reason)) from None
    if task.joins_tokenizer:
        processor.tokenizer = read_tokenizer(plan)
    return processor


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the highest id of a tokenizer's tokens: ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def model_class(loader: Any, config: Any, plan: Plan) -> type[PreTrainedModel]:
    """Return the class that the Auto class `loader` selects for a config. Raises ConfigurationError for a
    model that cannot do the plan's task."""
    reference = (getattr(config, "auto_map", None) or {}).get(loader.__name__)
    try:
        if plan.model.trust_remote_code and reference:
            with own_code(plan):
                return get_class_from_dynamic_module(reference, plan.model.name, revision=plan.model.revision)
        kinds = loader._model_mapping[type(config)]
        if not isinstance(kinds, tuple):
            return kinds
        named = config.architectures or ()
        return next((kind for kind in kinds if kind.__name__ in named), kinds[0])
    except KeyError:
        reason = f"a {config.model_type} model cannot do {plan.task}"
        raise ConfigurationError(Problem("model.task", plan.task, reason)) from None
    except (OSError, ValueError, ImportError, AttributeError) as error:
        reason = f"its own code ({reference}) cannot be used: {first_line(error)}"
        raise ConfigurationError(Problem("model.name", plan.model.name, reason)) from None


def why_not_read(error: Exception) -> str | None:
    """Return why a model's weights could not be read, in launcher's words; None if its files are not the
    cause."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's message explains how to run the pickled code; nobody should.
        return (
            "its weights are a pickle (pytorch_model.bin) that is damaged, or holds more than tensors, "
            "as code; nothing of it was run. "
            "Take the model's safetensors files, or have whoever made it save them"
        )
    if isinstance(error, SafetensorError):
        return f"one of its safetensors files is damaged or cut off ({first_line(error)}); fetch it again"
    if isinstance(error, EOFError) or (
        isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
    ):
        return f"one of its weight files is damaged or cut off ({first_line(error)}); fetch it again"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return None
    return first_line(error) if isinstance(error, (OSError, ValueError, ImportError)) else None
