"""Memory of a teacher in distillation: its shards, and its forward pass within the student's loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher import tasks
from launcher.planner.limits import chunk_length
from launcher.planner.memory.fsdp import FsdpCut, FsdpStep
from launcher.planner.memory.program import Batch, Program, Segment, Setting, Unit, Weight
from launcher.planner.model.model_shape import Stack
from launcher.planner.plan import Plan
from launcher.tasks.distillation import PROJECTION

COMPARED_BYTES = 8
"""Bytes per logit of a chunk for both models' probabilities in fp32, in addition to the teacher's logits and
the student's loss."""


@dataclass(frozen=True)
class Taught:
    """The programs of a student and its teacher."""

    student: Program
    teacher: Program
    compared: tuple[Stack, Stack] | None = None
    """The layers of both whose hidden states are compared; None if none are, or if a config is missing."""

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the student's units, with the projection between hidden states of different widths."""
        root, layers = self.student.units()
        if self.compared is None or self.compared[0].hidden_size == self.compared[1].hidden_size:
            return root, layers
        own, other = self.compared
        projection = Weight(f"{PROJECTION}.weight", (other.hidden_size, own.hidden_size))
        return replace(root, weights=(*root.weights, projection)), layers

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the student's blocks alone; `Teacher.beside` adds the teacher's forward pass."""
        return self.student.blocks(setting)


class Teacher:
    """A teacher's memory, on the rank that needs the most."""

    def __init__(self, plan: Plan, program: Taught, setting: Setting, cut: FsdpCut) -> None:
        """Take the student's plan, setting and sharding; its frozen parameters and adapter are ignored."""
        root, layers = program.teacher.units()
        self.units = _frozen(root), [_frozen(layer) for layer in layers]
        offloads = plan.offload == "parameters"
        plain = plan.mesh.world_size == 1 and not offloads
        shards = replace(
            cut, ranks=plan.mesh.dp_shard, reshard=True, plain=plain, leaves_frozen=False, accumulation=1
        )
        self._program = program.teacher
        self._setting = replace(
            setting, checkpointing="none", training=False, frozen=frozenset(), adapter=None
        )
        alone = FsdpStep(*self.units, shards)
        alone.micro_step(
            [
                replace(one, peak=max(0, one.added))
                if one.kind == "tail"
                else one  # its own loss is not computed
                for one in self.blocks(setting.batch)
            ],
            True,
        )
        elements, at_positions = 0, tasks.find(plan.task).traits.head == "every-position"
        if at_positions:
            vocabulary = root.weights[0].shape[0]
            elements = vocabulary * min(
                setting.batch.num_tokens, chunk_length(vocabulary, plan.mesh.device == "cuda")
            )
        self._hidden = _Hidden.of(plan, program, setting, at_positions)
        self.state_bytes = setting.itemsize * sum(unit.shard(plan.mesh.dp_shard) for unit in (root, *layers))
        whole = 0 if plain else setting.itemsize * self.units[0].num_elements()
        compared = whole + (setting.itemsize + COMPARED_BYTES) * elements
        self.pass_bytes = self._hidden.states + max(alone.time.peak, compared)
        self._differing = self._hidden.states + self._hidden.squares + whole

    def blocks(self, batch: Batch) -> list[Segment]:
        """Return the blocks of its forward pass over a micro-batch."""
        return self._program.blocks(replace(self._setting, batch=batch))

    def beside(self, segments: list[Segment]) -> list[Segment]:
        """Return the student's blocks, with the teacher's forward pass within the last forward block, the
        loss. Tensors saved for the difference of hidden states are freed in the first backward block, except
        for gradients that wait for their layers."""
        last, hidden = max(index for index, one in enumerate(segments) if not one.backward), self._hidden
        loss, changed = segments[last], [*segments]
        added = loss.added + hidden.kept
        highest = max(loss.peak + self.pass_bytes, added + self._differing)
        changed[last] = replace(loss, peak=highest, rest=highest, added=added)  # no gradient is made in it
        for index, left in ((last + 1, hidden.kept - hidden.waiting), (len(segments) - 1, hidden.waiting)):
            changed[index] = replace(changed[index], added=changed[index].added - left)
        return changed


@dataclass(frozen=True)
class _Hidden:
    """Memory of the difference of hidden states, in bytes."""

    kept: int = 0
    """Kept from the loss until its backward pass."""
    waiting: int = 0
    """The part for gradients of hidden states, kept until the backward pass reaches their layers."""
    states: int = 0
    """The teacher's hidden states of every layer, during its forward pass."""
    squares: int = 0
    """Temporaries while a difference is computed."""

    @classmethod
    def of(cls, plan: Plan, program: Taught, setting: Setting, takes: bool) -> _Hidden:
        """Return the sizes; all are 0 if nothing is compared. takes: only the supervised positions are
        compared, as for a causal LM."""
        hidden = None if plan.distillation is None else plan.distillation.hidden_states
        if hidden is None or program.compared is None:
            return cls()
        own, other = program.compared
        num_tokens, itemsize = setting.batch.num_tokens, setting.itemsize
        num_pairs, one = len(hidden.pairs(own.num_layers, other.num_layers)), num_tokens * other.hidden_size
        # The squared difference saves both sides in fp32. The student's own is copied in fp32 only if some of
        # the positions are selected: a causal LM's supervised ones.
        turns = own.hidden_size != other.hidden_size
        copies = 2 if itemsize == 2 or takes or turns else 1
        kept = num_pairs * (4 * copies * one + (takes and turns) * itemsize * num_tokens * own.hidden_size)
        states = (other.num_layers + 1) * itemsize * one
        waiting = num_pairs * num_tokens * own.hidden_size * itemsize
        return cls(max(kept, waiting), waiting, states, 2 * 4 * one)


def _frozen(unit: Unit) -> Unit:
    """Return the unit with all parameters frozen, stored in the precision of the computation."""
    weights = (replace(weight, trains=False, narrow=True) for weight in unit.weights)
    return replace(unit, weights=tuple(weights))
