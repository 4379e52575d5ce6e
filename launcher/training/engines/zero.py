"""Access to a rank's part of ZeRO's state, and to its step, for each stage.

DeepSpeed has no public way to save its state except to its own files, nor to take a step whose clipping is
decided elsewhere. The internals used here were tested with 0.19.8, at stages 1, 2 and 3, with and without
offloading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from launcher.job.schema import Training
from launcher.training import norms
from launcher.training import optimizer as optimizers

Values = Callable[[], torch.Tensor]


class Piece:
    """This rank's part of one parameter: elements [start, start + count), and its flat fp32 values by key
    (`param`, `exp_avg`, ...)."""

    def __init__(self, start: int, count: int, values: Callable[[str], torch.Tensor]) -> None:
        self.start, self.count, self.values = start, count, values


class Stage(Protocol):
    """The engine's view of a ZeRO optimizer."""

    stage: int
    """The stage of `model.unfreeze`, set by the engine."""

    def piece(self, parameter: nn.Parameter) -> Piece: ...
    def steps(self) -> dict[int, list[torch.Tensor]]: ...
    def squared_gradient_norm(self) -> torch.Tensor: ...
    def zero_grad(self) -> None: ...
    def publish(self) -> None: ...


def _norms(zero: Any, stages: list[int], groups: list[list[nn.Parameter]], stage: int) -> torch.Tensor:
    """Return the squared norm of the gradients of groups that train at this stage, from the norms that DeepSpeed
    recorded when it offloaded them."""
    waiting = {
        zero.get_param_id(parameter)
        for own, group in zip(stages, groups, strict=True)
        if own > stage
        for parameter in group
    }
    values = [
        torch.as_tensor(value, dtype=torch.float64).cpu()
        for key, value in zero.norm_for_param_grads.items()
        if key not in waiting
    ]
    return torch.stack(values).square().sum() if values else torch.zeros((), dtype=torch.float64)


def _leave_waiting_groups(zero: Any, stages: list[int], keeper: Stage) -> None:
    """Make DeepSpeed's step skip groups that train only from a later stage on."""
    step = zero._optimizer_step

    def step_if_it_trains(group: int) -> None:
        if stages[group] <= keeper.stage:
            step(group)

    zero._optimizer_step = step_if_it_trains


def _steps(zero: Any, stages: list[int], partitions: list[Any]) -> dict[int, list[torch.Tensor]]:
    """Return the step counts of all groups by the stage from which they train."""
    counts: dict[int, list[torch.Tensor]] = {}
    for stage, partition in zip(stages, partitions, strict=True):
        if "step" in (state := zero.optimizer.state[partition]):
            counts.setdefault(stage, []).append(state["step"])
    return counts


class StageOneOrTwo:
    """State of stages 1 and 2: a flat fp32 partition of each group on each rank. A parameter may lie in one
    partition or across several."""

    def __init__(self, zero: Any, training: Training) -> None:
        self._zero, self.stage = zero, 0
        self._stages = [group["stage"] for group in zero.optimizer.param_groups]
        _leave_waiting_groups(zero, self._stages, self)
        for partition in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[partition] = optimizers.first_state(
                training.optimizer, partition.detach(), training
            )
        zero._lazy_init_hp_params_optimizer_state()
        zero.clip_grad = 0.0
        zero.scaled_global_norm = lambda norm_type=2: torch.zeros(())

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return this rank's part of the parameter, which may be empty."""
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Piece(0, 0, lambda key: torch.empty(0))

        def values(key: str) -> torch.Tensor:
            fragment: torch.Tensor = (
                mapping.get_hp_fragment() if key == "param" else mapping.get_optim_state_fragment(key)
            )
            return fragment.detach()

        return Piece(mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel, values)

    def steps(self) -> dict[int, list[torch.Tensor]]:
        return _steps(self._zero, self._stages, self._zero.single_partition_of_fp32_groups)

    def squared_gradient_norm(self) -> torch.Tensor:
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()
            return _norms(self._zero, self._stages, self._zero.bit16_groups, self.stage)
        return norms.sum_of_squares(
            [
                gradient
                for index, group in self._zero.averaged_gradients.items()
                if group is not None and self._stages[index] <= self.stage
                for gradient in group
            ]
        )

    def zero_grad(self) -> None:
        zero = self._zero
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        else:
            for key in zero.averaged_gradients:
                zero.averaged_gradients[key] = zero.all_grad_tensors[key] = None

    def publish(self) -> None:
        self._zero.update_lp_params()
        for index in range(len(self._zero.bit16_groups)):
            self._zero._update_model_bit16_weights(index)


class StageThree:
    """State of stage 3: every parameter in equal flat parts, the last one padded. The parts of many parameters
    form sub-groups, which are swapped in one by one if they are on NVMe."""

    def __init__(self, zero: Any, training: Training) -> None:
        self._zero, self.stage = zero, 0
        self._stages = [
            zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]["stage"]
            for index in range(len(zero.fp16_groups))
        ]
        _leave_waiting_groups(zero, self._stages, self)
        self._open: int | None = None
        for index, partition in enumerate(zero.fp32_partitioned_groups_flat):
            if zero._swappable_optimizer_subgroup(index):
                zero._optimizer_states_and_gradient_swap_in(index)
            self._let_go_of_a_copy(partition, zero.fp16_partitioned_groups_flat[index])
            zero.optimizer.state[partition] = optimizers.first_state(
                training.optimizer, partition.detach(), training
            )
            if zero._swappable_optimizer_subgroup(index):
                zero._optimizer_states_and_gradient_swap_out(index)
        zero.clip_grad = 0.0
        # DeepSpeed's own sum of squares is in fp32, off by one part in 80,000 for a million elements.
        zero._constant_buffered_norm2 = lambda gradient, buffer_size=0: norms.sum_of_squares(
            [gradient]
        ).sqrt()
        zero._get_norm_groups = lambda: [torch.zeros(())]

    def _let_go_of_a_copy(self, master: torch.Tensor, computing: torch.Tensor | None) -> None:
        """Make fp32 master weights share memory with the parameters. DeepSpeed intends this too, but on the CPU
        it does not notice that both are there."""
        if (
            computing is not None
            and not self._zero.offload_optimizer
            and (master.dtype, master.device) == (computing.dtype, computing.device)
        ):
            master.data = computing.data

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Return this rank's part of the parameter. The last ranks' may be shorter or empty."""
        zero: Any = self._zero
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        part: Any = parameter
        start = min(part.ds_zero_partition_rank * length, part.ds_numel)
        count = min(length, part.ds_numel - start)

        def values(key: str) -> torch.Tensor:
            self._swap_in(group)
            partition = zero.fp32_partitioned_groups_flat[group]
            whole: torch.Tensor = partition if key == "param" else zero.optimizer.state[partition][key]
            return whole.detach().narrow(0, offset, count)

        return Piece(start, count, values)

    def _swap_in(self, group: int) -> None:
        """Swap a sub-group into memory. Only one is there at a time: the previous one is swapped out, including
        values that a load has written into it."""
        if self._open == group or not self._zero._swappable_optimizer_subgroup(group):
            return
        self.close()
        self._zero._optimizer_states_and_gradient_swap_in(group)
        self._open = group

    def close(self) -> None:
        """Swap out the sub-group that reading or writing the state has swapped in."""
        if self._open is not None:
            self._zero._optimizer_states_and_gradient_swap_out(self._open)
            self._open = None

    def steps(self) -> dict[int, list[torch.Tensor]]:
        return _steps(self._zero, self._stages, self._zero.fp32_partitioned_groups_flat)

    def squared_gradient_norm(self) -> torch.Tensor:
        if self._zero.offload_optimizer:
            return _norms(self._zero, self._stages, self._zero.fp16_groups, self.stage)
        return norms.sum_of_squares(
            [
                gradient
                for index, group in self._zero.averaged_gradients.items()
                if self._stages[index] <= self.stage
                for gradient in group
            ]
        )

    def zero_grad(self) -> None:
        self._zero._pre_step()
        self._zero._partition_all_parameters()
        self._zero._overflow_clean_up(1.0)

    def publish(self) -> None:
        zero = self._zero
        self.close()
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            self._swap_in(index)
            zero._reassign_or_swap_out_partitioned_parameters(index)
        self.close()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()
