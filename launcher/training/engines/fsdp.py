"""FSDP2: parameters, gradients and optimizer state as fp32 shards."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.runs.places import here
from launcher.tasks.task import Output, Task
from launcher.training import optimizer as optimizers
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.heads import Batch
from launcher.training.model import adapters
from launcher.training.model import loading as models
from launcher.training.precision import DTYPES

_DEFERRED_GRADIENT_BYTES = 4 << 30
"""Up to this size gradients are added up unsharded over the micro-batches of a step and sent once; above it,
memory is worth more."""


class FsdpEngine:
    """The engine protocol over `fully_shard`; a single fp32 device is left as plain PyTorch."""

    def __init__(self, plan: Plan, task: Task, config: Any, trains: bool = True) -> None:
        """Load and cut the model; without `trains` there is no optimizer, for evaluation alone."""
        self._plan = plan
        loaded = models.load(plan, task.auto_class, config, self._shard)
        self.model: PreTrainedModel = loaded.model
        self.new_parameters = loaded.new_parameters
        self.model.train()
        self.model.forward = functools.partial(task.loss, self.model)
        self._optimizer = optimizers.build(self.model, plan.training) if trains else None
        gradient_bytes = 4 * sum(
            parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad
        )
        self._defers = gradient_bytes <= _DEFERRED_GRADIENT_BYTES

    def _shard(self, model: PreTrainedModel) -> None:
        """Cut the model: each repeated layer is a unit, the rest is the root unit."""
        # transformers ties weights after loading only. Cut apart before, a tied pair would be two shards of
        # which one goes stale.
        model.tie_weights()
        layers = models.repeated_layers(model)
        for layer in layers:
            checkpoint_activations(layer, self._plan.activation_checkpointing)
            if self._plan.model.compile:
                layer.compile()
        if (
            self._plan.mesh.world_size == 1
            and self._plan.precision == "fp32"
            and self._plan.offload == "none"
        ):
            return
        mesh = _mesh(model, self._plan)
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[self._plan.precision], reduce_dtype=torch.float32)
        where: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        if self._plan.offload == "parameters":
            where["offload_policy"] = CPUOffloadPolicy(pin_memory=self._plan.mesh.device == "cuda")
        if (
            self._plan.model.adapter is not None
            and self._plan.mesh.world_size == 1
            and self._plan.offload != "parameters"
        ):
            # They are in the computation's precision already, and there is nobody to share them with:
            # gathering would only copy them.
            where["ignored_params"] = {
                parameter for parameter in model.parameters() if not parameter.requires_grad
            }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=self._plan.mesh.reshard_after_forward, **where)
        fully_shard(model, reshard_after_forward=False, **where)
        _assert_units(model, layers)

    def micro_step(self, batch: Batch, factor: float, last: bool) -> Output:
        if isinstance(self.model, FSDPModule):
            if self._defers:
                self.model.set_requires_gradient_sync(last)
            # What is whole at the height of every pass stays so until the next one: it is gathered once a
            # step.
            self.model.set_reshard_after_backward(last, recurse=not self._plan.mesh.reshard_after_forward)
        output: Output = self.model(batch)
        here.turn("backward")
        (output.loss_sum * (factor * self._plan.batch.data_parallel_size)).backward()
        return output

    def evaluate(self, batch: Batch) -> Output:
        self.model.eval()
        with torch.no_grad():
            output: Output = self.model(batch)
        self.model.train()
        return output

    def squared_gradient_norm(self) -> torch.Tensor:
        # Replicas hold equal gradients, so each counts for its share.
        return optimizers.sum_of_squares(self._gradients()) / self._plan.mesh.replicate

    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        if multiplier != 1.0:
            torch._foreach_mul_(self._gradients(), multiplier)
        assert self._optimizer is not None
        optimizers.set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        # After a forward pass alone (an evaluation) the root's parameters are still whole, in memory that
        # FSDP frees later.
        self._reshard()
        named = adapters.named_parameters(self.model)
        # Beside an adapter what does not train is the model's own files' to keep.
        keeps_all = self._plan.model.adapter is None
        parameters = {
            f"model.{name}": parameter.detach()
            for name, parameter in named
            if keeps_all or parameter.requires_grad
        }
        buffers = {
            f"model.{adapters.plain(name)}": buffer for name, buffer in models.persistent_buffers(self.model)
        }
        states = optimizers.state_tensors(self.model, self._optimizer) if self._optimizer else {}
        return parameters | buffers | states

    def after_load(self) -> None:
        if self._optimizer:
            optimizers.spread_step(self._optimizer)
        self._reshard()

    def _reshard(self) -> None:
        """Leave only shards. After an evaluation the root unit is still gathered, and its parameters are not
        the ones that train."""
        for module in nn.Module.modules(self.model):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gradients(self) -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def _mesh(model: PreTrainedModel, plan: Plan) -> DeviceMesh:
    """The mesh that loading uses, replicate x shard; one rank has none yet."""
    manager = getattr(model, "_mesh_manager", None)
    if manager is None:
        return init_device_mesh(plan.mesh.device, (1,), mesh_dim_names=("fsdp",))
    mesh: DeviceMesh = (
        manager.get_mesh(("dp_replicate", "fsdp")) if plan.mesh.replicate > 1 else manager.get_mesh("fsdp")
    )
    return mesh


def _assert_units(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Refuse to start where the repeated layers did not become units of their own."""
    loose = [type(layer).__name__ for layer in layers if not isinstance(layer, FSDPModule)]
    if loose:
        reason = f"{len(loose)} of {len(layers)} layers ({loose[0]}) could not be made units of their own"
        raise ConfigurationError(Problem("model.name", model.name_or_path, reason))
