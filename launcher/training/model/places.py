"""The place of each parameter in a model: before, in or after its repeated layers, or in its head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Model
from launcher.job.tuning import Place, stages
from launcher.training.model import adapters


def places(model: PreTrainedModel) -> list[Place]:
    """Return the place of every parameter, in the model's order, by the names that checkpoints use.

    Embeddings come before the layers wherever a class defines them. Modules between two stacks of layers,
    such as an encoder's last norm, belong to the layer before them.

    Raises ConfigurationError for a model without repeated layers.
    """
    layers = repeated_layers(model)
    of = {id(parameter): index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    } - of.keys()
    base = {id(parameter) for parameter in model.base_model.parameters()}
    results, below = [], -1
    for name, parameter in adapters.named_parameters(model):
        below = of.get(id(parameter), below)
        outside = -1 if id(parameter) in embedded else len(layers) if below == len(layers) - 1 else below
        layer = of.get(id(parameter), outside)
        results.append(Place(name, layer, len(layers), id(parameter) in base))
    return results


def stages_of(model: nn.Module, own: Model) -> dict[str, int]:
    """Return the stage of `model.unfreeze` from which each parameter trains, by name; 0 is the start.

    Raises ConfigurationError, with every problem, if `model.freeze` or `model.unfreeze` does not suit this
    model.
    """
    return stages(own.freeze, own.unfreeze, places(model))


def freeze(model: PreTrainedModel, own: Model) -> None:
    """Freeze the parameters that never train. Raises ConfigurationError as `stages_of` does."""
    if not own.freeze:
        return
    trains = stages_of(model, own)
    for name, parameter in adapters.named_parameters(model):
        if name not in trains:
            parameter.requires_grad_(False)


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that repeat, in the order of the model: the units of sharding and of activation
    checkpointing.

    They are the elements of the outermost ModuleLists whose class is in the model's `_no_split_modules`, else
    of all outermost ModuleLists of two or more. Raises ConfigurationError if there are none.
    """
    outermost = lists_of_layers(model)
    named = [layer for module in outermost for layer in module if is_unsplit(model, layer)]
    layers = named or [layer for module in outermost if len(module) >= 2 for layer in module]
    if not layers:
        reason = f"{type(model).__name__} has no repeated layers that could be sharded one by one"
        raise ConfigurationError(Problem("model.name", model.name_or_path, reason))
    return layers


def is_unsplit(model: PreTrainedModel, layer: nn.Module) -> bool:
    """Return whether the layer's class is in the model's `_no_split_modules`. FSDP replaces it by a
    subclass."""
    # BLIP's class names only its image layers.
    unsplit = {*(model._no_split_modules or ()), "BlipTextLayer"}
    return any(kind.__name__ in unsplit for kind in type(layer).__mro__)


def lists_of_layers(model: nn.Module) -> list[nn.ModuleList]:
    """Return the outermost non-empty ModuleLists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) >= 1]
    inner = {id(child) for outer in lists for child in outer.modules() if child is not outer}
    return [module for module in lists if id(module) not in inner]
