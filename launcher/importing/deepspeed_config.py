"""DeepSpeed's configuration: the keys that a plan has, and remarks on the others."""

from __future__ import annotations

from typing import Any

from launcher.importing import optimizers
from launcher.importing.defaults import DEEPSPEED_CLIPPING
from launcher.importing.reading import Reading, as_number, brief

_STAGES = {0: "none", 1: "optimizer", 2: "gradients", 3: "full"}
_SIZES = {
    "reduce_bucket_size": "zero.reduce_bucket_size",
    "allgather_bucket_size": "zero.allgather_bucket_size",
    "stage3_prefetch_bucket_size": "zero.prefetch_bucket_size",
    "stage3_param_persistence_threshold": "zero.persistence_threshold",
    "stage3_max_live_parameters": "zero.max_live_parameters",
    "sub_group_size": "zero.sub_group_size",
}
_BATCH = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.accumulation_steps",
}
_QUANTISED = {
    "zero_quantized_weights": "zero.quantized_weights",
    "zero_quantized_gradients": "zero.quantized_gradients",
}
MARKS = {
    "zero_optimization", "zero_allow_untested_optimizer", "train_batch_size", "train_micro_batch_size_per_gpu",
}  # fmt: skip
_REPORTS = (
    "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comms_logger", "comet", "log_level", "monitor_config",
)  # fmt: skip
_ALWAYS = (
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "allgather_partitions",
    "reduce_scatter", "overlap_comm", "contiguous_gradients", "round_robin_gradients",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "memory_efficient_linear", "load_from_fp32_weights",
    "elastic_checkpoint", "ignore_unused_parameters",
)  # fmt: skip
_KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "bfloat16", "fp16", "data_types", "communication_data_type",
    "seq_parallel_communication_data_type", "zero_optimization", "optimizer", "scheduler",
}  # fmt: skip
_ZERO_KNOWN = {
    "stage", "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params", "cpu_offload_param",
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
}  # fmt: skip


def read(content: dict[str, Any], reading: Reading) -> None:
    """Record the facts of a DeepSpeed JSON."""
    reading.record("engine", "deepspeed", "(a DeepSpeed file)")
    reading.take(content, _BATCH, Reading.count)
    if (clip := reading.number(content, "gradient_clipping")) is not None:
        reading.record("training.clip_norm", clip, "gradient_clipping")
    elif "gradient_clipping" not in content:
        # With DeepSpeed neither Accelerate nor the Trainer clips gradients, so max_grad_norm has no effect.
        reading.default("training.clip_norm", DEEPSPEED_CLIPPING, "gradient_clipping")
        text = (
            "left out there: DeepSpeed 0.19.8 then clips at this norm; older versions clipped nothing, "
            "which is training.clip_norm: 0"
        )
        reading.remark("default", "gradient_clipping", DEEPSPEED_CLIPPING, text)
    _precision(content, reading)
    _zero(reading.section(content, "zero_optimization"), "zero_optimization" in content, reading)
    optimizers.deepspeed(content, reading)
    _rest(content, "", _KNOWN, reading)


def _precision(content: dict[str, Any], reading: Reading) -> None:
    bf16_key = "bf16" if "bf16" in content else "bfloat16"
    bf16 = reading.section(content, bf16_key)
    fp16 = reading.section(content, "fp16")
    is_bf16, is_fp16 = reading.flag(bf16, "enabled", f"{bf16_key}."), reading.flag(fp16, "enabled", "fp16.")
    if is_bf16 and is_fp16:
        reason = f"{bf16_key}.enabled is true too, and a model computes in one; DeepSpeed refuses it as well"
        reading.refuse("fp16.enabled", True, reason)
    elif is_bf16 or is_fp16:
        reading.record(
            "precision", "bf16" if is_bf16 else "fp16", f"{bf16_key}.enabled" if is_bf16 else "fp16.enabled"
        )
    elif "auto" not in (bf16.get("enabled"), fp16.get("enabled")):
        reading.record("precision", "fp32", "bf16, fp16: neither is enabled")
    if is_fp16:
        _loss_scale(fp16, reading)
    for prefix, section in (("", content), ("data_types.", reading.section(content, "data_types"))):
        for key in ("communication_data_type", "seq_parallel_communication_data_type", "grad_accum_dtype"):
            if section.get(key) not in (None, "fp32"):
                text = "gradients are reduced and added up in fp32 in any case"
                reading.change(f"{prefix}{key}", brief(section[key]), text)


def _loss_scale(fp16: dict[str, Any], reading: Reading) -> None:
    ours = {
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 2000,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }
    other = [key for key, value in ours.items() if key in fp16 and as_number(fp16[key]) != value]
    if other:
        values = ", ".join(brief(fp16[key]) for key in other)
        text = (
            "the loss scale begins at 2^16, is halved at once after an overflow and doubled after 2,000 "
            "good steps"
        )
        reading.change(", ".join(f"fp16.{key}" for key in other), values, text)


def _zero(zero: dict[str, Any], there: bool, reading: Reading) -> None:
    prefix = "zero_optimization."
    stage = reading.count(zero, "stage", prefix, 0) if "stage" in zero else 0
    if stage is None:
        return
    if stage not in _STAGES:
        reason = "ZeRO has the stages 0, 1, 2 and 3; the nearest is 3"
        reading.refuse("zero_optimization.stage", stage, reason)
        return
    option = "zero_optimization.stage" if there else "(no zero_optimization)"
    reading.record("sharding", _STAGES[stage], option)
    if stage == 0:
        text = (
            "stage 0 takes a wrong first step in half precision; ZeRO-1 runs instead, which computes the "
            "same in less memory"
        )
        reading.change(option, 0, text)
    _offload(zero, stage, reading)
    reading.take(zero, {"zero_hpz_partition_size": "zero.secondary_shard"}, Reading.count, prefix)
    reading.take(zero, _QUANTISED, Reading.flag, prefix)
    reading.take(zero, _SIZES, Reading.size, prefix)
    if given := [key for key in _SIZES if key in zero]:
        text = "no key of the job file: `launcher plan` chooses these sizes from the model, and says why"
        values = ", ".join(brief(zero[key]) for key in given)
        reading.choose(", ".join(prefix + key for key in given), values, text)
    _rest(zero, prefix, _ZERO_KNOWN | _SIZES.keys(), reading)


def _offload(zero: dict[str, Any], stage: int, reading: Reading) -> None:
    """Record both offload sections as one value and one place."""
    devices: dict[str, str] = {}
    paths: dict[str, str] = {}
    for key, old in (("offload_optimizer", "cpu_offload"), ("offload_param", "cpu_offload_params")):
        prefix = f"zero_optimization.{key}."
        section = reading.section(zero, key, "zero_optimization.")
        device = reading.word(section, "device", prefix) or "none"
        if reading.flag(zero, old, "zero_optimization."):
            device = "cpu"
            reading.change(f"zero_optimization.{old}", True, f"an old name of {key}.device: cpu")
        if device not in ("none", "cpu", "nvme"):
            reading.refuse(prefix + "device", device, "write none, cpu or nvme")
            continue
        path = reading.word(section, "nvme_path", prefix)
        if device == "nvme" and path is None:
            reading.refuse(prefix + "nvme_path", None, "is missing, and the device is nvme: name a directory")
            continue
        devices[key], paths[key] = device, (path or "") if device == "nvme" else device
        text = "chosen by the renderer: pinned memory where there are GPUs, buffers from the model"
        reading.ignore_all(
            section, (name for name in section if name not in ("device", "nvme_path")), text, prefix
        )
    _place(devices, paths, stage, reading)


def _place(devices: dict[str, str], paths: dict[str, str], stage: int, reading: Reading) -> None:
    optimizer, parameters = devices.get("offload_optimizer", "none"), devices.get("offload_param", "none")
    key = "zero_optimization.offload_param"
    if parameters != "none" and stage < 3:
        text = f"only stage 3 offloads parameters, and this is stage {stage}"
        reading.ignore(f"{key}.device", parameters, text)
        parameters = "none"
    if parameters != "none" and optimizer == "none":
        text = "offloading parameters, launcher offloads the optimizer state too"
        reading.change(f"{key}.device", parameters, text)
    if "none" not in (parameters, optimizer) and paths["offload_optimizer"] != paths["offload_param"]:
        text = (
            f"the optimizer state goes to {paths['offload_optimizer']}; launcher has one place for both, "
            "and takes this one"
        )
        reading.cannot_say(key, paths["offload_param"], text)
    offload = "parameters" if parameters != "none" else "optimizer" if optimizer != "none" else "none"
    reading.record("offload", offload, "zero_optimization.offload_*")
    if offload != "none":
        reading.record(
            "offload_to",
            paths["offload_param" if offload == "parameters" else "offload_optimizer"],
            "zero_optimization.offload_*",
        )


def _rest(content: dict[str, Any], prefix: str, known: set[str], reading: Reading) -> None:
    """Remark on the keys that a plan lacks: reports, fixed behaviour, and features that launcher lacks."""
    rest = [key for key in content if key not in known]
    text = "a report, which changes nothing of what is computed"
    reading.ignore_all(content, (key for key in rest if key in _REPORTS), text, prefix)
    reading.ignore_all(content, (key for key in rest if key in _ALWAYS), "chosen by the renderer", prefix)
    for key in rest:
        if key not in _REPORTS and key not in _ALWAYS:
            reading.cannot_say(prefix + key, brief(content[key]), "launcher has no key for it; left out")
