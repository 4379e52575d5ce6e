"""Choose the block program for a config.json."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from launcher.errors import ConfigurationError
from launcher.job.adapter import Adapter
from launcher.planner.memory.decoders import Gpt2, Llama
from launcher.planner.memory.encoders import Bert
from launcher.planner.memory.experts import Mixture
from launcher.planner.memory.program import Segment, Setting, Unit, Weight, matches
from launcher.planner.memory.t5 import T5
from launcher.planner.memory.translators import Bart
from launcher.planner.memory.vision import Vit
from launcher.tasks.task import Traits


class Program(Protocol):
    """A model at the level of sizes."""

    def units(self) -> tuple[Unit, list[Unit]]: ...
    def blocks(self, setting: Setting) -> list[Segment]: ...
    def __hash__(self) -> int: ...


DECODERS = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
WITH_ADAPTERS = (*DECODERS, "gpt2")
"""Beside which the formulas know adapters."""
ENCODERS = ("bert", "roberta")
TRANSLATORS = ("t5", "mt5", "umt5")
KNOWN = (*DECODERS, "gpt2", *MIXTURES, *ENCODERS, "vit", "bart", *TRANSLATORS)


def program_of(config: dict[str, Any], num_labels: int = 2, traits: Traits | None = None) -> Program | None:
    """Return the program of a model by its `model_type`; None where there is none for it, or not for tasks
    with these traits."""
    kind = config.get("model_type")
    generates = traits is None or (traits.causal and traits.head == "every-position")
    if kind in DECODERS and generates:
        return Llama(config)
    if kind in MIXTURES and generates:
        return Mixture(config)
    if kind == "gpt2" and generates:
        return Gpt2(config)
    if kind in ENCODERS and (traits is None or traits.head == "one-per-sample"):
        return Bert(config, num_labels)
    if traits is not None:
        return None  # of what follows, the formulas are those of translating, and of images
    if kind == "vit":
        return Vit(config, num_labels)
    if kind in TRANSLATORS:
        return T5(config)
    return Bart(config) if kind == "bart" else None


def nearest(kind: str, traits: Traits | None = None) -> str:
    """Return the known architecture whose name is most like this one; with traits, of those that the formulas
    have for such tasks."""
    known = (
        KNOWN
        if traits is None
        else ENCODERS
        if traits.head == "one-per-sample"
        else (*DECODERS, "gpt2", *MIXTURES)
    )
    return next(iter(difflib.get_close_matches(kind, known, 1, 0.0)), known[0])


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
