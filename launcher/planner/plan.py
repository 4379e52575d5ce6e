"""The plan: everything that will run, with nothing left open. The trainer's one input.

It is the job with nothing left open (no `auto`, no null: what does not apply is absent), the exact batch,
the mesh, and each decision with its reason.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, model_validator

from launcher import tasks
from launcher.data.section import Data
from launcher.errors import ConfigurationError, Problem
from launcher.job.cluster import Container
from launcher.job.schema import (
    ActivationCheckpointing,
    Checkpoint,
    EngineName,
    Interval,
    Model,
    Offload,
    Precision,
    Sharding,
    Tracking,
    Training,
)
from launcher.plain_files import read_text
from launcher.planner.axes import Mesh
from launcher.tasks.distillation import Distillation
from launcher.tasks.generation import Evaluation
from launcher.tasks.task import Head, SampleLayout


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, defer_build=True)


Attention = Literal["sdpa", "eager", "flash_attention_2", "packed"]


class Decision(Frozen):
    """One decided key that the job left open."""

    key: str
    value: str | int | float | bool
    reason: str


UNKNOWN_MEMORY = "the memory of the GPUs that it will run on is not known here; name them: cluster.gpu"
"""Why the choice with the least memory was taken, as a clause at the end of a reason."""

Why = Literal["does not fit", "slower", "too late", "not possible"]


class Refused(Frozen):
    """A plan that was considered and not taken."""

    what: str
    """How it differs: engine and sharding, recomputation, nodes."""
    why: Why
    reason: str


class Length(Frozen):
    """Length of training."""

    value: float
    unit: Literal["steps", "epochs"]


class BatchPlan(Frozen):
    """global_batch_size = micro_batch_size x accumulation_steps x data_parallel_size, exactly."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    data_parallel_size: int
    balanced: bool = False
    """Whether padded passes of short samples hold more than micro_batch_size of them, and those of long ones
    fewer, so that ranks wait less for each other."""


class Zero(Frozen):
    """Settings of DeepSpeed's ZeRO; sizes are in elements."""

    stage: Literal[1, 2, 3]
    reduce_bucket_size: int
    allgather_bucket_size: int
    prefetch_bucket_size: int
    persistence_threshold: int
    max_live_parameters: int
    sub_group_size: int
    largest_parameter: int = 0
    """An upper bound of any parameter's size; 0 if unknown."""
    secondary_shard: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False


class Slurm(Frozen):
    """Options of a Slurm submission in addition to the mesh."""

    nodes: str | None = None
    """A range such as `2-8`, if several numbers of nodes will do."""
    time_limit_minutes: int | None = None
    options: dict[str, str] = {}
    """sbatch's own long options by name; empty text for an option without a value."""
    gpu_option: Literal["gres", "gpus-per-node"] = "gres"
    gpu_type: str | None = None
    cpus_per_node: int | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    container: Container | None = None
    interface: str | None = None
    requeue: bool = True
    attempts_without_progress: int = 3

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Plan(Frozen):
    """Everything the trainer needs to know."""

    format: Literal[1] = 1
    name: str
    task: str
    engine: EngineName
    sharding: Sharding
    """The kinds of tensors that are sharded among the ranks."""
    offload: Offload = "none"
    offload_to: str = "cpu"
    """`cpu`, or an absolute directory."""
    zero: Zero | None = None
    """Only if the engine is DeepSpeed."""
    slurm: Slurm = Slurm()
    precision: Precision
    activation_checkpointing: ActivationCheckpointing
    attention: Attention
    layout: SampleLayout
    head: Head = "chunked"
    num_data_workers: int
    trackers: tuple[str, ...]
    tracking: Tracking | None = None
    """Only if the job sets more than the trackers' names."""
    grace_seconds: float
    share_with_group: bool = False
    hang_after: float | Literal["off"] | None = None
    """Seconds without progress until a hang is suspected, in every phase; absent: each phase has its own."""
    length: Length
    batch: BatchPlan
    mesh: Mesh
    model: Model
    data: SerializeAsAny[Data]
    """Paths are absolute."""
    training: Training
    checkpoint: Checkpoint
    evaluate_every: Interval | None = None
    evaluation: Evaluation | None = None
    """Only if the job evaluates more on held-out rows than the loss."""
    distillation: Distillation | None = None
    """The job's teacher, or its logits, by absolute directory, and how the student learns from it; None
    without one."""
    script: tuple[str, ...] | None = None
    """A user's own training script, by its absolute path, and its arguments. Model, data, batch and training
    are then the script's."""
    decisions: tuple[Decision, ...] = ()
    refused: tuple[Refused, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_plans(cls, values: Any) -> Any:
        """Read `data` as the task's columns. Plans from before 2026-12 had one layout per task, and one
        section `data` for all tasks."""
        if not isinstance(values, dict) or not isinstance(values.get("task"), str):
            return values
        data = values.get("data")
        if "layout" in values and not isinstance(data, dict):
            return values
        task = tasks.find(values["task"])
        if isinstance(data, dict):
            of_others = {
                key for name in tasks.TASKS for key in tasks.find(name).Columns.model_fields
            } - task.Columns.model_fields.keys()
            data = task.Columns.model_validate(
                {key: value for key, value in data.items() if key not in of_others}
            )
        return {"layout": task.traits.layout} | values | {"data": data}

    def blind(self) -> str | None:
        """Return a sentence on decisions made without knowing the GPUs' memory; None if there are none."""
        blind = [each for each in self.decisions if each.reason.endswith(UNKNOWN_MEMORY)]
        taken = ", ".join(f"{each.key} = {each.value}" for each in blind)
        return (
            f"{UNKNOWN_MEMORY}. Taken as it needs the least, which may be slower: {taken}" if blind else None
        )

    def of_directory(self, model: str) -> Plan:
        """Return the plan for the model in a directory, unchanged: the job's changes to its own model are not
        applied to it."""
        own = self.model
        as_it_stands = Model(
            name=model, task=own.task, attention=own.attention, trust_remote_code=own.trust_remote_code
        )
        return self.model_copy(update={"model": as_it_stands})

    def of_teacher(self) -> Plan:
        """Return the plan of the teacher alone, which FSDP shards with either engine."""
        assert self.distillation is not None and self.distillation.teacher is not None
        model = Model(
            name=self.distillation.teacher,
            revision=self.distillation.revision,
            task=self.model.task,
            trust_remote_code=self.model.trust_remote_code,
        )
        return self.as_frozen().model_copy(update={"model": model})

    def as_frozen(self) -> Plan:
        """Return the plan of what computes next to the model without being trained: sharded by FSDP, without a
        teacher of its own."""
        changes = {"distillation": None, "engine": "fsdp", "zero": None, "activation_checkpointing": "none"}
        return self.model_copy(update=changes)

    def flat(self, without: set[str]) -> dict[str, Any]:
        """Return every value by its key (`training.learning_rate`), except those in the fields `without`."""
        flat: dict[str, Any] = {}
        _flatten("", self.model_dump(mode="json", exclude_none=True, by_alias=True, exclude=without), flat)
        return flat

    def to_json(self) -> str:
        """Return the text for plan.json; values that do not apply are omitted, so nothing in it is null."""
        return self.model_dump_json(indent=2, exclude_none=True, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Return the plan in the file `path`. Raises ConfigurationError if it is no plan, OSError if it
        cannot be read."""
        try:
            return cls.model_validate_json(read_text(path))
        except UnicodeDecodeError:
            raise ConfigurationError("not UTF-8 text, and no plan that launcher wrote", str(path)) from None
        except ValidationError as error:
            problems = [
                Problem(".".join(map(str, item["loc"])), None, item["msg"])
                for item in error.errors(include_url=False)
            ]
            raise ConfigurationError(problems, f"{path} is no plan that launcher wrote") from None

    def digest(self) -> str:
        """Return a hash of the settings that determine a run's numbers: equal digests on equal topology give
        equal bits."""
        without_effect = {
            "decisions",
            "refused",
            "trackers",
            "tracking",
            "grace_seconds",
            "share_with_group",
            "hang_after",
            "checkpoint",
            "slurm",
            "evaluation",
        }
        kept: dict[str, Any] = self.model_dump(mode="json", exclude_none=True, exclude=without_effect)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        into[prefix] = value
        return
    for key, below in value.items():
        _flatten(f"{prefix}.{key}" if prefix else key, below, into)
