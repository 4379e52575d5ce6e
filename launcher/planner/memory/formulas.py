"""Formulas for the memory of one family, decoders: planned in half a second, without torch."""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import Adapter
from launcher.job.schema import Model
from launcher.job.tuning import Place, stages, unmatched
from launcher.planner.limits import in_bytes
from launcher.planner.memory.decoders import LLAMAS, Llama
from launcher.planner.memory.gpt2 import Gpt2
from launcher.planner.memory.program import Segment, Setting, Unit, Weight
from launcher.planner.memory.symbolic_program import SymbolicProgram
from launcher.planner.plan import Plan

KNOWN = (*LLAMAS, "gpt2")
_NORMALIZATIONS = ("*norm*", "*ln_*")
"""Patterns of the normalisation layers' names in these models."""


@dataclass(frozen=True, eq=False)
class Formulas:
    """A decoder described by its tensors' sizes, and its trained parameters."""

    program: SymbolicProgram
    model: Model

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the parameters outside of the layers as one unit, and a unit for each layer.

        Raises ConfigurationError for a pattern that matches nothing.
        """
        return self._units

    @functools.cached_property
    def _units(self) -> tuple[Unit, list[Unit]]:
        units = self.program.units()
        adapter = self.model.adapter
        return frozen(units, self.model) if adapter is None else adapted(units, adapter)

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, with every layer of the model."""
        return self.program.blocks(setting)


def formulas_of(plan: Plan, config: dict[str, Any]) -> Formulas | None:
    """Return the formulas of a plan's model; None if they do not cover its architecture, task or settings.

    Raises ConfigurationError for a config without a size that they need.
    """
    traits, kind = tasks.find(plan.task).traits, config.get("model_type")
    generates = traits.causal and traits.head == "every-position" and not traits.encoder_decoder
    packed = (
        plan.layout == "packed"
        and plan.attention in ("packed", "flash_attention_2")
        and plan.head == "chunked"
    )
    # DoRA computes a weight's whole update in every forward pass, for the norms of its rows; IA3 saves the
    # activations that it multiplies; virtual tokens are looked up beside the words.
    adapter = plan.model.adapter
    otherwise = adapter is not None and (adapter.dora or adapter.method != "lora")
    if kind not in KNOWN or not (generates and packed) or otherwise:
        return None
    try:
        names = {"freeze", "unfreeze", "freeze_normalization", "adapter"}
        keys = plan.model.model_dump_json(include=names, by_alias=True)
        return _formulas(json.dumps(config, default=str), keys)
    except KeyError as error:
        key, value, where = "model.name", plan.model.name, "its config.json"
        if plan.model.config is not None:
            key, value, where = "model.config", str(kind), "it"
        reason = f"{where} has no {error.args[0]}, which a {kind} model needs"
        raise ConfigurationError(Problem(key, value, reason)) from None


@functools.lru_cache(maxsize=8)
def _formulas(config: str, keys: str) -> Formulas:
    return Formulas(program_of(json.loads(config)), Model.model_validate({"name": "any"} | json.loads(keys)))


def program_of(config: dict[str, Any]) -> SymbolicProgram:
    """Return the program of a model of one of `KNOWN`.

    Raises KeyError for a config without a size that it needs.
    """
    return Gpt2(config) if config["model_type"] == "gpt2" else Llama(config)


def adapted(units: tuple[Unit, list[Unit]], adapter: Adapter) -> tuple[Unit, list[Unit]]:
    """Return the units with an adapter's two matrices after each linear layer that it targets in the repeated
    layers, and all else frozen.

    Raises ConfigurationError for a pattern that matches no linear layer.
    """
    root, layers = units
    linear = [
        weight.name.removesuffix(".weight") for unit in layers for weight in unit.weights if is_linear(weight)
    ]
    if problems := adapter.unmatched(
        linear, [weight.name for unit in (root, *layers) for weight in unit.weights]
    ):
        raise ConfigurationError(problems)
    return _beside(root, adapter, ()), [_beside(layer, adapter, linear) for layer in layers]


def is_linear(weight: Weight) -> bool:
    """Return whether a weight of a repeated layer is a linear layer's matrix."""
    return len(weight.shape) == 2 and weight.name.endswith(".weight")


def _beside(unit: Unit, adapter: Adapter, linear: Sequence[str]) -> Unit:
    names, weights = set(linear), list[Weight]()
    for index, weight in enumerate(unit.weights):
        learned = adapter.trains(weight.name)
        weights.append(replace(weight, trains=learned, narrow=not learned))
        module = weight.name.rpartition(".")[0]
        last = index + 1 == len(unit.weights) or unit.weights[index + 1].name.rpartition(".")[0] != module
        if last and module in names and adapter.takes(module):
            matrix = next(one for one in unit.weights if one.name == f"{module}.weight")
            num_out, num_in = reversed(matrix.shape) if matrix.input_first else matrix.shape
            weights += [
                Weight(f"{module}.lora_A.weight", (adapter.rank, num_in)),
                Weight(f"{module}.lora_B.weight", (num_out, adapter.rank)),
            ]
    return replace(unit, weights=tuple(weights))


def frozen(units: tuple[Unit, list[Unit]], model: Model) -> tuple[Unit, list[Unit]]:
    """Return the units, with those parameters marked as not trained that stay frozen throughout the run.

    Raises ConfigurationError if `model.freeze` or `model.unfreeze` does not fit this model.
    """
    if not model.freeze and not model.freeze_normalization:
        return units
    still = _NORMALIZATIONS if model.freeze_normalization else ()
    trained = {
        name
        for name in stages(model.freeze, model.unfreeze, places(units))
        if not any(fnmatch.fnmatch(name, pattern) for pattern in still)
    }

    def changed(weight: Weight) -> Weight:
        return replace(weight, trains=weight.name in trained)

    root, layers = units
    return _each(root, changed), [_each(layer, changed) for layer in layers]


def _each(unit: Unit, changed: Callable[[Weight], Weight]) -> Unit:
    return replace(unit, weights=tuple(map(changed, unit.weights)))


def places(units: tuple[Unit, list[Unit]]) -> list[Place]:
    """Return each parameter's place among the layers; the matrix that computes logits belongs to the head."""
    root, layers = units
    placed = [*((weight, -1) for weight in root.weights[: root.num_first])]
    placed += [(weight, index) for index, unit in enumerate(layers) for weight in unit.weights]
    placed += [(weight, len(layers)) for weight in root.weights[root.num_first :]]
    return [
        Place(weight.name, layer, len(layers), not weight.name.startswith("lm_head."))
        for weight, layer in placed
    ]


def grouped(units: tuple[Unit, list[Unit]], plan: Plan) -> tuple[Unit, list[Unit]]:
    """Return the units with each weight's optimizer group, if there are more than two groups.

    Raises ConfigurationError for a pattern of `training.groups` that matches no trained parameter.
    """
    training, model = plan.training, plan.model
    plain = training.layer_decay == 1 and not training.groups and not model.unfreeze
    if plain and not training.needs_whole_rows:
        return units
    where = {place.name: place for place in places(units)}
    opened = stages(model.freeze, model.unfreeze, [*where.values()]) if model.unfreeze else {}
    trained = [weight.name for unit in (units[0], *units[1]) for weight in unit.weights if weight.trains]
    if problems := unmatched(training.groups, trained):
        raise ConfigurationError(problems)

    def changed(weight: Weight) -> Weight:
        key = training.group_of(where[weight.name], len(weight.shape), opened.get(weight.name, 0))
        return replace(
            weight,
            group=key,
            by_muon=key.kind == "muon",
            factored=key.kind == "adafactor",
            in_bytes=training.moments == "8bit" and in_bytes(weight.shape),
        )

    root, layers = units
    return _each(root, changed), [_each(layer, changed) for layer in layers]
