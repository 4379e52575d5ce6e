"""Read a directory with an adapter of peft as the model of a job: its base and its settings."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.errors import Problem, one_line
from launcher.job.adapter import PROMPT, Adapter
from launcher.job.schema import Model
from launcher.plain_files import plain, read_json

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NOT_KNOWN = (
    "lora_bias", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "layer_replication",
    "exclude_modules", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "arrow_config",
    "megatron_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "use_bdlora",
    "monteclora_config",
)  # fmt: skip
"""Settings that change what an adapter computes, or which layers have one, in ways that a run here does not.
"""

_OF_PROMPTS = {
    "PROMPT_TUNING": "prompt-tuning",
    "P_TUNING": "prompt-tuning",
    "PREFIX_TUNING": "prefix-tuning",
}
"""Types whose file has what stands before samples, and the method that trains it on."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts by which the weights beside an adapter are no longer the base's, as long as peft did not convert it."""


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter and no model."""
    return (directory / SETTINGS).is_file() and not (directory / "config.json").is_file()


def read(directory: Path, model: Model, key: str) -> tuple[Model, list[Problem]]:
    """Return the model that a job means which names this directory: the adapter's base, and its settings with
    where its weights are.

    A problem for everything in the adapter, and in the job, that cannot be gone on with; they name `key`,
    where the directory is written.
    """
    try:
        settings = read_json(directory / SETTINGS)
        base = settings["base_model_name_or_path"]
        if problems := [
            Problem(key, str(directory), reason) for reason in _reasons(directory, settings, model)
        ]:
            return model, problems
        in_full = _trained_in_full(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        return model, [
            Problem(key, str(directory), f"{SETTINGS} or {WEIGHTS} cannot be read: {one_line(error)}")
        ]
    keys: dict[str, Any] = {}
    if "target_modules" in settings:
        targets = settings["target_modules"]
        keys["targets"] = targets if isinstance(targets, str) else tuple(sorted(targets))
    if settings.get("peft_type") in _OF_PROMPTS:
        method = _OF_PROMPTS[settings["peft_type"]]
        keys = {"method": method, "virtual_tokens": settings["num_virtual_tokens"]}
    elif settings.get("peft_type") == "IA3":
        keys |= {"method": "ia3", "feedforward": tuple(sorted(settings["feedforward_modules"]))}
    else:
        keys |= {
            "method": "lora",
            "rank": settings["r"],
            "alpha": float(settings["lora_alpha"]),
            "rslora": bool(settings.get("use_rslora")),
            "dora": bool(settings.get("use_dora")),
            "init": "lora",
        }
    given = model.adapter or Adapter()
    for name, value in keys.items():
        if name in given.model_fields_set and getattr(given, name) != value:
            reason = f"the adapter in {directory} has {value}; write that, or leave it out"
            problems.append(Problem(f"model.adapter.{name}", getattr(given, name), reason))
    own_dropout = "dropout" in given.model_fields_set or keys["method"] != "lora"
    dropout = {} if own_dropout else {"dropout": float(settings.get("lora_dropout") or 0.0)}
    also = {} if "train_also" in given.model_fields_set else {"train_also": in_full}
    adapter = given.model_copy(update={**keys, **dropout, **also, "weights": str(directory.resolve())})
    named = model.name if key != "model.name" else base
    revision = model.revision if key != "model.name" else settings.get("revision")
    return model.model_copy(update={"name": named, "adapter": adapter, "revision": revision}), problems


def _trained_in_full(directory: Path) -> tuple[str, ...]:
    """Return the names of the model's own parameters in an adapter's file, from its header."""
    with open(directory / WEIGHTS, "rb", opener=plain) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        names = [
            name.removeprefix("base_model.model.")
            for name in json.loads(file.read(length))
            if name != "__metadata__"
        ]
    own = (PROMPT, ".ia3_l")
    return tuple(sorted(name for name in names if ".lora_" not in name and not name.endswith(own)))


def _reasons(directory: Path, settings: dict[str, Any], model: Model) -> list[str]:
    """Return the reasons why this adapter cannot be trained further."""
    cure = (
        "; add it to its base with peft (merge_and_unload, save_pretrained), "
        "and name the model that comes out"
    )
    reasons, kind = [], settings.get("peft_type", "LORA")
    if kind in _OF_PROMPTS:
        return _reasons_of_prompt(directory, settings, model)
    if kind not in ("LORA", "IA3"):
        named = f"'LORA', 'IA3' or {', '.join(map(repr, _OF_PROMPTS))}"
        reasons.append(f"its peft_type is {kind!r}, and a run goes on with {named} alone{cure}")
    if (bias := settings.get("bias", "none")) != "none":
        reasons.append(f"its bias is {bias!r}, and a run goes on with 'none' alone{cure}")
    reasons += [f"it uses {name}, which a run does not{cure}" for name in _NOT_KNOWN if settings.get(name)]
    init = str(settings.get("init_lora_weights"))
    if init.startswith(_CHANGE_THE_BASE):
        reasons.append(
            f"it began by {init}, which takes a part of the base's weights away: save it with peft's "
            "path_initial_model_for_weight_conversion"
        )
    targets = settings.get("target_modules")
    if not (targets == "all-linear" or (isinstance(targets, list) and targets)):
        reasons.append(
            f"its target_modules are {targets!r}, and a run goes on with a list of names alone{cure}"
        )
    if not (directory / WEIGHTS).is_file():
        reasons.append(f"there is no {WEIGHTS}; save it again with peft")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if kind == "IA3":
        if not isinstance(settings.get("feedforward_modules"), list) or targets == "all-linear":
            reasons.append(f"its target_modules or feedforward_modules are no list of names{cure}")
    elif not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank <= 0 or alpha <= 0:
        reasons.append(f"its r is {rank!r} and its lora_alpha {alpha!r}, and positive numbers are needed")
    if tasks.find(model.task).traits.head != "every-position":
        reasons.append(f"an adapter's directory does not say which classes its head is for{cure}")
    return reasons


def _reasons_of_prompt(directory: Path, settings: dict[str, Any], model: Model) -> list[str]:
    """Return the reasons why a directory's virtual tokens cannot be trained further."""
    reasons, count = [], settings.get("num_virtual_tokens")
    if settings["peft_type"] == "P_TUNING" and (model.adapter or Adapter()).method != "prompt-tuning":
        reasons.append(
            "peft's file of P-tuning has the vectors that the encoder put out, and not the encoder; write "
            "model.adapter.method: prompt-tuning to train these vectors on"
        )
    if not isinstance(count, int) or count <= 0:
        reasons.append(f"its num_virtual_tokens is {count!r}, and a positive number is needed")
    if settings.get("num_transformer_submodules") not in (None, 1):
        reasons.append(
            "it has vectors of a decoder too (num_transformer_submodules), which peft does not use; save it "
            "with num_transformer_submodules=1"
        )
    if modules := settings.get("modules_to_save"):
        reasons.append(f"whole modules were trained with it, {modules[0]} first; train a new one")
    if not (directory / WEIGHTS).is_file():
        reasons.append(f"there is no {WEIGHTS}; save it again with peft")
    if tasks.find(model.task).traits.head != "every-position":
        reasons.append("an adapter's directory does not say which classes its head is for; train a new one")
    return reasons
