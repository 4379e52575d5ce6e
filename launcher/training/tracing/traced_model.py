"""A model's real class, traced with fake tensors for the memory of its blocks.

`torch`'s FakeTensorMode computes shapes, autograd keeps and frees what it always does, and a dispatch mode
sees each tensor come and go. No process group is needed: the planner adds what an engine gathers, sends and
keeps between blocks. So one trace serves FSDP and ZeRO, and any number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from launcher.job.adapter import Adapter
from launcher.planner.memory.program import Unit, Weight
from launcher.planner.memory.symbolic import Meter
from launcher.training import loss, operations
from launcher.training.engines.linear import is_plain
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.model import adapters, pretrained
from launcher.training.model import loading as models
from launcher.training.precision import as_computed
from launcher.training.tracing.counting import Counting
from launcher.training.tracing.layers import Layer, Skipped, first_tensor, places
from launcher.training.tracing.recorder import Passed, Recorder

Forward = Callable[[PreTrainedModel, dict[str, Any]], Any]
_READ = ("cu_seq_lens",)
"""Keys of a batch that the model's code reads as Python numbers, so they keep their values."""


class Untraceable(Exception):
    """A model whose code cannot be traced without values; the message is the reason, in one line."""


class TracedModel:
    """A model without values, whose passes can be traced."""

    def __init__(
        self, config: Any, auto_class: Any, forward: Forward, dtype: torch.dtype, **options: Any
    ) -> None:
        """Build the model. `dtype` is the compute dtype, `options` go to `from_config`."""
        self._forward, self._dtype = forward, dtype
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with self._mode, no_init_weights():
                self.model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, **options)
        except DataDependentOutputException:
            # Its constructor reads a tensor's values, as Swin's and ConvNeXt's do for drop paths.
            with torch.device("meta"), no_init_weights():
                self.model = auto_class.from_config(config, dtype=dtype, **options)
            self._materialise()
        with self._mode:
            self.model.tie_weights()

    def _materialise(self) -> None:
        """Replace tensors on the meta device by fake tensors."""
        created: dict[int, torch.Tensor] = {}

        def of(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in created:
                with self._mode:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                parameter = isinstance(tensor, nn.Parameter)
                created[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
            return created[id(tensor)]

        for module in self.model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor.is_meta:
                        own[name] = of(tensor)

    def add_adapter(self, adapter: Adapter, new: Callable[[PreTrainedModel], tuple[str, ...]]) -> None:
        """Add an adapter; it and the parameters that `new` names train. Raises ConfigurationError for a
        pattern without a match."""
        # Outside the mode: inside, peft would move its tensors, which fake tensors do not allow.
        adapters.inject(self.model, adapter, models.repeated_layers)
        with self._mode:
            for module in self.model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.is_meta:
                        setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=self._dtype)))
            adapters.trained(self.model, adapter, new(self.model))

    def units(self, narrow: bool = False) -> tuple[Unit, list[Unit]]:
        """Return the unit outside the layers, and a unit for each layer. narrow: frozen parameters are in the
        compute dtype.

        Raises ConfigurationError for a model without repeated layers.
        """
        return _units(self.model, models.repeated_layers(self.model), narrow)

    def layers(self, every: bool = False) -> list[Layer]:
        """Return the repeated layers, and which of them are traced; with `every` all."""
        return places(self.model, models.repeated_layers(self.model), every)

    def go(
        self,
        batch: dict[str, Any],
        layers: Sequence[Layer],
        checkpointing: str,
        training: bool,
        cuda: bool,
        backward: bool = True,
    ) -> list[Passed]:
        """Trace a micro-batch, forward and (in training) backward; return its blocks in order.

        backward: if False, the trace ends at the loss. Raises Untraceable if the model's code does not run
        without values.
        """
        recorder = Recorder()
        recorder.meter.packs = not cuda and self._dtype.itemsize == 2
        for parameter in self.model.parameters():
            parameter.grad = None
        with self._mode:
            # The engine's model accounts for tensors that exist before the step.
            held = chain(self.model.buffers(), self.model.parameters())
            counting = Counting(recorder.meter, held, cuda)
            with (
                self._prepared(recorder, layers, checkpointing),
                counting,
                _decided_by_numbers(),
                _few_chunks(recorder.meter),
            ):
                recorder.begin("stem")
                self._pass(
                    recorder,
                    {
                        key: self._without_numbers(key, value, counting)
                        for key, value in as_computed(batch, self._dtype).items()
                    },
                    training,
                    backward,
                )
        return recorder.blocks

    def _without_numbers(self, key: str, value: Any, counting: Counting) -> Any:
        if not isinstance(value, torch.Tensor) or key in _READ:
            return value
        created = self._mode.from_tensor(value)
        counting.count(created.untyped_storage())
        if not value.is_floating_point():
            counting.numbers.know(created, value)
        return created

    def _pass(self, recorder: Recorder, batch: dict[str, Any], training: bool, backward: bool) -> None:
        self.model.train(training)
        with torch.set_grad_enabled(training):
            output = self._forward(self.model, batch)
            if training:
                loss = output.loss_sum * 1.0
                recorder.begin("tail", backward=True)
                if backward:
                    loss.backward()
                del loss
        del output, batch
        recorder.close()

    @contextlib.contextmanager
    def _prepared(self, recorder: Recorder, layers: Sequence[Layer], checkpointing: str) -> Iterator[None]:
        """Set up recomputation, skipped layers, and the hooks that begin blocks and record gradients,
        inside."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: recorder.note(parameter.numel(), parameter.grad.itemsize)
            )
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]
        plain = [(layer.module, layer.module.__dict__.get("forward")) for layer in layers]
        skipped = Skipped()
        for layer in layers:
            if layer.begins is not None:
                skipped = Skipped()
            if not layer.traced:
                layer.module.forward = skipped.forward()
                continue
            checkpoint_activations(layer.module, checkpointing)
            hooks.append(layer.module.register_forward_pre_hook(_before(recorder, layer), with_kwargs=True))
            stands_in = any(not one.traced and one.stands_in == layer.index for one in layers)
            hooks.append(
                layer.module.register_forward_hook(
                    _after(recorder, layer, skipped, stands_in), with_kwargs=True
                )
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, forward in plain:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward
            for parameter in self.model.parameters():
                parameter.grad = None


@contextlib.contextmanager
def _decided_by_numbers() -> Iterator[None]:
    """Make masks or leave them out as in a real step, inside. Raises Untraceable for a model whose code needs
    other values."""
    masking_utils.is_tracing, before = lambda *_: False, masking_utils.is_tracing
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Untraceable(
            f"its code goes by the numbers in tensors ({error.func}), which a trace does not have"
        ) from None
    except Exception as error:  # code of others may raise anything
        raise Untraceable(f"its code does not run without numbers: {pretrained.first_line(error)}") from error
    finally:
        masking_utils.is_tracing = before


@contextlib.contextmanager
def _few_chunks(meter: Meter) -> Iterator[None]:
    """Compute only the first three chunks of a loss and the last, which may be shorter, inside: the others
    are like the third, and count like it."""

    def few(num_positions: int, chunk: int) -> Iterator[int]:
        begins = range(0, num_positions, chunk)
        yield from begins[:2]
        if left_out := max(0, len(begins) - 4):
            written, num_made = meter.written, meter.num_made
            yield begins[2]
            meter.written += left_out * (meter.written - written)
            meter.num_made += left_out * (meter.num_made - num_made)
            yield begins[-1]
        else:
            yield from begins[2:]

    loss.chunks, before = few, loss.chunks
    try:
        yield
    finally:
        loss.chunks = before


def _before(recorder: Recorder, layer: Layer) -> Callable[..., None]:
    def begin(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if layer.begins is not None:
            kind = layer.begins
            hidden = first_tensor((arguments, options))
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda _: recorder.begin(kind, backward=True))
        recorder.begin("layer", layer.index)

    return begin


def _after(recorder: Recorder, layer: Layer, skipped: Skipped, stands_in: bool) -> Callable[..., None]:
    def end(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        hidden, given = first_tensor(output), first_tensor((arguments, options))
        if stands_in and hidden is not None and given is not None and hidden.shape != given.shape:
            # Convolutions that shorten a sound: the input after skipped ones would be too long.
            raise ValueError("a layer that stands in for others changes the shape")
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: recorder.begin("layer", layer.index, backward=True))
        if layer.ends is not None:
            recorder.begin(layer.ends)
        skipped.see(None if layer.ends is not None else output)

    return end


def _units(model: PreTrainedModel, layers: list[nn.Module], narrow: bool) -> tuple[Unit, list[Unit]]:
    of = {id(parameter): index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    results: dict[int, list[Weight]] = {index: [] for index in range(-1, len(layers))}
    whole = (nn.Embedding, nn.Conv2d, Conv1D)
    plainly = [module for module in model.modules() if is_plain(module) or isinstance(module, whole)]
    plain = {id(parameter) for module in plainly for parameter in module.parameters(recurse=False)}
    for name, parameter in adapters.named_parameters(model):
        shape, viewed = tuple(parameter.shape), parameter.dim() > 1 and id(parameter) not in plain
        share = operations.used_share(model.config.get_text_config(), shape)
        trains = parameter.requires_grad
        weight = Weight(name, shape, trains=trains, viewed=viewed, used=share, narrow=narrow and not trains)
        results[of.get(id(parameter), -1)].append(weight)
    names = [name for name, _ in adapters.named_parameters(model)]
    first = names.index(results[0][0].name)
    num_first = sum(names.index(weight.name) < first for weight in results[-1])
    return Unit(tuple(results[-1]), num_first), [Unit(tuple(results[index])) for index in range(len(layers))]
