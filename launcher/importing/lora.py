"""LoRA settings under the names of TRL, LLaMA-Factory, axolotl and common scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from launcher.importing.defaults import AdapterDefaults
from launcher.importing.reading import Reading, as_number, brief

QUANTISED = ("load_in_4bit", "load_in_8bit", "quantization_bit")


@dataclass(frozen=True)
class Names:
    """The spelling of an adapter's keys."""

    rank: str
    targets: str
    also: str
    stabilised: str
    alpha: str = "lora_alpha"
    dropout: str = "lora_dropout"
    ratio: str = ""
    """The key of the ratio between the learning rates of B and A."""
    variants: tuple[str, ...] = ()
    """The keys of other kinds of adapters: true, or anything but None, selects one that launcher lacks."""
    details: tuple[str, ...] = ()
    """The keys that affect an adapter only together with one of `variants`."""

    def all(self) -> set[str]:
        """Return every key by its name."""
        own = {self.rank, self.alpha, self.dropout, self.targets, self.also, self.stabilised, self.ratio} - {
            ""
        }
        return own | set(self.variants) | set(self.details)


def read(content: dict[str, Any], names: Names, defaults: AdapterDefaults, reading: Reading) -> None:
    """Record the adapter of these keys, with the tool's defaults for those left out."""
    rank, alpha = reading.count(content, names.rank), reading.number(content, names.alpha)
    if rank is None and defaults.rank is not None:
        rank = defaults.rank
        reading.default("model.adapter.rank", rank, names.rank)
    elif rank is not None:
        reading.record("model.adapter.rank", rank, names.rank)
    stabilised = bool(reading.flag(content, names.stabilised))
    scaled_alpha = alpha
    if alpha is None:
        scaled_alpha = 2.0 * rank if defaults.is_twice and rank is not None else defaults.alpha
    if scaled_alpha is not None and stabilised and rank:
        text = (
            "what is added counts alpha / sqrt(rank) times there; "
            f"alpha = {scaled_alpha:g} x sqrt({rank}) is the same here"
        )
        reading.change(names.stabilised, True, text)
        scaled_alpha *= math.sqrt(rank)
    if scaled_alpha is not None:
        (reading.default if alpha is None else reading.record)(
            "model.adapter.alpha", scaled_alpha, names.alpha
        )
    for option, value in ((names.rank, rank), (names.alpha, scaled_alpha)):
        if value is None:
            text = "is missing; launcher's own stands under model.adapter"
            reading.fill_in(option, "(nothing)", text)
    dropout = reading.number(content, names.dropout)
    (reading.default if dropout is None else reading.record)(
        "model.adapter.dropout", defaults.dropout if dropout is None else dropout, names.dropout
    )
    _targets(content.get(names.targets), names, defaults, reading)
    if also := words_of(content.get(names.also)):
        reading.record("model.adapter.train_also", [f"*{name}.*" for name in also], names.also)
    _faster_b(content, names, reading)
    for key in names.variants:
        value = content.get(key)
        if value not in (None, False, "", [], {}, "false", "False", 0):
            text = "another kind of adapter than LoRA's B A x alpha / rank; taken: LoRA without it"
            if key.endswith("use_dora"):
                text = "taken: LoRA without it; model.adapter.dora: true is peft's DoRA"
            reading.cannot_say(key, brief(value), text)


def _faster_b(content: dict[str, Any], names: Names, reading: Reading) -> None:
    """Record LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B has a multiple of A's learning rate."""
    ratio = reading.number(content, names.ratio) if names.ratio else None
    if ratio is None or ratio == 1:
        return None
    if (rate := as_number(content.get("learning_rate"))) is None:
        text = "times the learning rate is that of B: write training.groups"
        return reading.fill_in(names.ratio, ratio, text)
    group = {"parameters": ["*.lora_B.weight"], "learning_rate": ratio * rate}
    return reading.record("training.groups", [group], names.ratio)


def _targets(value: Any, names: Names, defaults: AdapterDefaults, reading: Reading) -> None:
    names_of_layers = words_of(value)
    if not names_of_layers and defaults.targets is not None:
        return reading.default("model.adapter.targets", "all-linear", names.targets)
    if not names_of_layers:
        reading.default("model.adapter.targets", ["q_proj", "v_proj"], names.targets)
        text = (
            "left out: peft then goes by the model's family; these are those of Llama, Mistral, Qwen and "
            "Gemma, others have others"
        )
        return reading.remark("fill in", names.targets, "(nothing)", text)
    if any(name in ("all", "all-linear") for name in names_of_layers):
        return reading.record("model.adapter.targets", "all-linear", names.targets)
    if isinstance(value, str) and any(sign in value for sign in "\\^$*+()[]|?"):
        text = (
            "a regular expression; launcher has patterns of names, as q_proj or layers.3.*: taken: all-linear"
        )
        reading.cannot_say(names.targets, value, text)
        return reading.record("model.adapter.targets", "all-linear", names.targets)
    return reading.record("model.adapter.targets", names_of_layers, names.targets)


def unused(content: dict[str, Any], names: Names, why: str, reading: Reading) -> None:
    """Remark that the tool reads none of an adapter's keys."""
    if unused_keys := sorted(key for key in names.all() if content.get(key) not in (None, False, "", [], {})):
        reading.ignore(", ".join(unused_keys), None, why)


def quantised(content: dict[str, Any], keys: tuple[str, ...], reading: Reading) -> None:
    """Remark on each key that quantises the model, which launcher does not do."""
    for key in keys:
        if content.get(key) not in (None, False, "false", "False", 0):
            text = (
                "launcher quantises no model; taken: the same training over the model in the plan's precision"
            )
            reading.cannot_say(key, brief(content[key]), text)


def words_of(value: Any) -> list[str]:
    """Return the words of a list, or of a text with commas or spaces between them."""
    entries = value if isinstance(value, (list, tuple)) else [] if value in (None, False) else [value]
    return [word for entry in entries for word in str(entry).replace(",", " ").split()]
