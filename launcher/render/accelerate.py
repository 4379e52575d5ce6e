"""The rendering of accelerate.yaml, for FSDP2 or DeepSpeed."""

from __future__ import annotations

from typing import Any

from launcher.planner.plan import Plan

PORT = 29500
"""The port on which several machines must agree; a single machine uses a free one."""


def config(plan: Plan, deepspeed_file: str = "ds_config.json") -> dict[str, Any]:
    """Return the content of accelerate.yaml; `deepspeed_file` is the ranks' path of ds_config.json.

    With DeepSpeed there is no `mixed_precision`: ds_config.json has it, and Accelerate refuses it in both
    files.
    """
    mesh = plan.mesh
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": distributed_type(plan),
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_process_port": 0 if mesh.nodes == 1 else PORT,
        "main_training_function": "main",
        "num_machines": mesh.nodes,
        "num_processes": mesh.world_size,
        "rdzv_backend": "static" if mesh.nodes == 1 else "c10d",
        "same_network": True,
        "use_cpu": mesh.device == "cpu",
    }
    if content["distributed_type"] == "DEEPSPEED":
        assert plan.zero is not None
        content["deepspeed_config"] = {
            "deepspeed_config_file": deepspeed_file,
            "zero3_init_flag": plan.zero.stage == 3,
        }
        if mesh.nodes > 1:
            content["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
        return content
    content["mixed_precision"] = "no" if plan.precision == "fp32" else plan.precision
    if plan.model.compile:
        content["dynamo_config"] = {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}
    if content["distributed_type"] == "FSDP":
        content["fsdp_config"] = _fsdp(plan)
        if mesh.dp_replicate > 1:
            content["parallelism_config"] = {
                "parallelism_config_dp_replicate_size": mesh.dp_replicate,
                "parallelism_config_dp_shard_size": mesh.dp_shard,
                "parallelism_config_tp_size": 1,
                "parallelism_config_cp_size": 1,
            }
    return content


def distributed_type(plan: Plan) -> str:
    """Return Accelerate's `distributed_type`. Accelerate has FSDP only on GPUs: on CPUs its ranks hold the full
    model."""
    if plan.engine == "deepspeed":
        return "DEEPSPEED"
    if plan.mesh.world_size == 1 and plan.sharding == "none":
        return "NO"
    if plan.mesh.device == "cpu":
        return "MULTI_CPU"
    return "FSDP" if plan.sharding != "none" else "MULTI_GPU"


def _fsdp(plan: Plan) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": plan.mesh.reshard_after_forward,
        "fsdp_offload_params": plan.offload == "parameters",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": plan.activation_checkpointing != "none",
    }
