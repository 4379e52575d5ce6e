"""The Trainer's arguments for how it runs: precision, saving, engine."""

from __future__ import annotations

from typing import Any

from launcher.importing import accelerate
from launcher.importing.reading import Reading, brief


def precision(content: dict[str, Any], reading: Reading) -> None:
    """Record the precision, the activation checkpointing and the device."""
    bf16, fp16 = (
        None if content.get(key) == "auto" else reading.flag(content, key) for key in ("bf16", "fp16")
    )
    for option in ("bf16", "fp16"):
        if content.get(option) == "auto":
            reading.choose(
                option, "auto", "precision, decided by `launcher plan` where no other file says it"
            )
    if bf16 and fp16:
        reason = "bf16 is true too, and a model computes in one; the Trainer refuses it as well"
        reading.refuse("fp16", True, reason)
    elif bf16 or fp16:
        reading.record("precision", "bf16" if bf16 else "fp16", "bf16" if bf16 else "fp16")
    _kept_in(content, reading)
    if bf16 is False and not fp16:
        reading.record_once("precision", "fp32", "bf16, fp16: neither is true")
    for option in ("gradient_checkpointing", "activation_checkpointing"):
        if (recomputes := reading.flag(content, option)) is not None:
            reading.record("activation_checkpointing", "full" if recomputes else "none", option)
    if reading.flag(content, "torch_compile"):
        reading.record("model.compile", True, "torch_compile")
        reading.change("torch_compile", True, "launcher compiles each repeated layer by itself")
    if reading.flag(content, "use_cpu") or reading.flag(content, "no_cuda"):
        reading.record("mesh.device", "cpu", "use_cpu" if "use_cpu" in content else "no_cuda")


def _kept_in(content: dict[str, Any], reading: Reading) -> None:
    """Remark on the dtype of the weights: launcher keeps trainable weights in fp32, and frozen ones in the
    plan's precision."""
    for option in ("torch_dtype", "dtype"):
        kept = (reading.word(content, option) or "auto").rpartition(".")[2]
        if kept in ("auto", "float32"):
            continue
        short = {"bfloat16": "bf16", "float16": "fp16"}.get(kept)
        if short is not None:
            reading.record_once("precision", short, option)
        if short is not None and any(fact.key.startswith("model.adapter.") for fact in reading.facts):
            text = "beside an adapter the model is kept in the plan's precision in any case"
            reading.ignore(option, kept, text)
        else:
            text = (
                "the weights themselves are kept and updated in it there; launcher keeps what trains in "
                "fp32, and computes in precision"
            )
            reading.cannot_say(option, kept, text)


def saving(content: dict[str, Any], reading: Reading) -> None:
    """Record the intervals of saving and evaluation, and the metric that selects the best checkpoint."""
    evaluation = "eval_strategy" if "eval_strategy" in content else "evaluation_strategy"
    for strategy, steps, key in (
        ("save_strategy", "save_steps", "checkpoint.every"),
        (evaluation, "eval_steps", "evaluate_every"),
    ):
        way = (reading.word(content, strategy) or "").rpartition(".")[2].lower()
        number = reading.number(content, steps)
        if way == "epoch":
            reading.record(key, "epoch", strategy)
        elif number is not None and (way in ("steps", "") and (way or strategy == "save_strategy")):
            if number < 1:
                text = "a share of all steps; launcher takes steps, a time or epochs: left out"
                reading.change(steps, number, text)
            else:
                reading.record(key, int(number), steps)
        elif way in ("no", "false") and strategy == "save_strategy":
            text = "launcher saves at the end in any case, and every 15 minutes unless told"
            reading.change(strategy, "no", text)
    if reading.flag(content, "load_best_model_at_end"):
        reading.record("checkpoint.keep_best", 1, "load_best_model_at_end")
        metric = (reading.word(content, "metric_for_best_model") or "loss").removeprefix("eval_")
        reading.record("checkpoint.metric", metric, "metric_for_best_model")
        text = (
            "the best checkpoint is kept beside the last ones; `launcher export --checkpoint STEP` takes it"
        )
        reading.change("load_best_model_at_end", True, text)


def engine(content: dict[str, Any], reading: Reading) -> None:
    """Record the settings for DeepSpeed and FSDP."""
    deepspeed = content.get("deepspeed") or content.get("deepspeed_config")
    if isinstance(deepspeed, str) and deepspeed:
        reading.follow.append(deepspeed)
    elif isinstance(deepspeed, dict):
        from launcher.importing import deepspeed_config as reader

        reader.read({str(key): value for key, value in deepspeed.items()}, reading)
    fsdp = content.get("fsdp")
    if fsdp in (None, "", [], False, "false"):
        return
    words = [
        str(word) for entry in (fsdp if isinstance(fsdp, list) else [fsdp]) for word in brief(entry).split()
    ]
    config = content.get("fsdp_config")
    if isinstance(config, str):
        text = "a file of its own kind; write its keys into the arguments' JSON instead"
        reading.cannot_say("fsdp_config", config, text)
    settings = {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
    for word in words:
        if word.upper() in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"):
            settings["fsdp_sharding_strategy"] = word.upper()
        elif word == "offload":
            settings["fsdp_offload_params"] = True
        elif word not in ("auto_wrap", "True", "true"):
            reason = "write full_shard, shard_grad_op, no_shard, hybrid_shard, offload or auto_wrap"
            reading.refuse("fsdp", word, reason)
    accelerate.read({"distributed_type": "FSDP", "fsdp_config": settings}, reading, has_own_precision=True)
