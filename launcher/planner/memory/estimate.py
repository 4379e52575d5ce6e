"""Estimate the memory of a rank by phase and by kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from launcher import tasks
from launcher.planner.limits import DEFERRED_GRADIENT_BYTES, SHARED_MESSAGE_BYTES
from launcher.planner.memory.footprint import PHASES, Footprint, Phase
from launcher.planner.memory.formulas import formulas_of, grouped
from launcher.planner.memory.fsdp import Cut, FsdpStep
from launcher.planner.memory.program import Batch, Program, Segment, Setting
from launcher.planner.memory.teacher import Taught, Teacher
from launcher.planner.memory.timeline import (
    CONTEXT,
    OPTIMIZER,
    PARAMETERS,
    SLACK,
    TEACHER,
    TEMPORARIES,
    Timeline,
    go_through,
)
from launcher.planner.memory.writing import write
from launcher.planner.memory.zero import ZeroStep
from launcher.planner.memory.zero_states import ZeroCut
from launcher.planner.plan import Plan

STATE_COPIES = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 2, "adafactor": 1}
"""fp32 numbers of each that trains. A matrix that Muon steps has one fewer; one that Adafactor steps has a
number for each row and each column instead."""
STAGED = "staged checkpoint"
CUDA_CONTEXT = 1 << 30
"""Assumed, not measured here: the CUDA context, its libraries and NCCL's own buffers."""
CUDA_SLACK = 0.05
"""Assumed, not measured here: what PyTorch's caching allocator keeps beyond what is live, as a share of what
comes and goes in a step."""


def estimate(plan: Plan, config: dict[str, Any], batch: Batch | None = None) -> Footprint | None:
    """Return the footprint of a plan by the formulas; None where they do not know the model.

    `batch` is one micro-batch of a rank; left out, every sample is as long as the plan lets it be.
    Raises ConfigurationError where the config lacks a size.
    """
    program = formulas_of(plan, config)
    return None if program is None else Estimator(plan, program, batch).footprint()


def batch_of(plan: Plan) -> Batch:
    """Return one micro-batch of a rank where every sample is as long as the plan lets it be."""
    return Batch((plan.data.max_length,) * plan.batch.micro_batch_size, padded=plan.layout != "packed")


class Estimator:
    """A plan, the program of its model, and one micro-batch."""

    def __init__(self, plan: Plan, program: Program, batch: Batch | None = None) -> None:
        """Take a plan and its model's program. `batch`: where it is left out every sample is as long as it
        may be."""
        self.plan, self.program = plan, program
        self.adapter = plan.model.adapter
        self.units = grouped(program.units(), plan)
        self.itemsize = 4 if plan.precision == "fp32" else 2
        self.cuda = plan.mesh.device == "cuda"
        self.slack = CUDA_SLACK if self.cuda else 0.0
        self.setting = Setting(
            batch or batch_of(plan),
            self.itemsize,
            plan.activation_checkpointing,
            self.cuda,
            frozen=self._frozen(),
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
        self.teacher: Teacher | None = None
        if isinstance(program, Taught):
            self.teacher = Teacher(plan, program.teacher, self.setting, self._cut())

    def _frozen(self) -> frozenset[str]:
        root, layers = self.units
        weights = [weight for unit in (root, *layers) for weight in unit.weights]
        return frozenset(weight.name for weight in weights if not weight.trains and self.adapter is None)

    def footprint(self) -> Footprint:
        """Return the memory of all phases: a range test neither saves nor resumes."""
        steady = self._step()
        states, host = self._states()
        resident, staged = sum(states.values()), self.checkpoint_bytes // self.plan.mesh.world_size
        for_a_while = self._loaded() + self._of_weights()
        loaded = states | {PARAMETERS: states.get(PARAMETERS, 0) + for_a_while}
        loading = Timeline(dict(loaded), sum(loaded.values()), "every parameter and its state", dict(loaded))
        saving = Timeline(dict(states), resident, "a copy, written while training goes on", dict(states))
        if not self.cuda and self.plan.checkpoint.asynchronous:
            where, parts = f"a copy of the state; {steady.where}", steady.at_peak | {STAGED: staged}
            saving = Timeline({}, steady.peak + staged, where, parts)
        copied = staged if self.cuda and self.plan.checkpoint.asynchronous else 0
        times = (loading, steady, steady, self._evaluation(), saving, loading)
        return Footprint(
            tuple(
                self._phase(name, time, host + copied * (name == "saving"))
                for name, time in zip(PHASES, times, strict=True)
                if not self.plan.training.is_range_test or name not in ("saving", "resuming")
            )
        )

    @property
    def _offloads(self) -> bool:
        """Return whether FSDP's state waits in the host's memory; what of ZeRO's does, its own step says."""
        return self.cuda and self.plan.offload == "parameters" and self.plan.zero is None

    def _states(self) -> tuple[dict[str, int], int]:
        """Return the bytes between two steps: on the device by kind, and those moved to the host's memory."""
        engine = self._engine()
        if isinstance(engine, ZeroStep):
            # Files take what they are named for in the place of the host's memory.
            return engine.states(), engine.host() if self.plan.offload_to == "cpu" else 0
        if not self._offloads:
            return engine.states(), 0
        trained = sum(unit.shard(self.plan.mesh.dp_shard, trained=True) for unit in engine.units)
        return {}, sum(engine.states().values()) + 4 * trained

    def least(self) -> int:
        """Return the bytes of the device without which no pass is possible, however small: the state, and
        what stays whole after the forward pass."""
        states, _ = self._states()
        mesh = self.plan.mesh
        whole = self.plan.zero is None and mesh.dp_shard > 1 and not mesh.reshard_after_forward
        root, layers = self.units
        gathered = self.itemsize * sum(unit.num_elements() for unit in (root, *layers)) if whole else 0
        return sum(states.values()) + gathered + self._teacher_bytes()[0] + (CUDA_CONTEXT if self.cuda else 0)

    def _loaded(self) -> int:
        """Return the bytes that are on the device as the model is loaded and no longer after: shards whose
        masters are made in the host's memory."""
        zero = self.plan.zero
        if zero is None or not self.cuda or self.plan.offload != "optimizer":
            return 0
        root, layers = self.units
        weights = [weight for unit in (root, *layers) for weight in unit.weights]
        return -(
            -sum(weight.num_elements * (self.itemsize if weight.narrow else 4) for weight in weights)
            // self.plan.mesh.world_size
        )

    def _of_weights(self) -> int:
        """Return the bytes that an adapter takes which is made of the weights beside it, one after another: of
        the largest, whole, fp64 with four squares of its shorter side, or fp32 three times."""
        if self.adapter is None or self.adapter.init == "lora":
            return 0
        root, layers = self.units
        weights = {weight.name: weight for unit in (root, *layers) for weight in unit.weights}
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
        """Return the bytes of a teacher's shards: on the device, and in the host's memory."""
        if self.teacher is None:
            return 0, 0
        waits = self.cuda and self.plan.offload == "parameters"
        return (0, self.teacher.state_bytes) if waits else (self.teacher.state_bytes, 0)

    @property
    def checkpoint_bytes(self) -> int:
        """Return the bytes of a whole checkpoint: parameters and the optimizer's state in fp32; beside an
        adapter of what trains alone; 0 of a range test, which writes none."""
        if self.plan.training.is_range_test:
            return 0
        root, layers = self.units
        parameters = sum(unit.num_elements(trained=self.adapter is not None) for unit in (root, *layers))
        trained = sum(unit.num_elements(trained=True) for unit in (root, *layers))
        spared = sum(unit.spared_shard(1) for unit in (root, *layers))
        return 4 * (parameters + self.copies * trained - spared)

    def segments(self, **changes: Any) -> list[Segment]:
        """Return the blocks of one micro-batch, with a teacher's pass in training."""
        setting = replace(self.setting, **changes)
        blocks = self.program.blocks(setting)
        return blocks if self.teacher is None or not setting.training else self.teacher.beside(blocks)

    def _engine(self) -> FsdpStep | ZeroStep:
        root, layers = self.units
        return (
            ZeroStep(root, layers, self._zero_cut())
            if self.plan.zero is not None
            else FsdpStep(root, layers, self._cut())
        )

    def _cut(self) -> Cut:
        plan, (root, layers) = self.plan, self.units
        # What the engine compares: parameters as it sees them when it is made, whole by their shape.
        gradient_bytes = 4 * sum(unit.num_elements(trained=True) for unit in (root, *layers))
        return Cut(
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
            offloads=self._offloads,
            leaves_frozen=self.adapter is not None
            and plan.mesh.world_size == 1
            and plan.offload != "parameters",
        )

    def _copied_below(self, num_ranks: int) -> float:
        """Return the bytes below which gloo copies the messages of that many neighbouring ranks."""
        if self.cuda:
            return 0
        return SHARED_MESSAGE_BYTES if num_ranks <= self.plan.mesh.ranks_per_node else math.inf

    def _zero_cut(self) -> ZeroCut:
        plan, zero = self.plan, self.plan.zero
        assert zero is not None
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
        )

    def _step(self) -> Timeline:
        engine = self._engine()
        if isinstance(engine, ZeroStep):
            more = self.segments(accumulates=True) if self.plan.batch.accumulation_steps > 1 else []
            return engine.step(self.segments(**engine.gradient_mode()), more)
        more = self.segments(accumulates=self.itemsize == 4) if self.plan.batch.accumulation_steps > 1 else []
        return engine.step(self.segments(), more)

    def _evaluation(self) -> Timeline:
        segments, engine = self.segments(training=False, checkpointing="none"), self._engine()
        if isinstance(engine, ZeroStep):
            engine.time.parts = engine.states()
            engine.forward(segments)
        else:
            engine.time.parts = {} if self._offloads else engine.states()
            if engine.cut.plain:
                for segment in segments:
                    go_through(engine.time, segment, recomputes=False)
            else:
                engine.micro_step(segments, True)
        engine.time.touch(TEMPORARIES, 0, "between steps")
        engine.time.parts = {} if self._offloads else engine.states()
        write(engine.time, self.plan, self.program, self.setting, self.units)
        return engine.time
