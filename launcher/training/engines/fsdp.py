"""FSDP2: parameters, gradients and optimizer state as fp32 shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.planner.limits import DEFERRED_GRADIENT_BYTES
from launcher.planner.plan import Plan
from launcher.runs.places import here
from launcher.tasks.generation import GenerationOptions
from launcher.tasks.task import Output, Task
from launcher.training import generating, norms
from launcher.training import optimizer as optimizers
from launcher.training.engines.companions import bind_loss
from launcher.training.engines.companions import load as load_companions
from launcher.training.engines.partial_gather import few_rows_under_fsdp, gather
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.engines.units import shard_units
from launcher.training.model import adapters
from launcher.training.model import loading as models
from launcher.training.model.buffers import persistent_buffers
from launcher.training.model.forward import Batch
from launcher.training.precision import DTYPES, as_computed


class FsdpEngine:
    """The engine protocol over `fully_shard`; plain PyTorch on a single fp32 device."""

    def __init__(self, plan: Plan, task: Task, config: Any, trains: bool = True) -> None:
        """Store the arguments. Without `trains` there is no optimizer (evaluation only)."""
        self._plan, self._task, self._config, self._trains = plan, task, config, trains
        self._dtype = DTYPES[plan.precision]

    def load(self) -> None:
        loaded = models.load(self._plan, self._task.auto_class, self._config, self._shard)
        self.model: PreTrainedModel = loaded.model
        self.new_parameters = loaded.new_parameters
        self.model.train()
        self.companions = load_companions(self._plan, self._task)
        bind_loss(self.model, self._task, self.companions)
        self.stage = 0
        plan = self._plan
        self._optimizer = optimizers.build(self.model, plan.training, plan.model) if self._trains else None
        gradient_bytes = 4 * sum(
            parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad
        )
        self._defers = gradient_bytes <= DEFERRED_GRADIENT_BYTES
        if isinstance(self.model, FSDPModule):
            # Otherwise FSDP initialises in the first forward pass, with that pass's units only. Units that a
            # shortened model or an encoder alone skips would each become a root with streams of its own.
            self.model._get_fsdp_state()._lazy_init()

    def _shard(self, model: PreTrainedModel) -> None:
        """Shard the model: each repeated layer is a unit, the rest is the root unit."""
        # transformers ties weights only after loading. Sharded before that, a tied pair would become two shards,
        # one of which goes stale.
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
        shard_units(model, layers, self._plan)

    def micro_step(self, batch: Batch, factor: float, last: bool) -> Output:
        if isinstance(self.model, FSDPModule):
            if self._defers:
                self.model.set_requires_gradient_sync(last)
            elif self._plan.mesh.dp_replicate > 1:
                # Each replica accumulates gradients; replicas all-reduce once a step, over the slower network.
                self.model.set_requires_all_reduce(last)
            # Parameters that are gathered at the end of the forward pass stay so for the next micro-batch: they
            # are gathered once a step.
            self.model.set_reshard_after_backward(last, recurse=not self._plan.mesh.reshard_after_forward)
        output: Output = self.model(as_computed(batch, self._dtype))
        here.turn("backward")
        # FSDP averages gradients over ranks, but the step's loss is a sum.
        (output.loss_sum * (factor * self._plan.batch.data_parallel_size)).backward()
        if last and not self._defers and self._plan.mesh.dp_replicate > 1:
            self._refuse_left_over_sums()
        return output

    def _refuse_left_over_sums(self) -> None:
        """Raise ConfigurationError if a unit had gradients in some micro-batches of a step but not in the last:
        FSDP would add them to the next step's."""
        for name, module in self.model.named_modules():
            groups = module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ()
            if any(group._partial_reduce_output is not None for group in groups):
                reason = f"{name} has no gradient in some passes, which copies then do not add up; write 1"
                raise ConfigurationError(Problem("parallel.replicate", self._plan.mesh.dp_replicate, reason))

    def evaluate(self, batch: Batch) -> Output:
        self.model.eval()
        with torch.no_grad():
            output: Output = self.model(as_computed(batch, self._dtype))
        self.model.train()
        return output

    def generate(
        self, batch: Batch, options: GenerationOptions, each_token: generating.EachToken = lambda: False
    ) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad(), self.gathered_if_it_fits() as is_whole:
            prompts = as_computed(batch, self._dtype)
            written = generating.generate(self.model, prompts, options, each_token, synced=not is_whole)
        self.model.train()
        return written

    @contextlib.contextmanager
    def gathered_if_it_fits(self, tokens: Sequence[int] | None = None) -> Iterator[bool]:
        units = [module for module in nn.Module.modules(self.model) if isinstance(module, FSDPModule)]
        if not units:
            yield True
            return
        with few_rows_under_fsdp(self.model, tokens, self._dtype):
            num_bytes = self._dtype.itemsize * sum(
                parameter.numel() for parameter in self.model.parameters() if isinstance(parameter, DTensor)
            )
            device = torch.device(self._plan.mesh.device)
            if not generating.fits_whole(num_bytes, device, self._plan.mesh.ranks_per_node):
                self.model.unshard()  # an encoder is called outside the root's forward
                yield self._plan.mesh.world_size == 1
                return
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
            gather(units, lends_weights=tokens is not None)
            try:
                yield True
            finally:
                # The root stays gathered, as after every forward pass: the next pass needs it.
                for layer in units[1:]:
                    layer.set_reshard_after_forward(self._plan.mesh.reshard_after_forward, recurse=False)
                    layer.reshard()

    def squared_gradient_norm(self) -> torch.Tensor:
        if self._optimizer is not None:
            optimizers.drop_gradients(self._optimizer, self.stage)
        # Replicas hold equal gradients, so each contributes its share.
        return norms.sum_of_squares(self._gradients()) / self._plan.mesh.dp_replicate

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
        # After a forward pass without backward (evaluation), the root's parameters are still gathered, in memory
        # that FSDP frees later.
        self._reshard()
        named = adapters.named_parameters(self.model)
        # With an adapter, frozen weights stay in the model's own files.
        keeps_all = self._plan.model.adapter is None
        parameters = {
            f"model.{name}": parameter.detach()
            for name, parameter in named
            if keeps_all or parameter.requires_grad
        }
        buffers = {f"model.{adapters.plain(name)}": buffer for name, buffer in persistent_buffers(self.model)}
        states = optimizers.state_tensors(self.model, self._optimizer) if self._optimizer else {}
        return parameters | buffers | states

    def after_load(self) -> None:
        if self._optimizer:
            optimizers.spread_step(optimizers.steps(self._optimizer))
        self._reshard()

    def _reshard(self) -> None:
        """Reshard all units. After an evaluation the root unit is still gathered, and its parameters are not the
        trained shards."""
        for module in nn.Module.modules(self.model):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gradients(self) -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
