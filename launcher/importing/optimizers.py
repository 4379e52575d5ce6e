"""Optimizers and schedules by the names that DeepSpeed and the Trainer give them."""

from __future__ import annotations

from typing import Any

from launcher.importing.reading import Reading

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-sqrt",
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
_NEAREST_SCHEDULE = {"cosine_with_restarts": "cosine", "polynomial": "linear", "OneCycle": "cosine", "LRRangeTest": "linear"}
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused", "adamw")


def schedule(name: str, said: str, reading: Reading) -> None:
    """Say a schedule, or the nearest there is."""
    found = _SCHEDULES.get(name)
    if found is None:
        found = _NEAREST_SCHEDULE.get(name, "linear")
        reading.remark("cannot be said", said, name, f"launcher has linear, cosine, constant and inverse-sqrt; taken: {found}")
    reading.say("training.schedule", found, said)


def trainer_optimizer(name: str, said: str, reading: Reading) -> None:
    """Say the Trainer's `optim`, or the nearest there is."""
    if name in _ADAMW or name == "sgd":
        reading.say("training.optimizer", "sgd" if name == "sgd" else "adamw", said)
        return
    reading.remark("cannot be said", said, name, "launcher has adamw, adam and sgd with fp32 states; taken: adamw")
    reading.say("training.optimizer", "adamw", said)


def deepspeed(content: dict[str, Any], reading: Reading) -> None:
    """Say what the optimizer and scheduler sections of a DeepSpeed file say."""
    optimizer, scheduler = reading.section(content, "optimizer"), reading.section(content, "scheduler")
    params = reading.section(optimizer, "params", "optimizer.")
    if optimizer:
        _deepspeed_optimizer(optimizer, params, reading)
    if scheduler:
        _deepspeed_scheduler(scheduler, reading)
    if optimizer or scheduler:
        text = "stands under training in the job file; the rendered ds_config.json has no such section, as the optimizer is handed over"
        names = ", ".join(name for name, there in (("optimizer", optimizer), ("scheduler", scheduler)) if there)
        reading.remark("changes meaning", names, "{...}", text)


def _deepspeed_optimizer(optimizer: dict[str, Any], params: dict[str, Any], reading: Reading) -> None:
    kind, prefix = reading.word(optimizer, "type", "optimizer."), "optimizer.params."
    decoupled = params.get("adam_w_mode", True) not in (False, "false")
    if kind is not None:
        name = kind.lower()
        if name in ("adam", "adamw"):
            found = "adamw" if name == "adamw" or decoupled else "adam"
            if name == "adam" and decoupled:
                reading.remark("changes meaning", "optimizer.type", kind, "DeepSpeed's Adam decays as AdamW unless adam_w_mode is false")
        else:
            found = "sgd" if name == "sgd" else "adamw"
            if name != "sgd":
                reading.remark("cannot be said", "optimizer.type", kind, "launcher has adamw, adam and sgd; taken: adamw")
        reading.say("training.optimizer", found, "optimizer.type")
    for said, key in (
        ("lr", "training.learning_rate"),
        ("weight_decay", "training.weight_decay"),
        ("eps", "training.epsilon"),
        ("momentum", "training.momentum"),
    ):
        if (value := reading.number(params, said, prefix)) is not None:
            reading.say(key, value, prefix + said)
    betas(params.get("betas"), "optimizer.params.betas", reading)


def betas(value: Any, said: str, reading: Reading) -> None:
    """Say Adam's two betas."""
    if value is None:
        return
    if value == "auto":
        reading.open.append(said)
        return
    pair = {str(index): entry for index, entry in enumerate(value)} if isinstance(value, (list, tuple)) else {}
    numbers = [reading.number(pair, index, f"{said}.") for index in pair]
    if len(numbers) != 2 or any(number is None or number >= 1 for number in numbers):
        reading.refuse(said, value, "write two numbers of at least 0 and below 1, as [0.9, 0.999]")
        return
    reading.say("training.betas", numbers, said)


def _deepspeed_scheduler(scheduler: dict[str, Any], reading: Reading) -> None:
    kind, prefix = reading.word(scheduler, "type", "scheduler."), "scheduler.params."
    params = reading.section(scheduler, "params", "scheduler.")
    if kind is not None:
        schedule(kind, "scheduler.type", reading)
    if kind in ("WarmupLR", "WarmupDecayLR") and params.get("warmup_type", "log") == "log":
        reading.remark("changes meaning", "scheduler.params.warmup_type", "log", "launcher warms up in a straight line")
    if (steps := reading.count(params, "warmup_num_steps", prefix, 0)) is not None:
        reading.say("training.warmup", steps, prefix + "warmup_num_steps")
    if (steps := reading.count(params, "total_num_steps", prefix)) is not None:
        reading.say("training.max_steps", steps, prefix + "total_num_steps")
    if rate := reading.number(params, "warmup_max_lr", prefix):
        reading.say("training.learning_rate", rate, prefix + "warmup_max_lr")
    if least := reading.number(params, "warmup_min_lr", prefix):
        reading.remark("cannot be said", prefix + "warmup_min_lr", least, "launcher warms up from 0")
