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
from launcher.tasks.generation import Evaluation
from launcher.values import Every, Fraction, Interval, Section


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
    """Name the model, and what it is to do."""

    name: str = Field(min_length=1)
    """A directory with a Hugging Face model, or a model's name on the hub."""
    task: TaskName = "causal-lm"
    """What the model learns to do."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    config: dict[str, Any] | None = None
    """What a config.json would say (`model_type`, sizes): to plan for a model that is not here, or to begin
    with random weights."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` makes up new weights from the model's config."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that are not trained, as `model.embed_tokens.*`."""
    freeze_normalization: bool = False
    """Train no layer that normalises, and leave the running statistics of batch norm as they are."""
    adapter: Adapter | None = None
    """Train small matrices beside the weights (LoRA) in place of the weights."""
    resize_embeddings: bool | None = None
    """Where the tokenizer has tokens that the model has no row for: `true` adds rows, the mean of the old
    ones; `false` leaves the model as it is and refuses rows of data with such a token. Left out, such a
    tokenizer is refused."""
    compile: bool = False
    """Compile each repeated layer with torch.compile."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models whose code you have read."""


class Batch(Section):
    """Say how many samples a step takes, and how they are cut."""

    global_batch_size: int = Field(default=32, ge=1, le=1_000_000_000)
    """Samples (packs, with packing) of one optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000_000)] | Auto = "auto"
    """Samples of one forward pass, per rank."""


class EarlyStopping(Section):
    """Stop when an evaluation metric no longer gets better."""

    metric: str = "loss"
    """The metric watched, by its name in the evaluation."""
    patience: int = Field(default=3, ge=1)
    """Evaluations without an improvement before the run ends."""
    minimum_delta: float = Field(default=0.0, ge=0)
    """The smallest change that counts as an improvement."""


class OnSpike(Section):
    """Say so, or go back, where the loss jumps and stays up."""

    action: Literal["ignore", "warn", "rewind"] = "warn"
    """`warn` says so and goes on; `rewind` goes back to the weights before and leaves out the samples since;
    `ignore` does neither."""
    threshold: float = Field(default=6.0, gt=0)
    """How far above the running median a loss stands out: in standard deviations (1.4826 MAD), of at least 5%
    of the median."""
    steps: int = Field(default=5, ge=1)
    """Losses in a row that stand out."""
    window: int = Field(default=64, ge=4)
    """Steps that the running median is of; nothing stands out before half of them are done."""
    times: int = Field(default=2, ge=1)
    """Rewinds of one run; where the loss jumps once more, it ends with exit code 8."""


class Training(Section):
    """Say how long to train, how fast, and with what."""

    epochs: float | None = Field(default=None, gt=0, le=1_000_000)
    """Passes over the data. 1 where neither epochs nor max_steps is given."""
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Optimizer steps, instead of epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """The highest learning rate."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW (decoupled weight decay), Adam, or SGD with momentum."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to Adam's denominator."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices; biases and norms are never decayed."""
    schedule: Literal["linear", "cosine", "constant", "inverse-sqrt"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Below 1: the share of all steps; from 1: steps."""
    minimum_learning_rate: float = Field(default=0.0, ge=0)
    """Where linear and cosine end."""
    clip_norm: float = Field(default=1.0, ge=0)
    """The largest global gradient norm; 0 leaves gradients as they are."""
    seed: int = Field(default=17, ge=0)
    """Of the order of the data, dropout and new weights."""
    evaluate_every: Every | None = None
    """Steps, a time, or epochs between evaluations; at the start and the end in any case."""
    early_stopping: EarlyStopping | None = None
    """Stop when a metric no longer gets better."""
    skip_nonfinite: int = Field(default=10, ge=0)
    """Steps in a row with a NaN or Inf loss or gradient that are skipped before the run stops, or goes back
    where `on_spike` says so."""
    on_spike: OnSpike = OnSpike()


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
    """Say what is cut among the ranks."""

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
    """The newest checkpoints that stay."""
    keep_best: int = Field(default=0, ge=0)
    """The best by `metric` that stay as well."""
    metric: str = "loss"
    """What `keep_best` ranks by."""
    asynchronous: bool = Field(default=True, alias="async")
    """Write while training goes on."""

    model_config = ConfigDict(populate_by_name=True)


class Job(Section):
    """One fine-tuning job. The task decides which columns `data` has: a job is made as one of `job_type`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """The run's name: letters, digits, `.`, `_` and `-`."""
    model: Model
    data: SerializeAsAny[Data]
    batch: Batch = Batch()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    precision: Precision | Auto = "auto"
    """Of the computation; parameters that train and their optimizer state are fp32 in any case."""
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | Auto = "auto"
    """Where metrics go besides metrics.jsonl; `auto` is TensorBoard where it is installed."""

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
