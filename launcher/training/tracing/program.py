"""The memory of a model's blocks, traced from its real class with fake tensors.

`torch`'s FakeTensorMode computes shapes, autograd keeps and frees what it always does, and a dispatch mode
sees each tensor come and go. No process group is needed: what an engine gathers, sends and keeps between the
blocks is the planner's (`planning/footprint`), so that one trace serves FSDP and ZeRO, and any number of
ranks and layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from launcher.errors import ConfigurationError, Problem
from launcher.planner.memory.program import (
    MOST_LAYERS,
    Context,
    Segment,
    Setting,
    Unit,
    Weight,
    matches,
    spread,
)
from launcher.training import operations
from launcher.training.engines.linear import is_plain
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.model import loading as models
from launcher.training.model import pretrained
from launcher.training.tracing.counting import Counting

MakeBatch = Callable[[Setting, Any], dict[str, Any]]
Forward = Callable[[PreTrainedModel, dict[str, Any]], Any]
_READ = ("cu_seq_lens",)
"""Of a batch: what the model's code reads as Python numbers, and which therefore keeps them."""


@dataclass(frozen=True)
class _Place:
    """Say where a layer stands."""

    index: int
    """Of all layers of the model."""
    begins: str | None
    """What comes before it, where it is the first of a stack."""
    ends: str | None
    """What comes after it, where it is the last of one."""


class Traced:
    """A model's real class as a program of the planner."""

    def __init__(
        self,
        config: Any,
        auto_class: Any,
        forward: Forward,
        make_batch: MakeBatch,
        dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """`dtype` is what it computes in, `options` go to `from_config`. Raises ConfigurationError for a
        model without repeated layers."""
        self._config, self._forward, self._make_batch = config, forward, make_batch
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode, no_init_weights():
            self._model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, **options)
            self._model.tie_weights()
        layers = models.repeated_layers(self._model)
        self._units = _units(self._model, layers)
        self._layers = _shortened(self._model, layers)
        self._plain = {id(layer): layer.forward for layer, _ in self._layers}
        self._gone_through: dict[Setting, list[Segment]] = {}

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return what is outside of the layers, and each layer."""
        return self._units

    def blocks(self, setting: Setting) -> list[Segment]:
        """The blocks of one micro-batch, all layers of the model among them."""
        if setting not in self._gone_through:
            self._gone_through[setting] = self._traced(setting)
        return self._gone_through[setting]

    def _traced(self, setting: Setting) -> list[Segment]:
        context = Context(setting)
        batch = self._make_batch(setting, self._config)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(setting.training and not matches(name, setting.frozen))
            parameter.grad = None
        with self._mode:
            if setting.accumulates:
                for parameter in self._model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            counting = Counting(context.meter, self._held(), setting.batch, setting.cuda)
            with self._prepared(context), counting, self._decided_by_numbers():
                context.begin("stem")
                self._go(
                    context,
                    {key: self._without_numbers(key, value, counting) for key, value in batch.items()},
                )
        return spread(context.segments)

    def _without_numbers(self, key: str, value: Any, counting: Counting) -> Any:
        if not isinstance(value, torch.Tensor) or key in _READ:
            return value
        fake = self._mode.from_tensor(value)
        counting.count(fake.untyped_storage())
        return fake

    @contextlib.contextmanager
    def _decided_by_numbers(self) -> Iterator[None]:
        """Masks are made or left out as in a real step. Raises ConfigurationError for a model whose code asks
        for numbers."""
        masking_utils.is_tracing, before = lambda *_: False, masking_utils.is_tracing
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            reason = f"its code goes by the numbers in tensors ({error.func}), which a trace does not have"
            raise ConfigurationError(Problem("--trace", type(self._model).__name__, reason)) from None
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            reason = f"its code does not run without numbers: {pretrained.first_line(error)}"
            raise ConfigurationError(Problem("--trace", type(self._model).__name__, reason)) from None
        finally:
            masking_utils.is_tracing = before

    def _held(self) -> Iterator[torch.Tensor]:
        """Yield what is there before the step, which an engine answers for."""
        yield from self._model.buffers()
        for parameter in self._model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad

    def _go(self, context: Context, batch: dict[str, Any]) -> None:
        training = context.setting.training
        self._model.train(training)
        with torch.set_grad_enabled(training):
            output = self._forward(self._model, batch)
            if training:
                loss = output.loss_sum * 1.0
                context.begin("tail", is_backward=True)
                loss.backward()
                del loss
        del output, batch
        context.close()

    @contextlib.contextmanager
    def _prepared(self, context: Context) -> Iterator[None]:
        """With the layers computed again or not, and with what begins a block and notes a gradient."""
        wide: list[torch.Tensor] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda parameter: _note(context, parameter, wide))
            for parameter in self._model.parameters()
            if parameter.requires_grad
        ]
        for layer, place in self._layers:
            checkpoint_activations(layer, context.setting.checkpointing)
            hooks.append(layer.register_forward_pre_hook(_before(context, place), with_kwargs=True))
            hooks.append(layer.register_forward_hook(_after(context, place)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, _ in self._layers:
                layer.forward = self._plain[id(layer)]
            for parameter in self._model.parameters():
                parameter.grad = None


def _note(context: Context, parameter: torch.Tensor, wide: list[torch.Tensor]) -> None:
    """A gradient was made: what stays of it is itself, nothing where one was there already, or a copy in
    fp32."""
    gradient, setting = parameter.grad, context.setting
    assert gradient is not None
    num_bytes = 0 if setting.accumulates else gradient.numel() * (4 if setting.widens else gradient.itemsize)
    context.note(gradient.numel(), num_bytes)
    if setting.widens and not setting.accumulates:
        wide.append(torch.empty_like(gradient, dtype=torch.float32))
        parameter.grad = None
    elif setting.widens:
        torch.empty_like(gradient, dtype=torch.float32)


def _before(context: Context, place: _Place) -> Callable[..., None]:
    def begin(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if place.begins is not None:
            kind = place.begins
            hidden = _first_tensor((arguments, options))
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda _: context.begin(kind, is_backward=True))
        context.begin("layer", place.index)

    return begin


def _after(context: Context, place: _Place) -> Callable[..., None]:
    def end(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        hidden = _first_tensor(output)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: context.begin("layer", place.index, is_backward=True))
        if place.ends is not None:
            context.begin(place.ends)

    return end


def _first_tensor(tree: Any) -> torch.Tensor | None:
    return next(
        (
            leaf
            for leaf in pytree.tree_leaves(tree)
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        ),
        None,
    )


def _units(model: PreTrainedModel, layers: list[nn.Module]) -> tuple[Unit, list[Unit]]:
    of = {id(parameter): index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    weights: dict[int, list[Weight]] = {index: [] for index in range(-1, len(layers))}
    whole = (nn.Embedding, nn.Conv2d, Conv1D)
    plainly = [module for module in model.modules() if is_plain(module) or isinstance(module, whole)]
    plain = {id(parameter) for module in plainly for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        shape, viewed = tuple(parameter.shape), parameter.dim() > 1 and id(parameter) not in plain
        share = operations.used_share(model.config.get_text_config(), shape)
        weights[of.get(id(parameter), -1)].append(Weight(name, shape, viewed=viewed, used=share))
    names = [name for name, _ in model.named_parameters()]
    first = names.index(weights[0][0].name)
    num_first = sum(names.index(weight.name) < first for weight in weights[-1])
    return Unit(tuple(weights[-1]), num_first), [Unit(tuple(weights[index])) for index in range(len(layers))]


def _shortened(model: PreTrainedModel, layers: list[nn.Module]) -> list[tuple[nn.Module, _Place]]:
    """Take the layers of each stack that are like their neighbours out of the model; those that are left, and
    where they stood."""
    number = {id(layer): index for index, layer in enumerate(layers)}
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module[0]) in number
    ]
    left: list[tuple[nn.Module, _Place]] = []
    for position, stack in enumerate(stacks):
        members = list(stack)
        if len(members) > MOST_LAYERS and _alike(model, members):
            members = [*members[: MOST_LAYERS - 1], members[-1]]
            stack._modules = {str(index): layer for index, layer in enumerate(members)}
        for layer in members:
            begins = ("stem" if position == 0 else "bridge") if layer is members[0] else None
            ends = ("tail" if position == len(stacks) - 1 else "bridge") if layer is members[-1] else None
            left.append((layer, _Place(number[id(layer)], begins, ends)))
    return left


def _alike(model: PreTrainedModel, layers: list[nn.Module]) -> bool:
    """Return whether all but the first and the last layer of a stack are equal in shape and in kind."""
    shapes = {(type(layer).__name__, tuple(p.shape for p in layer.parameters())) for layer in layers[1:-1]}
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return len(shapes) == 1 and len(set(kinds or [""])) == 1
