"""Which program goes with which config.json."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any, Protocol

from launcher.planning.footprint.decoders import Gpt2, Llama
from launcher.planning.footprint.encoders import Bert
from launcher.planning.footprint.experts import Mixture
from launcher.planning.footprint.program import Segment, Setting, Unit, matches
from launcher.planning.footprint.t5 import T5
from launcher.planning.footprint.translators import Bart
from launcher.planning.footprint.vision import Vit


class Program(Protocol):
    """A model at the level of sizes."""

    def units(self) -> tuple[Unit, list[Unit]]: ...
    def blocks(self, setting: Setting) -> list[Segment]: ...


DECODERS = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
ENCODERS = ("bert", "roberta")
TRANSLATORS = ("t5", "mt5", "umt5")
KNOWN = (*DECODERS, "gpt2", *MIXTURES, *ENCODERS, "vit", "bart", *TRANSLATORS)


def program_of(config: dict[str, Any], num_labels: int = 2, task: str | None = None) -> Program | None:
    """The program of a model by its `model_type`; None where there is none for it, or not for this task."""
    kind = config.get("model_type")
    if kind in DECODERS and task in (None, "causal-lm"):
        return Llama(config)
    if kind in MIXTURES and task in (None, "causal-lm"):
        return Mixture(config)
    if kind == "gpt2" and task in (None, "causal-lm"):
        return Gpt2(config)
    if kind in ENCODERS and task in (None, "sequence-classification"):
        return Bert(config, num_labels)
    if kind == "vit":
        return Vit(config, num_labels)
    if kind in TRANSLATORS and task is None:
        return T5(config)
    return Bart(config) if kind == "bart" else None


def nearest(kind: str) -> str:
    """The known architecture whose name is most like this one."""
    return next(iter(difflib.get_close_matches(kind, KNOWN, 1, 0.0)), KNOWN[0])


def frozen(units: tuple[Unit, list[Unit]], patterns: tuple[str, ...]) -> tuple[Unit, list[Unit]]:
    """The units with the parameters that match a pattern not trained."""

    def changed(unit: Unit) -> Unit:
        return replace(unit, weights=tuple(replace(weight, trains=not matches(weight.name, patterns)) for weight in unit.weights))

    root, layers = units
    return (changed(root), [changed(layer) for layer in layers]) if patterns else units
