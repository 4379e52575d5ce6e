"""DeepSpeed's ZeRO, stages 1 to 3, with launcher's optimizer, loss, clipping and schedule.

The configuration is the rendered `ds_config.json`, so the file shown is the one that runs. The trainer takes
over clipping and the loss scale of fp16, which it does alike on every engine.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.planner.plan import Plan
from launcher.runs.places import here
from launcher.tasks.generation import GenerationOptions
from launcher.tasks.task import Output, Task
from launcher.training import generating
from launcher.training import optimizer as optimizers
from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.engines.companions import bind_loss
from launcher.training.engines.companions import load as load_companions
from launcher.training.engines.deepspeed_setup import (
    import_deepspeed,
    one_optimizer_for_all_stages,
    without_clipping_and_scale,
    without_hooks,
)
from launcher.training.engines.frozen_parts import FrozenParts
from launcher.training.engines.linear import keep_parameters_not_matrices
from launcher.training.engines.partial_gather import cut_matrices, few_rows_under_zero
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.engines.unshard import cut_rows, gathered, replaced_one_by_one
from launcher.training.engines.zero import Piece, StageOneOrTwo, StageThree
from launcher.training.model import adapters, normalization
from launcher.training.model import loading as models
from launcher.training.model.buffers import persistent_buffers
from launcher.training.model.forward import Batch, output_embeddings_of
from launcher.training.precision import DTYPES, as_computed


class DeepSpeedEngine:
    """The engine protocol over `deepspeed.initialize`."""

    def __init__(self, plan: Plan, task: Task, config: Any, ds_config: dict[str, Any]) -> None:
        """Store the rendered configuration, without clipping and loss scale."""
        self._plan, self._task, self._config = plan, task, config
        self._dtype = DTYPES[plan.precision]
        self._ds_config = without_clipping_and_scale(ds_config)
        self._frozen = FrozenParts(plan.mesh.world_size)
        self.stage = 0

    def load(self) -> None:
        """Load the model in even shards, convert it for DeepSpeed parameter by parameter, and set the fp32
        master weights to the loaded values."""
        plan, zero = self._plan, self._plan.zero
        assert zero is not None
        self._deepspeed = import_deepspeed(plan)
        loaded = models.load(plan, self._task.auto_class, self._config, self._cut)
        self.model: PreTrainedModel = loaded.model
        self.new_parameters = loaded.new_parameters
        if zero.stage == 3:
            keep_parameters_not_matrices(self.model)
        for layer in models.repeated_layers(self.model):
            checkpoint_activations(layer, plan.activation_checkpointing)
        masters = self._convert()
        self.model.train()
        self.companions = load_companions(plan, self._task)
        bind_loss(self.model, self._task, self.companions)
        self._register_external()
        optimizer = optimizers.construct(self.model, plan.training, plan.model)
        with one_optimizer_for_all_stages(self._deepspeed), normalization.kept_exact(self.model):
            self._engine, *_ = self._deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=self._ds_config, dist_init_required=False
            )
        self._zero: Any = self._engine.optimizer
        kind = StageThree if zero.stage == 3 else StageOneOrTwo
        self._stage = kind(self._zero, plan.training)
        self._set_masters(masters)

    def _cut(self, model: PreTrainedModel) -> None:
        if self._plan.mesh.world_size > 1:
            cut_rows(model, model._mesh_manager.get_mesh("fsdp"))

    def _convert(self) -> dict[str, torch.Tensor]:
        """Convert the parameters to the compute dtype for DeepSpeed. Return the loaded fp32 shards of those that
        lose precision by it."""
        assert self._plan.zero is not None
        partitioner = (
            self._deepspeed.zero.Init(config_dict_or_path=self._ds_config)
            if self._plan.zero.stage == 3
            else None
        )
        masters: dict[str, torch.Tensor] = {}
        for name, old, new in replaced_one_by_one(self.model):
            here.moved(detail=name)
            if not new.requires_grad and self._plan.model.adapter is None:
                self._frozen.keep(name, new.data)
            elif new.requires_grad and self._dtype != torch.float32:
                masters[name] = old.detach()
            new.data = new.data.to(self._dtype)
            if partitioner is not None:
                partitioner._convert_to_deepspeed_param(new)
                new.partition()  # type: ignore[attr-defined]
        return masters

    def _register_external(self) -> None:
        """Make stage 3 gather parameters that are used outside their own module: the output embeddings, which
        the loss uses, for the root module, and IA3's factors, which lie in a dictionary, for their layer."""
        if self._plan.zero is None or self._plan.zero.stage < 3:
            return
        head = output_embeddings_of(self.model)
        for parameter in head.parameters() if head is not None else ():
            self._deepspeed.zero.register_external_parameter(self.model, parameter)
        for layer in self.model.modules():
            for factors in getattr(layer, "ia3_l", {}).values():
                self._deepspeed.zero.register_external_parameter(layer, factors)

    @torch.no_grad()
    def _set_masters(self, masters: dict[str, torch.Tensor]) -> None:
        """Set the master weights, which DeepSpeed copies from the compute dtype, to the unrounded values."""
        parameters = dict(self.model.named_parameters())
        for name, shard in masters.items():
            whole = gathered(shard).reshape(-1)
            piece = self._stage.piece(parameters[name])
            if piece.count:
                piece.values("param").copy_(whole[piece.start : piece.start + piece.count])
        if isinstance(self._stage, StageThree):
            self._stage.close()

    def micro_step(self, batch: Batch, factor: float, last: bool) -> Output:
        self._engine.set_gradient_accumulation_boundary(last)
        output: Output = self._engine(as_computed(batch, self._dtype))
        here.turn("backward")
        self._engine.backward(
            output.loss_sum * (factor * self._plan.batch.data_parallel_size), scale_wrt_gas=False
        )
        return output

    def evaluate(self, batch: Batch) -> Output:
        self._engine.eval()
        with torch.no_grad():
            output: Output = self._engine(as_computed(batch, self._dtype))
        self._engine.train()
        return output

    def generate(
        self, batch: Batch, options: GenerationOptions, each_token: generating.EachToken = lambda: False
    ) -> torch.Tensor:
        self._engine.eval()
        with torch.no_grad(), self.gathered_if_it_fits() as is_whole:
            prompts = as_computed(batch, self._dtype)
            written = generating.generate(self.model, prompts, options, each_token, synced=not is_whole)
        self._engine.train()
        return written

    @contextlib.contextmanager
    def gathered_if_it_fits(self, tokens: Sequence[int] | None = None) -> Iterator[bool]:
        assert self._plan.zero is not None
        if self._plan.zero.stage < 3:
            yield True
            return
        self._zero.empty_partition_cache()  # prefetches of the last pass may still be in flight
        few = {} if tokens is None else {id(one): one for one in cut_matrices(self.model)}
        absent: list[Any] = [
            one for one in self.model.parameters() if one.ds_status.name != "AVAILABLE" and id(one) not in few
        ]
        num_bytes = sum(parameter.ds_numel * parameter.element_size() for parameter in absent)
        device = torch.device(self._plan.mesh.device)
        if not generating.fits_whole(num_bytes, device, self._plan.mesh.ranks_per_node):
            yield self._plan.mesh.world_size == 1
            return
        with (
            without_hooks(self.model),
            self._deepspeed.zero.GatheredParameters(absent),
            few_rows_under_zero(self.model, list(few.values()), tokens or (), device),
        ):
            yield True

    def squared_gradient_norm(self) -> torch.Tensor:
        self._stage.stage = self.stage
        return self._stage.squared_gradient_norm()

    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        optimizers.set_learning_rate(self._zero.optimizer, learning_rate)
        # DeepSpeed divides by the loss scale in its step: the only place that scales each gradient exactly once,
        # on any device.
        self._zero.loss_scale = 1.0 / multiplier
        self._zero.step()
        self._zero.loss_scale = 1.0
        self._zero.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        self._stage.zero_grad()

    def state_dict(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        states: dict[str, torch.Tensor] = {}
        for name, parameter in adapters.named_parameters(self.model):
            if name in self._frozen:
                tensors[f"model.{name}"] = _shard(parameter, self._frozen.piece(name, parameter), "param")
                continue
            if not parameter.requires_grad:
                continue  # with an adapter, frozen weights stay in the model's own files
            piece = self._stage.piece(parameter)
            tensors[f"model.{name}"] = _shard(parameter, piece, "param")
            for key in optimizers.moments(self._plan.training):
                dtype = optimizers.moment_dtype(self._plan.training)
                states[f"optimizer.{name}.{key}"] = _shard(parameter, piece, key, dtype)
        tensors |= {
            f"model.{adapters.plain(name)}": buffer for name, buffer in persistent_buffers(self.model)
        }
        states |= {optimizers.step_name(stage): counts[0] for stage, counts in self._stage.steps().items()}
        return tensors | states

    def after_load(self) -> None:
        optimizers.spread_step(self._stage.steps())
        self._stage.publish()
        self._publish_frozen()

    @torch.no_grad()
    def _publish_frozen(self) -> None:
        """Copy the loaded values of frozen parameters, which no optimizer holds, into the compute copies."""
        assert self._plan.zero is not None
        for name, parameter in self.model.named_parameters():
            if name not in self._frozen:
                continue
            gathered_here: Any = contextlib.nullcontext()
            if self._plan.zero.stage == 3:
                gathered_here = self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gathered_here:
                values = self._frozen.joined(name, parameter.numel())
                parameter.data.copy_(values.view(parameter.shape))


def _shard(parameter: nn.Parameter, piece: Piece, key: str, dtype: torch.dtype = torch.float32) -> FlatShard:
    return FlatShard(
        models.whole_shape(parameter), piece.start, piece.count, functools.partial(piece.values, key), dtype
    )
