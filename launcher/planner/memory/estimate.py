"""Estimate the memory of a rank by phase and by kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from launcher import tasks
from launcher.planner.limits import DEFERRED_GRADIENT_BYTES, SHARED_MESSAGE_BYTES
from launcher.planner.memory.footprint import PHASES, Footprint, Phase
from launcher.planner.memory.formulas import grouped
from launcher.planner.memory.fsdp import FsdpCut, FsdpStep
from launcher.planner.memory.program import Batch, Program, Segment, Setting
from launcher.planner.memory.teacher import Taught, Teacher
from launcher.planner.memory.timeline import CONTEXT, OPTIMIZER, PARAMETERS, SLACK, TEACHER, Timeline
from launcher.planner.memory.writing import write
from launcher.planner.memory.written_states import TaughtAhead, WrittenTeacher
from launcher.planner.memory.zero import ZeroStep
from launcher.planner.memory.zero_states import ZeroCut
from launcher.planner.plan import Plan, Zero

STATE_COPIES = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 2, "adafactor": 1}
"""fp32 numbers of optimizer state per trained element. A matrix updated by Muon has one fewer; one updated by
Adafactor has a number for each row and each column instead. Moments in 8 bits are counted by `Weight.spared`."""
STAGED = "staged checkpoint"
CUDA_CONTEXT = 1 << 30
"""Assumed, not measured here: the CUDA context, its libraries and NCCL's own buffers."""
CUDA_SLACK = 0.05
"""Assumed, not measured here: memory that PyTorch's caching allocator keeps beyond the live tensors, as a
share of the bytes that are allocated and freed in a step."""


def batch_of(plan: Plan) -> Batch:
    """Return one micro-batch of a rank in which every sample has the plan's maximum length."""
    return Batch((plan.data.max_length,) * plan.batch.micro_batch_size, padded=plan.layout != "packed")


class Estimator:
    """A plan, the program of its model, and one micro-batch."""

    def __init__(self, plan: Plan, program: Program, batch: Batch | None = None) -> None:
        """Take a plan and its model's program. Without `batch`, every sample has the maximum length."""
        self.plan, self.program = plan, program
        self.adapter = plan.model.adapter
        self.units = grouped(program.units(), plan)
        self._all = (self.units[0], *self.units[1])
        self.itemsize = 4 if plan.precision == "fp32" else 2
        self.cuda = plan.mesh.device == "cuda"
        self.slack = CUDA_SLACK if self.cuda else 0.0
        self.setting = Setting(
            batch or batch_of(plan),
            self.itemsize,
            plan.activation_checkpointing,
            self.cuda,
            frozen=frozenset(
                one.name
                for unit in self._all
                for one in unit.weights
                if not one.trains and self.adapter is None
            ),
            adapter=self.adapter,
        )
        self.copies = (
            STATE_COPIES[plan.training.optimizer]
            if plan.training.optimizer != "sgd" or plan.training.momentum
            else 0
        )
        if plan.training.moments == "bf16":
            self.copies //= 2
        near = plan.training.l2_sp
        self.copies += (plan.training.ema is not None) + (near is not None)
        self.copies += near is not None and near.fisher is not None
        cut = self._fsdp_cut()  # FSDP shards a teacher under either engine
        self._cut = cut if plan.zero is None else self._zero_cut(plan.zero)
        self.teacher: Teacher | WrittenTeacher | None = None
        if isinstance(program, Taught):
            self.teacher = Teacher(plan, program, self.setting, cut)
        elif isinstance(program, TaughtAhead):
            self.teacher = WrittenTeacher(plan, program, self.setting, cut)

    def footprint(self) -> Footprint:
        """Return the memory of all phases: a range test neither saves nor resumes."""
        engine, accumulates = self._engine(), self.plan.batch.accumulation_steps > 1
        first, later = engine.gradient_modes()
        steady = engine.step(self.segments(**first), self.segments(**later) if accumulates else [])
        states, host = engine.states(), engine.host()
        evaluating = self._engine().evaluate(self.segments(training=False, checkpointing="none"))
        write(evaluating, self.plan, self.program, self.setting, self.units)
        resident, staged = sum(states.values()), self.checkpoint_bytes // self.plan.mesh.world_size
        for_a_while = self._loaded() + self._of_weights()
        loaded = states | {PARAMETERS: states.get(PARAMETERS, 0) + for_a_while}
        loading = Timeline(dict(loaded), sum(loaded.values()), "every parameter and its state", dict(loaded))
        saving = Timeline(dict(states), resident, "a copy, written while training goes on", dict(states))
        if not self.cuda and self.plan.checkpoint.asynchronous:
            where, parts = f"a copy of the state; {steady.where}", steady.at_peak | {STAGED: staged}
            saving = Timeline({}, steady.peak + staged, where, parts)
        copied = staged if self.cuda and self.plan.checkpoint.asynchronous else 0
        times = (loading, steady, steady, evaluating, saving, loading)
        return Footprint(
            tuple(
                self._phase(name, time, host + copied * (name == "saving"))
                for name, time in zip(PHASES, times, strict=True)
                if not self.plan.training.is_range_test or name not in ("saving", "resuming")
            )
        )

    def least(self) -> int:
        """Return the device's bytes that even the smallest micro-batch needs: the state, and the parameters
        that stay gathered after the forward pass."""
        mesh, states = self.plan.mesh, self._engine().states()
        whole = self.plan.zero is None and mesh.dp_shard > 1 and not mesh.reshard_after_forward
        gathered = self.itemsize * sum(unit.num_elements() for unit in self._all) if whole else 0
        return sum(states.values()) + gathered + self._teacher_bytes()[0] + (CUDA_CONTEXT if self.cuda else 0)

    def _loaded(self) -> int:
        """Return the bytes that are on the device only while the model is loaded: shards whose fp32 masters
        are then made in host memory."""
        zero = self.plan.zero
        if zero is None or not self.cuda or self.plan.offload != "optimizer":
            return 0
        weights = (weight for unit in self._all for weight in unit.weights)
        num_bytes = sum(weight.num_elements * (self.itemsize if weight.narrow else 4) for weight in weights)
        return -(-num_bytes // self.plan.mesh.world_size)

    def _of_weights(self) -> int:
        """Return the bytes for initialising an adapter from its base weights, one weight after another. The
        largest counts, unsharded: in fp64 with four squares of its shorter side, or three times in fp32."""
        if self.adapter is None or self.adapter.init == "lora":
            return 0
        weights = {weight.name: weight for unit in self._all for weight in unit.weights}
        beside = [
            weights.get(name.replace(".lora_A.weight", ".weight")) for name in weights if ".lora_A." in name
        ]
        return max(
            (
                one.num_elements * (self.itemsize if one.narrow else 4)
                + max(8 * one.num_elements + 32 * min(one.shape) ** 2, 12 * one.num_elements)
                for one in beside
                if one is not None
            ),
            default=0,
        )

    def _phase(self, name: str, time: Timeline, host: int) -> Phase:
        parts = {kind: size for kind, size in time.at_peak.items() if size > 0}
        moving = time.peak - sum(
            size for kind, size in parts.items() if kind in (PARAMETERS, OPTIMIZER, STAGED)
        )
        if slack := int(self.slack * moving):
            parts[SLACK] = slack
        if self.cuda:
            parts[CONTEXT] = CUDA_CONTEXT
        beside, of_host = self._teacher_bytes()
        if beside:
            parts[TEACHER] = beside
        return Phase(name, time.peak + beside, time.where, parts, host + of_host)

    def _teacher_bytes(self) -> tuple[int, int]:
        """Return the bytes of a teacher's shards on the device, and in host memory."""
        if self.teacher is None:
            return 0, 0
        waits = self.cuda and self.plan.offload == "parameters"
        return (0, self.teacher.state_bytes) if waits else (self.teacher.state_bytes, 0)

    @property
    def checkpoint_bytes(self) -> int:
        """Return the bytes of all shards of a checkpoint: parameters and optimizer state in fp32. With an
        adapter, only the trained parameters count. A range test writes no checkpoint: 0."""
        if self.plan.training.is_range_test:
            return 0
        parameters = sum(unit.num_elements(trained=self.adapter is not None) for unit in self._all)
        trained = sum(unit.num_elements(trained=True) for unit in self._all)
        spared = sum(unit.spared_shard(1) for unit in self._all)
        return 4 * (parameters + self.copies * trained) - spared

    def segments(self, **changes: Any) -> list[Segment]:
        """Return the blocks of one micro-batch; in training with the teacher's forward pass, if any."""
        setting = replace(self.setting, **changes)
        blocks = self.program.blocks(setting)
        return blocks if self.teacher is None or not setting.training else self.teacher.beside(blocks)

    def _engine(self) -> FsdpStep | ZeroStep:
        cut = self._cut
        return FsdpStep(*self.units, cut) if isinstance(cut, FsdpCut) else ZeroStep(*self.units, cut)

    def _fsdp_cut(self) -> FsdpCut:
        plan = self.plan
        # The engine compares this number: it sees unsharded shapes when it is constructed.
        gradient_bytes = 4 * sum(unit.num_elements(trained=True) for unit in self._all)
        return FsdpCut(
            ranks=plan.mesh.dp_shard,
            itemsize=self.itemsize,
            reshard=plan.mesh.reshard_after_forward,
            state_copies=self.copies,
            widens_moments=plan.training.moments == "bf16",
            cpu=not self.cuda,
            copied_below=self._copied_below(plan.mesh.dp_shard),
            accumulation=min(3, plan.batch.accumulation_steps),
            defers=gradient_bytes <= DEFERRED_GRADIENT_BYTES,
            replicates=plan.mesh.dp_replicate > 1,
            recomputes=plan.activation_checkpointing != "none",
            plain=plan.mesh.world_size == 1 and plan.precision == "fp32" and plan.offload == "none",
            offloads=self.cuda and plan.offload == "parameters" and plan.zero is None,
            leaves_frozen=self.adapter is not None
            and plan.mesh.world_size == 1
            and plan.offload != "parameters",
        )

    def _copied_below(self, num_ranks: int) -> float:
        """Return the size in bytes below which gloo copies a message among that many neighbouring ranks."""
        if self.cuda:
            return 0
        return SHARED_MESSAGE_BYTES if num_ranks <= self.plan.mesh.ranks_per_node else math.inf

    def _zero_cut(self, zero: Zero) -> ZeroCut:
        plan = self.plan
        return ZeroCut(
            stage=zero.stage,
            ranks=plan.mesh.world_size,
            itemsize=self.itemsize,
            state_copies=self.copies,
            widens_moments=plan.training.moments == "bf16",
            cpu=not self.cuda,
            copied_below=self._copied_below(plan.mesh.world_size),
            accumulation=min(3, plan.batch.accumulation_steps),
            reduce_bucket=zero.reduce_bucket_size,
            prefetch_bucket=zero.prefetch_bucket_size,
            persistence=zero.persistence_threshold,
            max_live=zero.max_live_parameters,
            sub_group=zero.sub_group_size,
            recomputes=plan.activation_checkpointing != "none",
            speaks=tasks.find(plan.task).traits.head == "every-position",
            offloads_optimizer=self.cuda and plan.offload != "none",
            offloads_parameters=self.cuda and plan.offload == "parameters",
            to_files=plan.offload_to != "cpu",
        )
