"""What the user asks for: the job file as frozen pydantic models.

Each field's docstring line is its help text, its unit and its scope; the reference page and the JSON schema
take it from the source (`launcher.job.describe`), because having pydantic do so on every import costs a third
of `launcher validate`. Checks of one value stand here; checks across values stand in `launcher.job.check`,
which collects them.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    create_model,
    model_validator,
)

from launcher import tasks
from launcher.data.section import Data
from launcher.errors import ConfigurationError
from launcher.job.adapter import Adapter
from launcher.job.cluster import Auto, Cluster
from launcher.job.training import Training
from launcher.job.tuning import Freeze, Thaw, parse_freeze
from launcher.tasks.distillation import Distillation
from launcher.tasks.generation import Evaluation
from launcher.values import Every, Interval, Section


def known_task(name: str) -> str:
    """Return a task's name as it is. Raises ValueError where there is no such task."""
    try:
        tasks.find(name)
    except ConfigurationError as error:
        raise ValueError(error.problems[0].reason) from None
    return name


TaskName = Annotated[str, AfterValidator(known_task)]
Precision = Literal["bf16", "fp16", "fp32"]
ActivationCheckpointing = Literal["none", "full", "selective"]
EngineName = Literal["fsdp", "deepspeed"]
Sharding = Literal["full", "gradients", "optimizer", "none"]
Offload = Literal["none", "optimizer", "parameters"]


class Model(Section):
    """Name the model and its task."""

    name: str = Field(min_length=1)
    """A directory with a Hugging Face model, or a model's name on the hub. `minilm-l6` and `smollm2-135m` are
    small ones that come in Python packages."""
    task: TaskName = "causal-lm"
    """What the model learns to do."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    config: dict[str, Any] | None = None
    """The content of a config.json (`model_type`, sizes), to plan for a model that is not here, or to start
    from random weights."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises new weights by the model's config."""
    freeze: Annotated[Freeze, BeforeValidator(parse_freeze)] = Freeze()
    """Parameters that are not trained: a list of patterns of names, or a section that goes by depth too."""
    unfreeze: tuple[Thaw, ...] = ()
    """When what is frozen by depth begins to train, from the top down: a list of sections."""
    freeze_normalization: bool = False
    """Freeze all normalisation layers, and the running statistics of batch norm."""
    adapter: Adapter | None = None
    """Train small matrices beside the weights (LoRA), factors of what layers compute (IA3), or vectors before
    each sample (prompt tuning, P-tuning), in place of the weights."""
    resize_embeddings: bool | None = None
    """The treatment of tokens without a row in the embedding: `true` adds rows, the mean of the old ones;
    `false` leaves the model as it is, and refuses data with such a token. Left out, a tokenizer with such
    tokens is refused."""
    compile: bool | Auto = False
    """Compile each repeated layer with torch.compile. `auto` does so on GPUs under FSDP, if the model's
    layers are known to be one graph each."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose code you have read."""


class Batch(Section):
    """Say how many samples a step takes, and how they are divided."""

    global_batch_size: int = Field(default=32, ge=1, le=1_000_000_000)
    """Samples (packs, with packing) of one optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000_000)] | Auto = "auto"
    """Samples of one forward pass, per rank."""


class Memory(Section):
    """Say what to trade for memory."""

    activation_checkpointing: ActivationCheckpointing | Auto = "auto"
    """`full` recomputes each layer, `selective` all but its matrix products, `none` keeps everything."""
    offload: Offload | Auto = "auto"
    """What lives off the device between uses: nothing, the `optimizer` state, or the `parameters` and the
    optimizer state."""
    offload_to: str = Field(default="cpu", min_length=1)
    """`cpu` (the host's memory), or a directory on NVMe."""


class Parallel(Section):
    """Say what is sharded among the ranks."""

    engine: EngineName | Auto = "auto"
    """The sharding engine: PyTorch's FSDP2, or DeepSpeed's ZeRO."""
    shard: Sharding | Auto = "auto"
    """`full`: parameters, gradients and optimizer (ZeRO-3); `gradients`: gradients and optimizer (ZeRO-2);
    `optimizer` (ZeRO-1); `none`."""
    replicate: int = Field(default=1, ge=1, le=1_000_000)
    """Whole copies of the model (hybrid sharding, FSDP): ranks are replicate x shard."""
    secondary_shard: int = Field(default=1, ge=1, le=1_000_000)
    """ZeRO++ hpZ (DeepSpeed): the ranks, those of a node, that keep a second copy of the parameters to gather
    from. 1: none."""
    quantized_weights: bool = False
    """ZeRO++ qwZ (DeepSpeed, GPUs): gather parameters as 8-bit blocks."""
    quantized_gradients: bool = False
    """ZeRO++ qgZ (DeepSpeed, GPUs): reduce gradients as 4-bit blocks."""


class Checkpoint(Section):
    """Say when to save, and what to keep."""

    every: Every = Interval(value=900, unit="seconds")
    """Steps (200), a time (15min) or epochs between saves; at the end in any case."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay."""
    keep_best: int = Field(default=0, ge=0)
    """How many of the best by `metric` stay as well."""
    metric: str = "loss"
    """Metric that `keep_best` ranks by: one of the evaluation, or of one of its sources, as `old/loss`."""
    asynchronous: bool = Field(default=True, alias="async")
    """Write checkpoints while training goes on."""

    model_config = ConfigDict(populate_by_name=True)


class Tracking(Section):
    """Say where trackers keep the run, and by which words it is found there."""

    project: str | None = Field(default=None, min_length=1, max_length=128)
    """W&B's or trackio's project, MLflow's experiment. Left out: that of the tracker's own variable, or else
    `launcher`."""
    group: str | None = Field(default=None, min_length=1, max_length=128)
    """Runs that belong together: W&B's or trackio's group, MLflow's tag `group`."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Words to search by: W&B's tags, MLflow's tag `tags`."""


class Job(Section):
    """One fine-tuning job. The task decides which columns `data` has: a job is made as one of `job_type`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """The run's name: letters, digits, `.`, `_` and `-`."""
    model: Model
    data: SerializeAsAny[Data]
    batch: Batch = Batch()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    distillation: Distillation | None = None
    """Learn from a teacher too."""
    precision: Precision | Auto = "auto"
    """The precision of the computation. Parameters that train, and their optimizer state, are always fp32."""
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | Auto = "auto"
    """The places that metrics go to besides metrics.jsonl. `auto` means TensorBoard, if it is installed."""
    tracking: Tracking = Tracking()

    @model_validator(mode="wrap")
    @classmethod
    def _with_the_tasks_columns(cls, content: Any, handler: ModelWrapValidatorHandler[Job]) -> Job:
        if cls is not Job or not isinstance(content, dict) or (kind := job_type(task_of(content))) is Job:
            return handler(content)
        if isinstance(
            data := content.get("data"), dict
        ):  # null leaves out what may stand here with another task
            own = tasks.find(task_of(content)).Columns.model_fields
            content = content | {
                "data": {key: value for key, value in data.items() if value is not None or key in own}
            }
        return kind.model_validate(content)


@functools.cache
def job_type(task: str) -> type[Job]:
    """Return the schema of a job with this task, whose `data` has the task's own columns; that of any job
    where there is no such task."""
    try:
        columns = tasks.find(task).Columns
    except ConfigurationError:
        return Job
    return create_model("Job", __base__=Job, __doc__=Job.__doc__, data=(columns, ...))


def task_of(content: dict[str, Any]) -> str:
    """Return the task that the content of a job file names, or the one that it has where it names none."""
    model = content.get("model")
    named = model.get("task") if isinstance(model, dict) else None
    return named if isinstance(named, str) else str(Model.model_fields["task"].default)
