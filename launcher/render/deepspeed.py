"""The rendering of ds_config.json.

It has no `optimizer` and no `scheduler`. Those of launcher, or of the user's script, are passed to
`deepspeed.initialize`, and Accelerate refuses a script's own optimizer if the file names one.
"""

from __future__ import annotations

from typing import Any

from launcher.planner.plan import Plan, Zero

NEVER = 1_000_000_000
"""The steps between DeepSpeed's own progress lines, which launcher replaces by its own."""
_ADAM_TENSORS = 4
"""The buffers for Adam with optimizer state in files: parameter, gradient and both moments are in flight at
once."""
_PARAMETER_BUFFERS = 5
"""DeepSpeed's default number of buffers: for the parameters in use and those being fetched."""


def config(plan: Plan) -> dict[str, Any]:
    """Return the complete content of ds_config.json, without `auto` and null. Raises ValueError if the plan's
    engine is not DeepSpeed."""
    if plan.zero is None:
        raise ValueError(
            f"a plan for {plan.engine} has no ZeRO stage; plan it with parallel.engine: deepspeed"
        )
    content: dict[str, Any] = {
        "train_batch_size": plan.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.batch.micro_batch_size,
        "gradient_accumulation_steps": plan.batch.accumulation_steps,
        "gradient_clipping": plan.training.clip_norm,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": plan.precision == "bf16"},
        "fp16": _fp16(plan),
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(plan, plan.zero),
    }
    if plan.offload != "none" and plan.offload_to != "cpu":
        content["aio"] = {
            "block_size": 1 << 20,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    return content


def _fp16(plan: Plan) -> dict[str, Any]:
    """Return the section `fp16`. The loss scale changes as in `launcher/training/precision.py`: halved at once,
    doubled after 2,000 good steps."""
    if plan.precision != "fp16":
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 2000,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }


def _zero(plan: Plan, zero: Zero) -> dict[str, Any]:
    content: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        # There are no streams on the CPU: nothing would overlap, and the bucket would be allocated twice.
        "overlap_comm": plan.mesh.device == "cuda",
        "reduce_scatter": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
    }
    if zero.stage == 3:
        content |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            # Without prefetch (parameters in files), no parameter is kept for reuse either, as there are few
            # buffers.
            "stage3_max_reuse_distance": zero.max_live_parameters if zero.prefetch_bucket_size else 0,
            "sub_group_size": zero.sub_group_size,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    else:
        content |= {"allgather_partitions": True, "allgather_bucket_size": zero.allgather_bucket_size}
    if zero.secondary_shard > 1:
        content["zero_hpz_partition_size"] = zero.secondary_shard
    if zero.quantized_weights:
        content["zero_quantized_weights"] = True
    if zero.quantized_gradients:
        content["zero_quantized_gradients"] = True
    return content | _offload(plan, zero)


def _offload(plan: Plan, zero: Zero) -> dict[str, Any]:
    """Return the sections for offloading: what leaves the device, and where it goes."""
    if plan.offload == "none":
        return {}
    to_files = plan.offload_to != "cpu"
    place: dict[str, Any] = (
        {"device": "nvme", "nvme_path": plan.offload_to} if to_files else {"device": "cpu"}
    )
    # Pinned memory is for copies to and from a GPU; without a GPU it cannot be allocated.
    place["pin_memory"] = plan.mesh.device == "cuda"
    content = {"offload_optimizer": {**place, **({"buffer_count": _ADAM_TENSORS} if to_files else {})}}
    if plan.offload == "parameters":
        # A buffer holds one rank's shard of one parameter.
        size = -(-(zero.largest_parameter or zero.max_live_parameters) // plan.mesh.world_size)
        buffers = {"buffer_count": _PARAMETER_BUFFERS, "buffer_size": size, "max_in_cpu": 0}
        content["offload_param"] = {**place, **(buffers if to_files else {})}
    return content
