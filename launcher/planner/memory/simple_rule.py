"""Decide recomputation and micro-batch by a simple, sound rule, where no forecast can choose them.

It adds up what the states take and what is kept of a sample for the backward pass: an estimate with room to
spare, not a promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.job.schema import ActivationCheckpointing, Job, Precision
from launcher.planner.hardware.detect import Hardware
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.plan import Decision, Plan
from launcher.planner.resolve.batch import largest_divisor, with_batch

SAFE_SHARE = 0.8
"""The share of a device's memory that the rule counts on; the rest is for what it does not count."""
STATE_BYTES = {"adamw": 16, "adam": 16, "sgd": 12}
"""Of each parameter: fp32 weight, fp32 gradient and the optimizer's moments."""
ROOMY_TIMES = 3
"""What a CPU rank that keeps what it frees may hold, and more, in sizes of its tensors at their highest."""
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}
"""Tokens beyond which a larger pass is no faster, so that memory is not taken for nothing."""
RECOMPUTATIONS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
"""What may be computed again in the backward pass, the least first."""


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on."""

    shape: ModelShape
    precision: Precision
    num_state_bytes: int
    """Of each parameter: fp32 weight, fp32 gradient and the optimizer's moments."""
    shard: int
    """Ranks that one copy of the model is cut over."""
    gathered: bool
    """Whole parameters stay on each rank after the forward pass."""
    adapter_rank: int = 0
    """Of adapters that train in place of the weights; 0 without them."""

    @classmethod
    def of(cls, plan: Plan) -> Setting | None:
        """Return what a rank of a plan depends on; None where the model's size is not known here."""
        shape = ModelShape.read(plan.model)
        if shape is None:
            return None
        adapter_rank = plan.model.adapter.rank if plan.model.adapter else 0
        gathered = plan.mesh.shard > 1 and not plan.mesh.reshard_after_forward
        state_bytes = STATE_BYTES[plan.training.optimizer]
        return cls(shape, plan.precision, state_bytes, plan.mesh.shard, gathered, adapter_rank)

    @property
    def _bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def states(self) -> int:
        """Return the bytes of a rank before a sample: its shard, and the layers gathered (two or all)."""
        parameters, layers = self.shape.num_parameters, self.shape.num_layers
        whole = 1.0 if self.gathered else min(1.0, 2 / layers)
        gathered = parameters * whole * self._bytes if self.shard > 1 or self.precision != "fp32" else 0
        if self.adapter_rank:
            # Beside each matrix rank x (inputs + outputs): in a layer four of attention, three others.
            inner = self.shape.hidden_size + self.shape.intermediate_size
            beside = self.adapter_rank * layers * (4 * 2 * self.shape.hidden_size + 3 * inner)
            return int((parameters * self._bytes + beside * self.num_state_bytes) / self.shard + gathered)
        return int(parameters * self.num_state_bytes / self.shard + gathered)

    def of_token(self, checkpointing: ActivationCheckpointing) -> int:
        """Return the bytes kept of a token by all layers: inputs of products, norms and activations."""
        hidden, wide, layers = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_layers
        whole = 14 * hidden + 5 * wide
        kept: dict[ActivationCheckpointing, int] = {
            "none": whole * layers,
            "selective": (7 * hidden + 3 * wide) * layers + whole,
            "full": hidden * layers + whole,
        }
        return kept[checkpointing] * self._bytes


def by_simple_rule(job: Job, plan: Plan, hardware: Hardware) -> Plan:
    """Return a candidate plan with all decided that otherwise takes a forecast, where it is open."""
    memory_bytes = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    setting = Setting.of(plan) if memory_bytes else None
    decisions = list(plan.decisions)
    if job.memory.offload == "auto" and plan.mesh.device == "cuda":
        reason = "nothing has to leave the GPUs, as far as is known"
        decisions.append(Decision(key="memory.offload", value=plan.offload, reason=reason))
    recompute = plan.activation_checkpointing
    if job.memory.activation_checkpointing == "auto":
        recompute, reason = _recomputation(plan, setting, memory_bytes)
        decisions.append(Decision(key="memory.activation_checkpointing", value=recompute, reason=reason))
    micro = plan.batch.micro_batch_size
    if job.batch.micro_batch_size == "auto":
        per_rank = micro * plan.batch.accumulation_steps
        limit, reason = _largest_pass(plan, setting, recompute, memory_bytes)
        micro = largest_divisor(per_rank, limit)
        reason = f"divides the {per_rank} samples of a rank exactly; {reason}"
        decisions.append(Decision(key="batch.micro_batch_size", value=micro, reason=reason))
    return with_batch(plan, micro, recompute).model_copy(update={"decisions": tuple(decisions)})


def _recomputation(
    plan: Plan, setting: Setting | None, memory_bytes: int
) -> tuple[ActivationCheckpointing, str]:
    """Return the least recomputation with which one sample fits, and why."""
    if not memory_bytes:
        return (
            "full",
            "the memory of the GPUs that it will run on is not known here, and this needs the least",
        )
    if setting is None:
        return (
            "none",
            "the model's size is not known before it is fetched; write full or selective if memory runs out",
        )
    num_tokens = plan.data.max_length
    free = int(memory_bytes * SAFE_SHARE) - setting.states()
    states = f"(states take about {gib(setting.states())} of a rank's {gib(memory_bytes)})"
    for recompute in recomputations(plan):
        kept = setting.of_token(recompute) * num_tokens
        if kept <= free:
            sample = f"a sample of {num_tokens} tokens keeps about {gib(kept)}"
            return recompute, f"{sample} of the {gib(free)} that the model leaves free {states}"
    needed = gib(setting.states() + setting.of_token("full") * num_tokens)
    there = f"{gib(memory_bytes)} are there: it may run out of memory"
    return "full", f"about {needed} would be needed even so, and {there} {states}"


def _largest_pass(
    plan: Plan, setting: Setting | None, recompute: ActivationCheckpointing, memory_bytes: int
) -> tuple[int, str]:
    """Return the most samples of one pass, and what sets the limit."""
    num_tokens = plan.data.max_length
    fast = samples_per_pass(plan)
    reason = f"more than {TOKENS_PER_PASS[plan.mesh.device]} tokens of a pass are no faster"
    if setting is None:
        return fast, reason
    free = int(memory_bytes * SAFE_SHARE) - setting.states()
    fitting = max(1, free // max(1, setting.of_token(recompute) * num_tokens))
    return (fast, reason) if fast <= fitting else (fitting, f"more would not fit into {gib(memory_bytes)}")


def samples_per_pass(plan: Plan) -> int:
    """Return the largest micro-batch worth having: a larger pass is no faster."""
    return max(1, TOKENS_PER_PASS[plan.mesh.device] // plan.data.max_length)


def recomputations(plan: Plan) -> tuple[ActivationCheckpointing, ...]:
    """Return what the plan's engine can recompute, the least first: ZeRO-3 can do nothing selectively."""
    third_stage = plan.zero is not None and plan.zero.stage == 3
    return tuple(recompute for recompute in RECOMPUTATIONS if recompute != "selective" or not third_stage)


def keeps_freed(live: int, memory_bytes: int) -> bool:
    """Return whether a CPU's ranks have room to keep what they free. live: their tensors' most bytes."""
    return 0 < ROOMY_TIMES * live <= memory_bytes


def gib(num_bytes: int) -> str:
    """Bytes of memory for people: `1.5 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:.1f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
