"""One model with a head for each of several tasks: transformers' own classes over one body.

Each task has the model's own class with its head (`BertForSequenceClassification`), but no separate body:
when its forward calls the body, it gets the shared body's outputs. So each head computes what its class
computes, by the class's own code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from launcher.errors import ConfigurationError, Problem
from launcher.tasks.traits import HEADS
from launcher.training.model.forward import accepted, model_class_of


class _Body:
    """A proxy that gives a head the shared body, or its outputs."""

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self.outputs: Any = None
        """The body's outputs for the batch of this pass; None: a head calls the body itself."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.body(*args, **named) if self.outputs is None else self.outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)


class WithHeads:
    """A mixin, before the base class of a model's family, that adds several heads."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model = cast(PreTrainedModel, self)
        heads = {name: head_class(config, name)(head_config(config, name)) for name in getattr(config, HEADS)}
        prefix = model.base_model_prefix
        bodies: dict[str, Any] = {name: getattr(head, prefix, None) for name, head in heads.items()}
        kinds = {type(body) for body in bodies.values()}
        if len(kinds) != 1 or type(None) in kinds:
            named = ", ".join(sorted(type(head).__name__ for head in heads.values()))
            reason = f"the {config.model_type} classes of these tasks ({named}) do not share one body"
            raise ConfigurationError(Problem("model.name", config.name_or_path or None, reason))
        # Some heads need a pooler in the body: the largest body has what each head needs.
        largest = max(bodies, key=lambda name: sum(one.numel() for one in bodies[name].parameters()))
        # Built again, because its parts must hold this model's config, through which their attention is
        # switched.
        setattr(self, prefix, getattr(head_class(config, largest)(config), prefix))
        for name, head in heads.items():
            del head._modules[prefix]
            head.__dict__[prefix] = _Body(getattr(self, prefix))
            setattr(self, head_name(name), head)
        model.post_init()


class _ClassByConfig:
    """A mapping from a config's class to a class with heads, like transformers' own mappings."""

    def __getitem__(self, kind: type) -> type[PreTrainedModel]:
        """Return the class. Raises KeyError for a type of model without a base model."""
        return _class_with_heads(kind)


class AutoModelWithHeads:
    """A minimal Auto class for models with several heads: only what launcher uses."""

    _model_mapping = _ClassByConfig()

    @classmethod
    def from_config(cls, config: Any, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
        """Return a model from its config, with initialised weights."""
        model: PreTrainedModel = cls._model_mapping[type(config)]._from_config(config, **options)
        return model


@functools.cache
def _class_with_heads(config: type) -> type[PreTrainedModel]:
    body = MODEL_MAPPING[config]
    body = body[0] if isinstance(body, tuple) else body
    family = next(one for one in body.__mro__[1:] if issubclass(one, PreTrainedModel))
    kind = type(f"{body.__name__}WithHeads", (WithHeads, family), {"__module__": __name__})
    return cast(type[PreTrainedModel], kind)


def head_name(task: str) -> str:
    """Return the name of a task's head in the model: the prefix of its parameters' names."""
    return f"head_{task}"


def head_class(config: Any, task: str) -> type[PreTrainedModel]:
    """Return transformers' own class with the head of a task.

    Raises ConfigurationError if this type of model has none.
    """
    auto_class = getattr(transformers, getattr(config, HEADS)[task]["auto_class"])
    try:
        kind: Any = auto_class._model_mapping[type(config)]
    except KeyError:
        what = auto_class.__name__.removeprefix("AutoModelFor")
        reason = f"transformers has no {what} class of a {config.model_type} model"
        raise ConfigurationError(Problem(f"data.tasks.{task}.task", what, reason)) from None
    return kind[0] if isinstance(kind, tuple) else kind


def head_config(config: Any, task: str) -> Any:
    """Return the config of a task's own class, as in an export of that head."""
    settings = dict(getattr(config, HEADS)[task])
    del settings["auto_class"]
    own = copy.deepcopy(config)
    delattr(own, HEADS)
    own.architectures = [head_class(config, task).__name__]
    if "id2label" in settings:
        settings["id2label"] = {int(number): name for number, name in settings["id2label"].items()}
    for name, value in settings.items():
        setattr(own, name, value)
    return own


def head_of(model: nn.Module, task: str) -> PreTrainedModel:
    """Return the head of a task, which is called like its own class."""
    return cast(PreTrainedModel, getattr(model, head_name(task)))


@contextlib.contextmanager
def body_computed(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Compute the body once; inside, each head gets its outputs, whatever the head's arguments."""
    body = cast(nn.Module, model.base_model)
    kind = model_class_of(cast(PreTrainedModel, body))
    more = {"use_cache": False} if "use_cache" in inspect.signature(kind.forward).parameters else {}
    outputs = body(**accepted(kind, dict(inputs) | more))
    names = getattr(cast(Any, model.config), HEADS)
    seen = [head_of(model, name).__dict__[model.base_model_prefix] for name in names]
    for one in seen:
        one.outputs = outputs
    try:
        yield
    finally:
        for one in seen:
            one.outputs = None


def starts_of_bias(
    config: Any, following: Callable[[type[PreTrainedModel], Any, str], frozenset[str]]
) -> Iterator[tuple[frozenset[str], torch.Tensor]]:
    """Yield the parameters whose size is a task head's number of outputs, and the initial value of a bias
    among them.

    `following` finds the parameters of a model's own class.
    """
    for task in getattr(config, HEADS):
        own = head_config(config, task)
        if (bias := getattr(own, "head_bias", None)) is not None:
            names = following(head_class(config, task), own, "num_labels")
            yield frozenset(f"{head_name(task)}.{name}" for name in names), torch.tensor(bias)
