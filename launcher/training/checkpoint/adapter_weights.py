"""The tensors of an adapter's export: merged into the base's weights, or alone in peft's format."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import PROMPT, Adapter
from launcher.planner.plan import Plan
from launcher.training.checkpoint.weights import Entry, Stored, entry_of, slices
from launcher.training.model import adapter_starts, adapters, prefixes, pretrained, prompts
from launcher.training.model.buffers import persistent_buffers
from launcher.training.model.reading import Changes
from launcher.training.precision import DTYPES

_NOISES = ("modeling_utils", "distributed.tensor_parallel")
"""Loggers of transformers whose warnings are false alarms here."""
_PEFT_PREFIX = "base_model.model."


class Merged:
    """The base with each adapter merged into its weight, in fp32, one tensor at a time. LoRA adds the scaled
    B A; DoRA also sets the rows to the learned norms; IA3 multiplies rows or columns, and biases.

    The base is read from its own files in the run's precision, by memory map if the files have that dtype. The
    export dtype `keep` means this precision too.
    """

    def __init__(self, plan: Plan, adapter: Adapter, stored: Stored, model_files: Path) -> None:
        self.adapter, self.stored = adapter, stored
        self.kept = DTYPES[plan.precision]
        model = _base(plan, model_files, self.kept)
        self.turned = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
        }
        self.base: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(persistent_buffers(model))
        self.trained = set(stored.names)

    def entries(self) -> list[Entry]:
        dtypes = {
            name: self.kept if tensor.is_floating_point() else tensor.dtype
            for name, tensor in self.base.items()
        }
        return [
            entry_of(name, tuple(tensor.shape), dtypes[name], self.stored.dtype)
            for name, tensor in self.base.items()
        ]

    @torch.no_grad()
    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        module, _, key = name.rpartition(".")
        if f"{module}.ia3_l" in self.trained:
            return slices(self._multiplied(name, module, key))
        if key != "weight" or f"{module}.lora_A.weight" not in self.trained:
            return self.stored.pieces(name) if name in self.trained else slices(self.base[name].detach())
        own = self.stored.read(name) if name in self.trained else self._beside(name, module)
        product = self.stored.read(f"{module}.lora_B.weight") @ self.stored.read(f"{module}.lora_A.weight")
        added = product.t() if name in self.turned else product
        whole = own.float().add(added, alpha=self.adapter.scale)
        if (magnitude := f"{module}.lora_magnitude_vector") in self.trained:
            side = 0 if name in self.turned else 1
            lengths = torch.linalg.vector_norm(whole, dim=side, keepdim=True)
            whole *= self.stored.read(magnitude).unsqueeze(side) / lengths
        return slices(whole)

    def _multiplied(self, name: str, module: str, key: str) -> torch.Tensor:
        """Return a layer's weight or bias multiplied by IA3's factors, fp32."""
        own = self.stored.read(name) if name in self.trained else self.base[name].detach()
        factors = self.stored.read(f"{module}.ia3_l")  # [outputs, 1], or [1, inputs] for input factors
        if key == "bias":
            return own.float() * (1 if self.adapter.scales_input(module) else factors.view(-1))
        return own.float() * (factors.t() if name in self.turned else factors)

    def _beside(self, name: str, module: str) -> torch.Tensor:
        """Return a frozen weight as it was in training, in the same precision: for some inits, a residual."""
        own = self.base[name].detach()
        if self.adapter.init == "lora":
            return own
        whole = own.t() if name in self.turned else own
        rest = adapter_starts.rest(whole, *adapter_starts.matrices(whole, self.adapter, module), self.adapter)
        return (rest.t() if name in self.turned else rest).to(own.dtype)


def _base(plan: Plan, model_files: Path, dtype: torch.dtype) -> Any:
    """Return the run's initial model, on the CPU."""
    where = plan.model.model_copy(update={"name": str(model_files), "revision": None})
    config = pretrained.read_config(plan.model_copy(update={"model": where, "attention": "eager"}))
    kind = pretrained.model_class(tasks.unprepared(plan).auto_class, config, plan)
    # False alarms: a head that the base's files lack is in the checkpoint, and nothing is sharded here.
    noises = [logging.getLogger(f"transformers.{name}") for name in _NOISES]
    levels = [noise.level for noise in noises]
    for noise in noises:
        noise.setLevel(logging.ERROR)
    try:
        with Changes.of(plan, kind, config).in_place():
            return kind.from_pretrained(
                plan.model.name, config=config, dtype=dtype, revision=plan.model.revision or "main"
            )
    except Exception as error:
        if (why := pretrained.why_not_read(error)) is None:
            raise
        reason = f"the weights beside which it was trained cannot be read: {why}"
        raise ConfigurationError(Problem("model.name", plan.model.name, reason)) from None
    finally:
        for noise, level in zip(noises, levels, strict=True):
            noise.setLevel(level)


class Alone:
    """The adapters and the modules trained in full, under peft's names.

    Both modules of a tied pair are written: given one, peft would replace it by a trained copy and leave the
    other unchanged.
    """

    def __init__(self, plan: Plan, adapter: Adapter, stored: Stored, model_files: Path) -> None:
        self.plan, self.adapter, self.stored = plan, adapter, stored
        self._base = Merged(plan, adapter, stored, model_files) if adapter.init != "lora" else None
        self._start: tuple[str, dict[str, torch.Tensor]] = "", {}
        self._hollow = _hollow(plan, model_files)
        self._names = _whole_parameters(self._hollow, stored)
        own = {name: name for name in stored.names if adapters.is_own(name)}
        joins = adapter.has_encoder or adapter.is_prefix
        self._joined = list(own) if joins else []
        """Parameters in whose place peft's file has one tensor."""
        held = self._names if joins else own | self._names
        self._sources = {self._name_in_file(name): (name, at) for name, at in held.items()}
        """The name in the model, and in the checkpoint, of each name in the file."""
        self.modules = sorted({name.rpartition(".")[0] for name in self._names})

    def entries(self) -> list[Entry]:
        described = {entry.name: entry for entry in self.stored.entries()}
        entries = [
            Entry(name, self._shape(own, described[source].shape), described[source].dtype)
            for name, (own, source) in self._sources.items()
        ]
        if self._joined:
            dtype = described[self._joined[0]].dtype
            entries.insert(0, Entry(PROMPT, tuple(self._of_virtual_tokens().shape), dtype))
        return entries

    def _of_virtual_tokens(self) -> torch.Tensor:
        """Return what peft keeps of virtual tokens, fp32 [virtual tokens, n]: what the encoder puts out, or the
        keys and values of all layers."""
        values = {name: self.stored.read(name) for name in self._joined}
        joined = prefixes.joined if self.adapter.is_prefix else prompts.put_out
        return joined(self.adapter, self._hollow, values)

    def _name_in_file(self, name: str) -> str:
        """Return peft's name: virtual tokens have one of their own, and no wrapper is around their model."""
        if not self.adapter.is_prompt:
            return _PEFT_PREFIX + name
        return PROMPT if name.endswith(f".{PROMPT}") else _PEFT_PREFIX.removesuffix("model.") + name

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self._base is None or not adapters.is_own(name):
            return shape
        return (2 * shape[0], shape[1]) if name.endswith(".lora_A.weight") else (shape[0], 2 * shape[1])

    @torch.no_grad()
    def _with_start(self, name: str) -> torch.Tensor:
        """Return A stacked on the initial A, or B next to the negated initial B. They were trained with a
        residual of the weight; concatenated, their product is the change of the full weight."""
        assert self._base is not None
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        if self._start[0] != module:
            weight = self._base.base[f"{module}.weight"].detach()
            whole = weight.t() if f"{module}.weight" in self._base.turned else weight
            first, second = adapter_starts.matrices(whole, self.adapter, module)
            self._start = module, {"lora_A": first, "lora_B": -second}
        own = self.stored.read(name)
        return torch.cat([own, self._start[1][matrix].to(own.dtype)], dim=0 if matrix == "lora_A" else 1)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        if self._joined and name == PROMPT:
            return slices(self._of_virtual_tokens())
        own, source = self._sources[name]
        if self._base is not None and adapters.is_own(own):
            return slices(self._with_start(own))
        return self.stored.pieces(source)

    def write_settings(self, directory: Path) -> None:
        """Write adapter_config.json through peft."""
        model = self.plan.model
        more = {
            "task_type": tasks.find(self.plan.task).traits.peft_type,
            "base_model_name_or_path": model.name,
            "revision": model.revision,
            "modules_to_save": self.modules or None,
            "inference_mode": True,
        }
        if self.adapter.is_prompt:
            kind = prefixes if self.adapter.is_prefix else prompts
            kind.settings(self.adapter, self._hollow, **more).save_pretrained(directory)
            return
        one = ".ia3_l" if self.adapter.method == "ia3" else ".lora_A.weight"
        names = [name.removesuffix(one) for name in self.stored.names if name.endswith(one)]
        settings = adapters.settings(
            self.adapter if self._base is None else self.adapter.as_plain(), names, **more
        )
        settings.save_pretrained(directory)


def _hollow(plan: Plan, model_files: Path) -> Any:
    """Return the run's model without values or adapter. Raises ConfigurationError if the base's embedding has
    another number of rows."""
    where = plan.model.model_copy(update={"name": str(model_files), "revision": None})
    config = pretrained.read_config(plan.model_copy(update={"model": where, "attention": "eager"}))
    _refuse_new_rows(plan, config)
    kind = pretrained.model_class(tasks.unprepared(plan).auto_class, config, plan)
    with torch.device("meta"):
        model = kind._from_config(config)
    model.tie_weights()
    return model


def _whole_parameters(model: Any, stored: Stored) -> dict[str, str]:
    """Return the parameters trained in full, without adapter: the checkpoint's name by each name in the model.

    Raises ConfigurationError if only a part of a module was trained in full, as peft stores complete modules.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    kept = {id(named[name]): name for name in stored.names if name in named}
    parameters = {name: kept[id(parameter)] for name, parameter in named.items() if id(parameter) in kept}
    for module in sorted({name.rpartition(".")[0] for name in parameters}):
        rest = [name for name in named if name.startswith(f"{module}.") and name not in parameters]
        rest = sorted(rest) or sorted(
            name for name in stored.names if name.startswith(f"{module}.") and adapters.is_own(name)
        )
        if rest:
            reason = (
                f"peft keeps whole modules, and of this one {rest[0]} was trained otherwise; leave "
                "--adapter out for the whole model"
            )
            raise ConfigurationError(Problem("--adapter", module, reason))
    return parameters


def _refuse_new_rows(plan: Plan, config: Any) -> None:
    """Raise ConfigurationError if the embedding of the run's model has another number of rows than the base to
    which peft would add the adapter."""
    if not plan.model.resize_embeddings:
        return
    base = pretrained.read_config(
        plan.model_copy(update={"model": plan.model.model_copy(update={"resize_embeddings": None})})
    )
    before, after = base.get_text_config().vocab_size, config.get_text_config().vocab_size
    if before != after:
        reason = (
            f"the run has {after:,} rows for tokens and its base {before:,}: the adapter does not fit the "
            "base; leave --adapter out"
        )
        raise ConfigurationError(Problem("--adapter", plan.model.name, reason))
