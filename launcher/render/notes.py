"""Notes on settings that the rendered files leave out, and on the reasons for ZeRO's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.planner.plan import Plan
from launcher.render import accelerate


@dataclass(frozen=True)
class Note:
    """One note on one key of the plan."""

    key: str
    value: object
    text: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value}: {self.text}"


def notes(plan: Plan) -> list[Note]:
    """Return a note for each setting that the plan's files leave out or express differently, then the reason
    for each of ZeRO's sizes."""
    remarks = [*_everywhere(plan), *(_deepspeed(plan) if plan.engine == "deepspeed" else _fsdp(plan))]
    sizes = {f"zero.{name}" for name in _used(plan)}
    return [*remarks, *(Note(d.key, d.value, d.reason) for d in plan.decisions if d.key in sizes)]


def _used(plan: Plan) -> list[str]:
    """Return the names of the sizes that this ZeRO stage uses."""
    if plan.zero is None:
        return []
    if plan.zero.stage < 3:
        return ["reduce_bucket_size", "allgather_bucket_size"]
    return [
        "reduce_bucket_size",
        "prefetch_bucket_size",
        "persistence_threshold",
        "max_live_parameters",
        "sub_group_size",
    ]


def _everywhere(plan: Plan) -> Iterator[Note]:
    training = f"{plan.training.optimizer}, {plan.training.schedule}"
    yield Note(
        "training",
        training,
        "optimizer and schedule are in no file: launcher's own, or those of your script, go with each of them",
    )
    if blind := plan.blind():
        yield Note("cluster.gpu", "absent", blind)
    if plan.mesh.nodes > 1:
        text = (
            "accelerate.yaml is the same on every node: add --machine_rank N and --main_process_ip "
            "FIRST_NODE to accelerate launch"
        )
        yield Note("mesh.nodes", plan.mesh.nodes, text)
    if plan.slurm.time_limit_minutes is None:
        yield Note(
            "slurm.time_limit_minutes",
            "absent",
            "submit.sbatch asks for no time, and gets the partition's default",
        )


def _deepspeed(plan: Plan) -> Iterator[Note]:
    if plan.activation_checkpointing != "none":
        text = (
            "is done by the model, not by ds_config.json: launcher does it; a script calls "
            "gradient_checkpointing_enable()"
        )
        yield Note("activation_checkpointing", plan.activation_checkpointing, text)
    if plan.mesh.device == "cpu":
        yield Note(
            "mesh.device", "cpu", 'a script on Accelerate names gloo: InitProcessGroupKwargs(backend="gloo")'
        )
    if plan.zero is not None and plan.zero.stage == 1 and plan.precision == "bf16":
        text = (
            "DeepSpeed takes its BF16_Optimizer for stage 1 in bf16 with fp32 gradients; its states are "
            "cut as in ZeRO-1"
        )
        yield Note("zero.stage", 1, text)


def _fsdp(plan: Plan) -> Iterator[Note]:
    kind = accelerate.distributed_type(plan)
    if kind == "MULTI_CPU":
        text = (
            "Accelerate has no FSDP on CPUs: its ranks hold whole copies (MULTI_CPU), where launcher "
            "shards. To start a script: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --config_file accelerate.yaml "
            "train.py (without --multi_gpu one rank)"
        )
        yield Note("mesh.device", "cpu", text)
    if kind == "MULTI_GPU":
        yield Note(
            "sharding",
            "none",
            "whole copies: accelerate.yaml has DistributedDataParallel, as Accelerate's FSDP2 always cuts",
        )
    if kind != "FSDP":
        return
    if plan.activation_checkpointing == "selective":
        yield Note(
            "activation_checkpointing",
            "selective",
            "Accelerate knows all or nothing; accelerate.yaml recomputes each layer whole",
        )
    if plan.precision != "fp32":
        yield Note(
            "precision",
            plan.precision,
            f"Accelerate also reduces gradients in {plan.precision}; launcher reduces them in fp32",
        )
    batch = plan.batch
    cut = f"{batch.micro_batch_size} x {batch.accumulation_steps} x {batch.data_parallel_size}"
    text = (
        "accelerate.yaml has no batch and no clipping: Accelerator(gradient_accumulation_steps=...) and "
        "clip_grad_norm_ stand in the script"
    )
    yield Note("batch", cut, text)
