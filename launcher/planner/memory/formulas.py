"""The one family that is written down as formulas: decoders, planned in half a second without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import Adapter
from launcher.planner.memory.decoders import LLAMAS, Gpt2, Llama
from launcher.planner.memory.program import Segment, Setting, SymbolicProgram, Unit, Weight, matches
from launcher.planner.plan import Plan

KNOWN = (*LLAMAS, "gpt2")
_NORMALIZATIONS = ("*norm*", "*ln_*")
"""The names of the layers that normalise, in these models."""


@dataclass(frozen=True, eq=False)
class Formulas:
    """A decoder written down at the level of sizes, with what of it trains."""

    program: SymbolicProgram
    freeze: tuple[str, ...] = ()
    adapter: Adapter | None = None

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return what is outside of the layers, and each layer.

        Raises ConfigurationError for a pattern of an adapter that matches nothing.
        """
        return self._units

    @functools.cached_property
    def _units(self) -> tuple[Unit, list[Unit]]:
        units = self.program.units()
        return frozen(units, self.freeze) if self.adapter is None else adapted(units, self.adapter)

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, all layers of the model among them."""
        return self.program.blocks(setting)


def formulas_of(plan: Plan, config: dict[str, Any]) -> Formulas | None:
    """Return the formulas of a plan's model; None where they do not know it, its task or its way of computing.

    Raises ConfigurationError for a config without a size that they need.
    """
    traits, kind = tasks.find(plan.task).traits, config.get("model_type")
    generates = traits.causal and traits.head == "every-position" and not traits.encoder_decoder
    packed = (
        plan.layout == "packed"
        and plan.attention in ("packed", "flash_attention_2")
        and plan.head == "chunked"
    )
    if kind not in KNOWN or not (generates and packed):
        return None
    try:
        patterns = (*plan.model.freeze, *(_NORMALIZATIONS if plan.model.freeze_normalization else ()))
        return _formulas(json.dumps(config, default=str), patterns, plan.model.adapter)
    except KeyError as error:
        key, value, where = "model.name", plan.model.name, "its config.json"
        if plan.model.config is not None:
            key, value, where = "model.config", str(kind), "it"
        reason = f"{where} has no {error.args[0]}, which a {kind} model needs"
        raise ConfigurationError(Problem(key, value, reason)) from None


@functools.lru_cache(maxsize=8)
def _formulas(config: str, freeze: tuple[str, ...], adapter: Adapter | None) -> Formulas:
    return Formulas(program_of(json.loads(config)), freeze, adapter)


def program_of(config: dict[str, Any]) -> SymbolicProgram:
    """Return the program of a model of one of `KNOWN`.

    Raises KeyError for a config without a size that it needs.
    """
    return Gpt2(config) if config["model_type"] == "gpt2" else Llama(config)


def adapted(units: tuple[Unit, list[Unit]], adapter: Adapter) -> tuple[Unit, list[Unit]]:
    """The units with an adapter's two matrices after each linear layer of a repeated layer that has one, and
    the rest not trained.

    Raises ConfigurationError for a pattern that matches none of them.
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
    """Of a repeated layer's weights."""
    return len(weight.shape) == 2 and weight.name.endswith(".weight")


def _beside(unit: Unit, adapter: Adapter, linear: Sequence[str]) -> Unit:
    names, found = set(linear), list[Weight]()
    for index, weight in enumerate(unit.weights):
        learned = adapter.trains(weight.name)
        found.append(replace(weight, trains=learned, narrow=not learned))
        module = weight.name.rpartition(".")[0]
        last = index + 1 == len(unit.weights) or unit.weights[index + 1].name.rpartition(".")[0] != module
        if last and module in names and adapter.takes(module):
            matrix = next(one for one in unit.weights if one.name == f"{module}.weight")
            num_out, num_in = reversed(matrix.shape) if matrix.input_first else matrix.shape
            found += [
                Weight(f"{module}.lora_A.weight", (adapter.rank, num_in)),
                Weight(f"{module}.lora_B.weight", (num_out, adapter.rank)),
            ]
    return replace(unit, weights=tuple(found))


def frozen(units: tuple[Unit, list[Unit]], patterns: tuple[str, ...]) -> tuple[Unit, list[Unit]]:
    """The units with the parameters that match a pattern not trained."""

    def changed(unit: Unit) -> Unit:
        return replace(
            unit,
            weights=tuple(
                replace(weight, trains=not matches(weight.name, patterns)) for weight in unit.weights
            ),
        )

    root, layers = units
    return (changed(root), [changed(layer) for layer in layers]) if patterns else units
