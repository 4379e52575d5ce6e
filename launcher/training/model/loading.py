"""Loading of a Hugging Face model in shards.

Once the parameters are DTensors, transformers reads each rank's slices directly from the safetensors files.
launcher decides the sharding: every repeated layer is a separate unit, for any architecture, and the run
stops if that is not possible. (transformers' own plans leave BERT, GPT-2, T5 and others as one unit, which
gathers the full model on every rank.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Mesh, Plan
from launcher.tasks.traits import HEADS
from launcher.training.model import adapters, normalization, pretrained
from launcher.training.model.buffers import restore_buffers
from launcher.training.model.conversion import converted_whole, copied_in_parts, cut_like
from launcher.training.model.places import freeze, repeated_layers
from launcher.training.model.projection import projected
from launcher.training.model.reading import Changes, following
from launcher.training.model.with_heads import starts_of_bias
from launcher.training.precision import DTYPES
from launcher.training.reporting.whereabouts import tensors_counted

Shard = Callable[[PreTrainedModel], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, sharded if the mesh has more than one rank."""

    model: PreTrainedModel
    new_parameters: tuple[str, ...]
    """Names of parameters that are not in the files, for example a classification head's."""


def load(plan: Plan, auto_class: Any, config: Any, shard: Shard) -> LoadedModel:
    """Return the model of the plan, with fp32 weights, sharded by `shard` before any weight is read.

    With an adapter, frozen parameters have the compute dtype: they never change, so they need no fp32 master
    copy.
    """
    kind = projected(pretrained.model_class(auto_class, config, plan), config, plan)
    seam = _Seam(plan, shard)
    model, information = _read(plan, kind, config, seam)
    device = torch.device("cpu") if plan.offload == "parameters" else _device(plan.mesh)
    if plan.mesh.world_size == 1 or device != _device(plan.mesh):
        model.to(device)
        for buffer in model.buffers():  # with offloaded parameters, computation is still on the GPU
            buffer.data = buffer.data.to(_device(plan.mesh))
    _copy_out_of_files(model)
    restore_buffers(model, kind, config, plan)
    missing = {*information["missing_keys"], *_materialise(model, device)}
    new = tuple(name for name, _ in model.named_parameters() if name in missing)
    _widen(model, new)
    initialise(model, new, plan.training.seed)
    for head, bias in _starts_of_bias(plan, kind, config):
        _begin(model, set(new) & head, bias)
    for name in seam.constants:  # reading a file creates new parameters, which train
        model.get_parameter(name).requires_grad_(False)
    freeze(model, plan.model)
    if plan.model.freeze_normalization:
        normalization.freeze(model, plan.model.name)
    # With an adapter nothing else of the model changes, and the adapter's files contain only its matrices.
    normalization.share_statistics(
        model, frozen=plan.model.freeze_normalization or plan.model.adapter is not None
    )
    _add_adapter(model, seam.injected, plan, new, device)
    if plan.mesh.world_size == 1:
        shard(model)
    return LoadedModel(model, new)


def _read(
    plan: Plan, kind: type[PreTrainedModel], config: Any, seam: _Seam
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model from from_pretrained, and its report on keys. Raises ConfigurationError for files that
    cannot be read, or are for another model."""
    random, changes = plan.model.weights == "random", Changes.of(plan, kind, config)
    source: dict[str, Any] = {"state_dict": {}} if random else {}
    with seam.in_place(), converted_whole(), copied_in_parts(), changes.in_place(), tensors_counted():
        try:
            model, information = kind.from_pretrained(
                None if random else plan.model.name,
                config=config,
                dtype=torch.float32,
                distributed_config=DistributedConfig(
                    fsdp_size=plan.mesh.dp_shard, dp_replicate_size=plan.mesh.dp_replicate
                ),
                output_loading_info=True,
                revision=plan.model.revision or "main",
                **source,
            )
        except Exception as error:
            if (reason := pretrained.why_not_read(error)) is None:
                raise
            raise ConfigurationError(Problem("model.name", plan.model.name, reason)) from None
    if mismatched := information.get("mismatched_keys"):
        reason = f"weights of another shape: {sorted(map(str, mismatched))[:3]}"
        raise ConfigurationError(Problem("model.name", plan.model.name, reason))
    return model, information


def _starts_of_bias(
    plan: Plan, kind: type[PreTrainedModel], config: Any
) -> Iterator[tuple[frozenset[str], torch.Tensor]]:
    """Yield the parameters whose size is a head's number of outputs, and the initial bias, if the config has
    one."""
    if hasattr(config, HEADS):
        yield from starts_of_bias(config, following)
    elif (
        tasks.find(plan.task).traits.head == "one-per-sample"
        and getattr(config, "head_bias", None) is not None
    ):
        yield following(kind, config, "num_labels"), torch.tensor(config.head_bias)


def _add_adapter(
    model: PreTrainedModel,
    injected: adapters.Inserted | None,
    plan: Plan,
    new: tuple[str, ...],
    device: torch.device,
) -> None:
    """Add the plan's adapter, with its initial values; it is already inserted if the model was sharded before
    reading."""
    if plan.model.adapter is None:
        return
    if injected is None:
        adapters.inject(model, plan.model.adapter, repeated_layers)
    else:
        injected.put_back()
    _materialise(model, device)
    with torch.no_grad():
        tokenizer = functools.partial(pretrained.read_tokenizer, plan)
        for name, whole in adapters.beginning(model, plan.model.adapter, plan.training.seed, tokenizer):
            parameter = model.get_parameter(name)
            local_part(parameter).copy_(cut_like(parameter, whole))
    adapters.trained(model, plan.model.adapter, new)


@torch.no_grad()
def _copy_out_of_files(model: PreTrainedModel) -> None:
    """Copy each parameter and buffer on the CPU, one by one, and so release the files.

    Without a conversion, a parameter is a slice of the mapped file (which the tensor does not show). The full
    file would count as this rank's memory, and a write to the file would change the weights.
    """
    for parameter in model.parameters():
        part = local_part(parameter)
        if part.device.type != "cpu":
            continue
        if isinstance(parameter, DTensor):
            parameter._local_tensor = part.clone()
        else:
            parameter.data = part.clone()
    for buffer in model.buffers():  # BART's logits bias kept the full file mapped
        if buffer.device.type == "cpu":
            buffer.data = buffer.data.clone()


def _materialise(model: PreTrainedModel, device: torch.device) -> list[str]:
    """Allocate parameters that transformers left on the meta device (a tied pair that is not in the files).
    Return their names."""
    left = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_meta]
    for name, parameter in left:
        _replace(model, name, parameter, torch.empty_like(local_part(parameter), device=device))
    if left:
        model.tie_weights()
    return [name for name, _ in left]


def _widen(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Convert new parameters to fp32, because they train, whatever the dtype of the rest."""
    narrow = [(name, model.get_parameter(name)) for name in names]
    for name, parameter in narrow:
        if parameter.dtype != torch.float32:
            _replace(model, name, parameter, torch.empty_like(local_part(parameter), dtype=torch.float32))


def _replace(model: PreTrainedModel, name: str, parameter: nn.Parameter, part: torch.Tensor) -> None:
    """Replace a parameter by another of the same shape; `part` is this rank's shard."""
    path, _, key = name.rpartition(".")
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        part = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    setattr(model.get_submodule(path), key, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _device(mesh: Mesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device == "cuda" else torch.device("cpu")


class _Seam:
    """The hook into from_pretrained between building the empty model and reading its weights."""

    def __init__(self, plan: Plan, shard: Shard) -> None:
        self._plan, self._shard = plan, shard
        self.injected: adapters.Inserted | None = None
        self.constants: tuple[str, ...] = ()
        """Parameters that the model's class itself freezes, such as Whisper's positions."""

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Make from_pretrained shard the model with `shard` instead of its own plan, inside."""
        original = PreTrainedModel.__dict__.get("maybe_distribute_model")

        def distribute(
            cls: type, model: PreTrainedModel, distributed_config: Any, mesh_manager: Any
        ) -> PreTrainedModel:
            named = model.named_parameters()
            self.constants = tuple(name for name, parameter in named if not parameter.requires_grad)
            self._prepare(model, mesh_manager)
            return model

        PreTrainedModel.maybe_distribute_model = classmethod(distribute)
        try:
            yield
        finally:
            if original is None:
                del PreTrainedModel.maybe_distribute_model
            else:
                PreTrainedModel.maybe_distribute_model = original

    def _prepare(self, model: PreTrainedModel, mesh_manager: Any) -> None:
        """Shard adapters together with their layers; remove them from the module tree while files are
        read."""
        adapter = self._plan.model.adapter
        if adapter is not None:
            model.tie_weights()  # tied weights are one parameter, with one name, on any number of ranks
            adapters.narrow(model, adapter, DTYPES[self._plan.precision])
        if mesh_manager is None:
            return
        model._is_distributed_loading_by_transformers = True
        model._mesh_manager = mesh_manager
        model._device_mesh = mesh_manager.get_mesh(("pp", "fsdp", "tp"))
        if adapter is not None:
            self.injected = adapters.inject(model, adapter, repeated_layers)
        self._shard(model)
        if self.injected is not None:
            self.injected.take_out()


def initialise(model: PreTrainedModel, names: tuple[str, ...], seed: int) -> None:
    """Give new parameters values that depend only on the seed and their name, not on the number of ranks.

    Each is made in full, by the model's own rule for its module, and then sharded; one module at a time.
    """
    wanted = set(names)
    for path, module in model.named_modules():
        own = {
            key: parameter
            for key, parameter in module.named_parameters(recurse=False)
            if f"{path}.{key}".lstrip(".") in wanted
        }
        if not own:
            continue
        digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            for key, parameter in own.items():
                module._parameters[key] = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
            model._init_weights(module)
            for key, parameter in own.items():
                whole = module._parameters[key]
                module._parameters[key] = parameter
                assert whole is not None
                local_part(parameter).copy_(cut_like(parameter, whole.data))


@torch.no_grad()
def _begin(model: PreTrainedModel, head: set[str], bias: torch.Tensor) -> None:
    """Set the bias of a new head to these values, fp32 [outputs]."""
    for parameter in map(model.get_parameter, head):
        if whole_shape(parameter) == bias.shape:
            local_part(parameter).copy_(cut_like(parameter, bias))


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the unsharded shape of a parameter: ZeRO-3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor; a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data


def cut_as(parameter: torch.Tensor, own: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a rank's part as a tensor of global shape `shape`, sharded like the parameter on dimension 0."""
    if not isinstance(parameter, DTensor):
        return own
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
