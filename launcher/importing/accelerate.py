"""Accelerate's configuration, as `accelerate config` or `launcher render` writes it, read as facts of a plan."""

from __future__ import annotations

from typing import Any

from launcher.importing.defaults import ACCELERATE
from launcher.importing.reading import Reading, brief

_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""FSDP1's names of its strategies; as numbers they count from 1."""
_SHARDING = {
    "FULL_SHARD": "full",
    "HYBRID_SHARD": "full",
    "SHARD_GRAD_OP": "gradients",
    "HYBRID_SHARD_ZERO2": "gradients",
}
_COPIES = (
    "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU", "MULTI_SDAA", "MULTI_MUSA",
    "MULTI_NEURON",
)  # fmt: skip
_PLACE = (
    "compute_environment", "debug", "machine_rank", "main_process_ip", "main_process_port",
    "main_training_function", "rdzv_backend", "same_network", "gpu_ids", "enable_cpu_affinity",
    "downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env",
    "command_file", "commands", "mpirun_config",
)  # fmt: skip
_KNOWN = {
    "distributed_type", "mixed_precision", "num_machines", "num_processes", "use_cpu", "fsdp_config",
    "deepspeed_config", "parallelism_config", "dynamo_config",
}  # fmt: skip
MARKS = {"distributed_type", "compute_environment", "fsdp_config", "deepspeed_config", "num_machines"}
_FSDP_ALWAYS = {
    "state_dict_type": "launcher's checkpoints are always sharded; `launcher export` writes whole ones",
    "cpu_ram_efficient_loading": "each rank reads its own shard of the weights",
    "transformer_layer_cls_to_wrap": "the repeated layers are found in the model",
    "backward_prefetch": "FSDP2 has no such key, and prefetches by itself",
    "forward_prefetch": "FSDP2 has no such key",
    "use_orig_params": "FSDP2 always does",
    "sync_module_states": "FSDP2 has no such key; each rank reads the weights",
    "min_num_params": "the repeated layers are the units",
}


def read(content: dict[str, Any], reading: Reading, has_own_precision: bool = False) -> None:
    """Record the facts of an Accelerate YAML. `has_own_precision`: it is part of a file whose own keys set the
    precision."""
    kind = (reading.word(content, "distributed_type") or "NO").upper()
    if brief(content.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        value = content["compute_environment"]
        text = "launcher runs on machines of its own or under Slurm"
        reading.cannot_say("compute_environment", brief(value), text)
    _engine(kind, content, reading)
    places(content, reading, kind)
    if not has_own_precision:
        ACCELERATE.apply(reading)


def places(content: dict[str, Any], reading: Reading, kind: str = "") -> None:
    """Record everything but the engine: precision, ranks, compilation, and the keys that do not affect the
    plan."""
    _precision(content, reading)
    _mesh(kind, content, reading)
    dynamo = reading.section(content, "dynamo_config")
    backend = brief(dynamo.get("dynamo_backend", dynamo.get("backend", "NO"))).upper()
    if backend != "NO":
        reading.record("model.compile", True, "dynamo_config.dynamo_backend")
        text = "launcher compiles each repeated layer by itself, with inductor"
        reading.change("dynamo_config", backend, text)
    _rest(content, reading)


def _engine(kind: str, content: dict[str, Any], reading: Reading) -> None:
    fsdp, deepspeed = reading.section(content, "fsdp_config"), reading.section(content, "deepspeed_config")
    if kind == "DEEPSPEED":
        _deepspeed(deepspeed, reading)
    elif kind == "FSDP":
        _fsdp(fsdp, content, reading)
    elif kind in (*_COPIES, "NO"):
        reading.record("engine", "fsdp", "distributed_type")
        reading.record("sharding", "none", "distributed_type")
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            reading.cannot_say("distributed_type", kind, "launcher knows NVIDIA GPUs and CPUs; taken as GPUs")
    else:
        words = "NO, MULTI_GPU, MULTI_CPU, FSDP and DEEPSPEED"
        text = f"launcher reads {words}; the engine is left to `launcher plan`"
        reading.cannot_say("distributed_type", kind, text)
    for name, used, section in (
        ("fsdp_config", kind == "FSDP", fsdp),
        ("deepspeed_config", kind == "DEEPSPEED", deepspeed),
    ):
        if section and not used:
            reading.ignore(name, "{...}", f"Accelerate does not read it with distributed_type: {kind}")


def _fsdp(fsdp: dict[str, Any], content: dict[str, Any], reading: Reading) -> None:
    """Record the keys of FSDP1 and FSDP2; the prefix `fsdp_` may be left out."""
    fsdp = {key.removeprefix("fsdp_"): value for key, value in fsdp.items()}
    prefix = "fsdp_config.fsdp_"
    is_second = isinstance(fsdp.get("reshard_after_forward"), bool)  # only FSDP2 takes true or false there
    version = reading.count(fsdp, "version", prefix) or (2 if is_second else 1)
    if version > 2:
        reading.refuse(f"{prefix}version", version, "write 1 or 2")
    reading.record("engine", "fsdp", "distributed_type")
    if version == 1:
        text = "launcher has FSDP2: the same is cut, parameter by parameter"
        reading.change(f"{prefix}version", version, text)
    _sharding(fsdp, version, content, reading)
    if (offloads := reading.flag(fsdp, "offload_params", prefix)) is not None:
        reading.record("offload", "parameters" if offloads else "none", f"{prefix}offload_params")
    if (recomputes := reading.flag(fsdp, "activation_checkpointing", prefix)) is not None:
        reading.record(
            "activation_checkpointing", "full" if recomputes else "none", f"{prefix}activation_checkpointing"
        )
    policy = (reading.word(fsdp, "auto_wrap_policy", prefix) or "TRANSFORMER_BASED_WRAP").upper()
    if policy != "TRANSFORMER_BASED_WRAP":
        text = "the repeated layers are units of their own in any case"
        reading.change(f"{prefix}auto_wrap_policy", policy, text)
    known = {
        "version", "offload_params", "activation_checkpointing", "auto_wrap_policy", "sharding_strategy",
        "reshard_after_forward",
    }  # fmt: skip
    for key, value in fsdp.items():
        if key in _FSDP_ALWAYS:
            reading.ignore(prefix + key, brief(value), _FSDP_ALWAYS[key])
        elif key not in known and value not in (None, False, "false"):
            reading.cannot_say(prefix + key, brief(value), "launcher has no key for it; left out")


def _sharding(fsdp: dict[str, Any], version: int, content: dict[str, Any], reading: Reading) -> None:
    prefix = "fsdp_config.fsdp_"
    if version == 2:
        if "sharding_strategy" in fsdp:
            text = "Accelerate does not read it with FSDP2; fsdp_reshard_after_forward says it"
            reading.ignore(f"{prefix}sharding_strategy", brief(fsdp["sharding_strategy"]), text)
        reshards = reading.flag(fsdp, "reshard_after_forward", prefix)
        option = f"{prefix}reshard_after_forward" if reshards is not None else "(FSDP2 reshards by default)"
        reading.record("sharding", "gradients" if reshards is False else "full", option)
        return
    key = "sharding_strategy" if "sharding_strategy" in fsdp else "reshard_after_forward"
    value = (reading.word(fsdp, key, prefix) or "FULL_SHARD").upper()
    if value.isdigit() and 1 <= int(value) <= len(_STRATEGIES):
        name = _STRATEGIES[int(value) - 1]
        reading.change(prefix + key, value, f"the number of {name}")
        value = name
    if value in ("NO_SHARD", "NO_RESHARD"):
        reading.record("sharding", "none" if value == "NO_SHARD" else "gradients", prefix + key)
    elif value not in _SHARDING:
        reading.refuse(prefix + key, value, f"write one of {', '.join(_STRATEGIES)}")
    else:
        reading.record("sharding", _SHARDING[value], prefix + key)
    if value.startswith("HYBRID"):
        nodes = reading.count(content, "num_machines") or 1
        reading.record("mesh.dp_replicate", nodes, prefix + key)
        reading.change(prefix + key, value, f"a copy on each node, as parallel.replicate: {nodes}")


def _deepspeed(section: dict[str, Any], reading: Reading) -> None:
    prefix = "deepspeed_config."
    reading.record("engine", "deepspeed", "distributed_type")
    file = reading.word(section, "deepspeed_config_file", prefix)
    if file is not None:
        reading.follow.append(file)
        text = "Accelerate refuses these beside deepspeed_config_file; the DeepSpeed file says them"
        reading.ignore_all(section, (key for key in section if key in _DEEPSPEED_INLINE), text, prefix)
    else:
        _deepspeed_inline(section, reading)
    always = [key for key in section if key not in (*_DEEPSPEED_INLINE, "deepspeed_config_file")]
    text = "how Accelerate starts and saves; launcher loads in shards and exports by itself"
    reading.ignore_all(section, always, text, prefix)


_DEEPSPEED_INLINE = (
    "zero_stage", "gradient_accumulation_steps", "gradient_clipping", "offload_optimizer_device",
    "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path",
)  # fmt: skip


def _deepspeed_inline(section: dict[str, Any], reading: Reading) -> None:
    """Record the few keys from which Accelerate makes a DeepSpeed configuration if there is no file."""
    from launcher.importing import deepspeed_config

    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
    for part in ("optimizer", "param"):
        device = section.get(f"offload_{part}_device")
        if device is not None:
            path = section.get(f"offload_{part}_nvme_path")
            zero[f"offload_{part}"] = {
                "device": device,
                **({} if path in (None, "none") else {"nvme_path": path}),
            }
    keys = ("gradient_accumulation_steps", "gradient_clipping")
    # Accelerate's own DeepSpeed configuration has `auto` for keys that are left out, and clips at 1, or at the
    # Trainer's value.
    config = {
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        **{key: section[key] for key in keys if section.get(key) is not None},
    }
    inner = Reading(reading.source)
    deepspeed_config.read(config, inner)
    reading.facts += [fact for fact in inner.facts if fact.key != "engine"]
    reading.remarks += [remark for remark in inner.remarks if remark.said != "bf16.enabled"]
    reading.problems += inner.problems


def _precision(content: dict[str, Any], reading: Reading) -> None:
    value = content.get("mixed_precision")
    if value is None:
        return
    word = "no" if value is False else brief(value).lower()
    if word == "fp8":
        reading.cannot_say("mixed_precision", word, "launcher computes in bf16, fp16 or fp32; taken: bf16")
    elif word not in ("no", "fp16", "bf16"):
        reading.refuse("mixed_precision", value, "write no, fp16 or bf16")
        return
    reading.record("precision", {"no": "fp32", "fp8": "bf16"}.get(word, word), "mixed_precision")


def _mesh(kind: str, content: dict[str, Any], reading: Reading) -> None:
    reading.take(content, {"num_machines": "mesh.nodes"}, Reading.count)
    if content.get("num_processes") != -1:
        reading.take(content, {"num_processes": "mesh.world_size"}, Reading.count)
    on_cpu = reading.flag(content, "use_cpu")
    if on_cpu or kind == "MULTI_CPU":
        reading.record("mesh.device", "cpu", "use_cpu" if on_cpu else "distributed_type")
    elif on_cpu is False or kind in ("FSDP", "MULTI_GPU"):
        reading.record("mesh.device", "cuda", "use_cpu" if on_cpu is False else "distributed_type")
    parallel = {
        key.removeprefix("parallelism_config_"): value
        for key, value in reading.section(content, "parallelism_config").items()
    }
    prefix = "parallelism_config."
    if (copies := reading.count(parallel, "dp_replicate_size", prefix) or 1) > 1:
        reading.record("mesh.dp_replicate", copies, prefix + "dp_replicate_size")
    for key, name in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        if (reading.count(parallel, key, prefix) or 1) > 1:
            text = (
                f"launcher has no {name} parallelism; these ranks cut parameters instead, and each has its "
                "own samples"
            )
            reading.cannot_say(prefix + key, parallel[key], text)


def _rest(content: dict[str, Any], reading: Reading) -> None:
    place = (key for key in content if key in _PLACE and content[key] not in (None, [], {}))
    text = "where and how Accelerate starts processes; launcher finds its own ports, and Slurm's nodes"
    reading.ignore_all(content, place, text)
    for key, value in content.items():
        if key not in _KNOWN and key not in _PLACE and value not in (None, {}, []):
            text = "no key of Accelerate's that launcher knows; left out"
            reading.cannot_say(key, brief(value), text)
