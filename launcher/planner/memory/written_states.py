"""Memory of hidden states: of those that are written ahead, and of a student that learns from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.planner.limits import chunk_length
from launcher.planner.memory.fsdp import FsdpCut, FsdpStep
from launcher.planner.memory.program import Batch, Program, Segment, Setting, Unit, Weight
from launcher.planner.memory.teacher import COMPARED_BYTES
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.plan import Plan
from launcher.tasks.written_logits import Manifest

CHECKED_TOKENS = 18
"""Tokens of the two rows whose loss the check after loading computes: the only loss while states are written."""


@dataclass(frozen=True)
class StatesAlone:
    """The program of a language model whose last hidden states are written: no loss is computed."""

    model: Program
    width: int
    """Numbers of a hidden state."""
    vocabulary: int

    @classmethod
    def of(cls, plan: Plan, model: Program) -> Program:
        """Return this program of a plan's model; the model's own if its config does not tell the sizes."""
        shape = ModelShape.read(plan.model)
        return model if shape is None else cls(model, shape.hidden_size, shape.vocabulary)

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the model's units."""
        return self.model.units()

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the model's blocks. After the layers are only the last norm, at most three numbers in fp32 and
        three others for each of a hidden state, or the loss of the check after loading."""
        states = setting.batch.num_tokens * self.width * (12 + 3 * setting.itemsize)
        highest = max(states, CHECKED_TOKENS * self.vocabulary * (8 + setting.itemsize))
        return [
            replace(one, peak=min(one.peak, highest), rest=min(one.rest, highest))
            if one.kind == "tail"
            else one
            for one in self.model.blocks(setting)
        ]


@dataclass(frozen=True)
class TaughtAhead:
    """The program of a student, and the output matrix of a teacher whose hidden states were written ahead."""

    student: Program
    matrix: Unit
    itemsize: int
    """Bytes of a number of the matrix and of the hidden states."""

    @classmethod
    def of(cls, student: Program, manifest: Manifest) -> TaughtAhead:
        """Return the program of a student that learns from the hidden states of a manifest."""
        assert manifest.hidden is not None
        shapes = [(manifest.num_outputs, manifest.hidden.width)]
        shapes += [(manifest.num_outputs,)] * manifest.hidden.has_bias  # type: ignore[list-item]
        weights = (Weight("matrix", shape, trains=False, narrow=True) for shape in shapes)
        return cls(student, Unit(tuple(weights)), 4 if manifest.precision == "fp32" else 2)

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the student's units: the matrix is sharded apart from them."""
        return self.student.units()

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the student's blocks alone; `WrittenTeacher.beside` adds the matrix and the states."""
        return self.student.blocks(setting)


class WrittenTeacher:
    """The memory of a teacher's written part, on the rank that needs the most."""

    def __init__(self, plan: Plan, program: TaughtAhead, setting: Setting, cut: FsdpCut) -> None:
        """Take the student's plan, setting and sharding."""
        self.units: tuple[Unit, list[Unit]] = (program.matrix, [])
        plain = plan.mesh.world_size == 1 and plan.offload != "parameters"
        shards = replace(
            cut,
            ranks=plan.mesh.dp_shard,
            itemsize=program.itemsize,
            plain=plain,
            leaves_frozen=False,
            accumulation=1,
        )
        vocabulary, width = program.matrix.weights[0].shape
        own_vocabulary = program.student.units()[0].weights[0].shape[0]
        num_tokens = setting.batch.num_tokens
        compared = min(num_tokens, chunk_length(own_vocabulary, plan.mesh.device == "cuda")) * vocabulary
        alone = FsdpStep(*self.units, shards)
        alone.micro_step(
            [Segment("tail", 0, False, peak=(program.itemsize + COMPARED_BYTES) * compared)], True
        )
        self.pass_bytes = alone.time.peak
        self.state_bytes = program.itemsize * program.matrix.shard(plan.mesh.dp_shard)
        self._of_batch = program.itemsize * num_tokens * width

    def blocks(self, batch: Batch) -> list[Segment]:
        """Return no blocks: a product with the matrix is all that is computed."""
        return []

    def beside(self, segments: list[Segment]) -> list[Segment]:
        """Return the student's blocks, with the states of the micro-batch from the first to the last of them,
        and the gathered matrix and its logits within the last forward block, the loss."""
        last, changed = max(index for index, one in enumerate(segments) if not one.backward), [*segments]
        loss, own = segments[last], self._of_batch
        highest = loss.peak + self.pass_bytes
        changed[last] = replace(loss, peak=highest, rest=highest)
        first = changed[0]
        changed[0] = replace(first, added=first.added + own, peak=first.peak + own, rest=first.rest + own)
        changed[-1] = replace(changed[-1], added=changed[-1].added - own)
        return changed
