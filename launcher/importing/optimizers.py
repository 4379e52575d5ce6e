"""Optimizers and schedules under the names of DeepSpeed and the Trainer."""

from __future__ import annotations

from typing import Any, get_args

from launcher.importing.defaults import DEEPSPEED
from launcher.importing.reading import Reading, as_number, brief
from launcher.job.training import Schedules

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine",
    "polynomial": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-sqrt",
    "warmup_stable_decay": "warmup-stable-decay",
}
"""The schedules that transformers and launcher compute in the same way, with the keyword arguments of
`_NEUTRAL`."""
_NEUTRAL: dict[str, dict[str, float]] = {
    "cosine": {"num_cycles": 0.5},
    "cosine_with_min_lr": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 1},
    "polynomial": {"power": 1},
    "warmup_stable_decay": {"num_cycles": 0.5},
}
"""transformers, optimization.py: the defaults at which a schedule has no turn that launcher's lacks."""
_NEAREST_SCHEDULE = {
    "cosine_warmup_with_min_lr": "cosine",
    "reduce_lr_on_plateau": "constant",
    "greedy": "constant",
    "rex": "cosine",
}
_POLYNOMIAL_END = 1e-07
"""transformers, get_polynomial_decay_schedule_with_warmup: lr_end."""
_DEEPSPEED_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_NEAREST_DEEPSPEED_SCHEDULE = {"OneCycle": "cosine", "LRRangeTest": "linear"}
_ADAMW = (
    "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_torch_npu_fused",
    "adamw_apex_fused", "adamw", "paged_adamw_32bit", "paged_adamw",
)  # fmt: skip
"""The names of AdamW with fp32 states, wherever these are computed or stored."""
_OF_BYTES = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit")
"""The names of AdamW with 8-bit states: torchao's, and those of bitsandbytes."""


def trainer_schedule(name: str, options: dict[str, Any], said: str, reading: Reading) -> None:
    """Record a schedule of the Trainer with its keyword arguments, or the nearest that launcher has."""
    schedule = _SCHEDULES.get(name)
    if schedule is None:
        schedule = _NEAREST_SCHEDULE.get(name, "linear")
        text = f"launcher has {', '.join(get_args(Schedules))}; taken: {schedule}"
        reading.cannot_say(said, name, text)
    options = dict(options)
    rate = reading.value_of("training.learning_rate")
    least, share = as_number(options.pop("min_lr", None)), as_number(options.pop("min_lr_rate", None))
    if name == "polynomial":
        least = as_number(options.pop("lr_end", _POLYNOMIAL_END))
    if share is not None and rate is not None:
        least = share * rate
    if least is not None:
        reading.record(
            "training.minimum_learning_rate", least, "lr_scheduler_kwargs" if name != "polynomial" else said
        )
    elif share is not None:
        text = "a share of the learning rate: write training.minimum_learning_rate"
        reading.fill_in("lr_scheduler_kwargs", share, text)
    schedule = _shaped(name, schedule, options, reading)
    for key, value in options.items():
        neutral = _NEUTRAL.get(name, {})
        if value is not None and (key not in neutral or as_number(value) != neutral[key]):
            text = f"launcher's {schedule} has no such key; left out"
            reading.cannot_say(f"lr_scheduler_kwargs.{key}", brief(value), text)
    if name == "constant" and reading.value_of("training.warmup"):
        reading.facts = [fact for fact in reading.facts if fact.key != "training.warmup"]
        reading.ignore("warmup_steps, warmup_ratio", None, "the Trainer's `constant` does not warm up")
        reading.record("training.warmup", 0.0, said)
    reading.record("training.schedule", schedule, said)


def _shaped(name: str, schedule: str, options: dict[str, Any], reading: Reading) -> str:
    """Record and remove the keyword arguments for which launcher's schedule has a key; return that schedule."""
    cycles, power = as_number(options.get("num_cycles")), as_number(options.get("power"))
    if name == "cosine_with_restarts" and cycles is not None and cycles > 1 and cycles == int(cycles):
        del options["num_cycles"]
        reading.record("training.restarts", int(cycles), "lr_scheduler_kwargs.num_cycles")
        return "cosine-restarts"
    if name == "polynomial" and power not in (None, 1) and power > 0:
        del options["power"]
        reading.record("training.power", power, "lr_scheduler_kwargs.power")
        return "polynomial"
    if name == "warmup_stable_decay":
        return _stable(schedule, options, reading)
    return schedule


def _stable(schedule: str, options: dict[str, Any], reading: Reading) -> str:
    """Record the decay of a schedule with a stable phase; transformers leaves its length to the user."""
    keyword = "lr_scheduler_kwargs"
    steps = as_number(options.pop("num_decay_steps", None))
    if steps is not None and steps >= 1:
        reading.record("training.decay", float(steps), f"{keyword}.num_decay_steps")
    else:
        reading.fill_in(f"{keyword}.num_decay_steps", steps, "the steps of the fall: write training.decay")
    shape = options.pop("decay_type", "cosine")  # transformers, get_wsd_schedule
    if shape in ("linear", "cosine", "1-sqrt"):
        reading.record("training.decay_shape", shape, f"{keyword}.decay_type")
    else:
        reading.cannot_say(
            f"{keyword}.decay_type", brief(shape), "launcher falls as linear, cosine or 1-sqrt"
        )
    if options.get("warmup_type") == "linear":
        del options["warmup_type"]
    rate, ratio = reading.value_of("training.learning_rate"), as_number(options.pop("min_lr_ratio", None))
    if ratio and rate is not None:
        reading.record("training.minimum_learning_rate", ratio * rate, f"{keyword}.min_lr_ratio")
    elif ratio:
        reading.fill_in(
            f"{keyword}.min_lr_ratio", ratio, "a share of the learning rate: training.minimum_learning_rate"
        )
    return schedule


def warmup(reading: Reading) -> None:
    """Remark on how a warm-up differs, if there is one."""
    fact = next((fact for fact in reading.facts if fact.key == "training.warmup"), None)
    if fact is not None and fact.value:
        text = (
            "taken over; of W steps of warm-up step k (from 0) has k/W of the learning rate there and "
            "(k + 1)/W here; every later step has the same"
        )
        reading.change(fact.said, fact.value, text)


def trainer_optimizer(name: str, said: str, reading: Reading) -> None:
    """Record the Trainer's `optim`, or the nearest that launcher has. The Trainer's SGD has no momentum."""
    if name == "sgd":
        reading.record("training.optimizer", "sgd", said)
        reading.record("training.momentum", 0.0, said)
        return
    if name == "adafactor":
        reading.record("training.optimizer", "adafactor", said)
        return
    if name in _OF_BYTES:
        reading.record("training.moments", "8bit", said)
        text = "training.moments: 8bit: blocks of 256 end with a row, and second moments stay above 0"
        if name != "adamw_torch_8bit":
            text += (
                "; the Trainer keeps embeddings in fp32 with bitsandbytes, launcher has them in 8 bits too"
            )
        reading.change(said, name, text)
    elif name not in _ADAMW:
        text = (
            "launcher has adamw with moments in fp32, bf16 and 8bit, adam, sgd, muon, adafactor; taken: adamw"
        )
        reading.cannot_say(said, name, text)
    reading.record("training.optimizer", "adamw", said)


def deepspeed(content: dict[str, Any], reading: Reading) -> None:
    """Record the optimizer and scheduler sections of a DeepSpeed file, with defaults for missing keys."""
    optimizer, scheduler = reading.section(content, "optimizer"), reading.section(content, "scheduler")
    params = reading.section(optimizer, "params", "optimizer.")
    if optimizer:
        _deepspeed_optimizer(optimizer, params, reading)
    if scheduler:
        _deepspeed_scheduler(scheduler, reading)
    if optimizer:
        DEEPSPEED.apply(reading)
    if optimizer or scheduler:
        text = (
            "stands under training in the job file; the rendered ds_config.json has no such section, as "
            "the optimizer is handed over"
        )
        names = ", ".join(
            name for name, there in (("optimizer", optimizer), ("scheduler", scheduler)) if there
        )
        reading.change(names, "{...}", text)


def _deepspeed_optimizer(optimizer: dict[str, Any], params: dict[str, Any], reading: Reading) -> None:
    kind, prefix = reading.word(optimizer, "type", "optimizer."), "optimizer.params."
    decoupled = params.get("adam_w_mode", True) not in (False, "false")
    if kind is not None:
        name = kind.lower()
        if name in ("adam", "adamw"):
            taken = "adamw" if name == "adamw" or decoupled else "adam"
            if name == "adam" and decoupled:
                text = "DeepSpeed's Adam decays as AdamW unless adam_w_mode is false"
                reading.change("optimizer.type", kind, text)
        else:
            taken = "sgd" if name == "sgd" else "adamw"
            if name != "sgd":
                text = "launcher has adamw, adam, sgd, muon and adafactor; taken: adamw"
                reading.cannot_say("optimizer.type", kind, text)
        reading.record("training.optimizer", taken, "optimizer.type")
    for option, key in (
        ("lr", "training.learning_rate"),
        ("weight_decay", "training.weight_decay"),
        ("eps", "training.epsilon"),
        ("momentum", "training.momentum"),
    ):
        if (value := reading.number(params, option, prefix)) is not None:
            reading.record(key, value, prefix + option)
        elif option in params:
            reading.leave_open(key)
    if reading.value_of("training.optimizer") == "sgd":
        reading.default("training.momentum", 0.0, prefix + "momentum")  # torch.optim.SGD
    if reading.value_of("training.weight_decay"):
        text = "DeepSpeed's own optimizer decays biases and norms too; launcher decays matrices alone"
        reading.cannot_say(prefix + "weight_decay", reading.value_of("training.weight_decay"), text)
    betas(params.get("betas"), "optimizer.params.betas", reading)
    known = {
        "lr", "weight_decay", "eps", "momentum", "betas", "adam_w_mode", "torch_adam", "bias_correction",
        "nesterov", "dampening",
    }  # fmt: skip
    neutral = {"bias_correction": True, "nesterov": False, "dampening": 0}
    for key, value in params.items():
        if key not in known or (key in neutral and value not in (neutral[key], "auto")):
            reading.cannot_say(prefix + key, brief(value), "launcher has no key for it; left out")


def betas(value: Any, said: str, reading: Reading) -> None:
    """Record Adam's two betas."""
    if value is None:
        return
    if value == "auto":
        reading.open.append(said)
        reading.leave_open("training.betas")
        return
    pair = (
        {str(index): entry for index, entry in enumerate(value)} if isinstance(value, (list, tuple)) else {}
    )
    numbers = [reading.number(pair, index, f"{said}.") for index in pair]
    if len(numbers) != 2 or any(number is None or number >= 1 for number in numbers):
        reading.refuse(said, value, "write two numbers of at least 0 and below 1, as [0.9, 0.999]")
        return
    reading.record("training.betas", numbers, said)


def _deepspeed_scheduler(scheduler: dict[str, Any], reading: Reading) -> None:
    """Record a DeepSpeed scheduler; meanings and defaults as in DeepSpeed 0.19.8, runtime/lr_schedules.py."""
    kind, prefix = reading.word(scheduler, "type", "scheduler."), "scheduler.params."
    params = reading.section(scheduler, "params", "scheduler.")
    if kind is not None:
        schedule = _DEEPSPEED_SCHEDULES.get(kind) or _NEAREST_DEEPSPEED_SCHEDULE.get(kind, "linear")
        if kind not in _DEEPSPEED_SCHEDULES:
            text = f"launcher has linear, cosine and constant; taken: {schedule}"
            reading.cannot_say("scheduler.type", kind, text)
        reading.record("training.schedule", schedule, "scheduler.type")
    if kind not in _DEEPSPEED_SCHEDULES:
        return
    reading.take(params, {"warmup_num_steps": "training.warmup"}, Reading.size, prefix)
    if "warmup_num_steps" not in params:
        reading.default("training.warmup", 1000.0, prefix + "warmup_num_steps")
    reading.take(params, {"total_num_steps": "training.max_steps"}, Reading.count, prefix)
    if rate := reading.number(params, "warmup_max_lr", prefix):
        reading.record("training.learning_rate", rate, prefix + "warmup_max_lr")
    elif kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        reading.default("training.learning_rate", 0.001, prefix + "warmup_max_lr")
    if kind == "WarmupCosineLR" and (rate := reading.value_of("training.learning_rate")):
        end = as_number(params.get("cos_min_ratio", 0.0001))
        reading.record(
            "training.minimum_learning_rate",
            rate * (0.0001 if end is None else end),
            prefix + "cos_min_ratio",
        )
    for key in ("warmup_min_lr", "warmup_min_ratio"):
        if least := reading.number(params, key, prefix):
            reading.cannot_say(prefix + key, least, "launcher warms up from 0")
    shape = "linear" if params.get("warmup_type", "log") == "linear" else "logarithmic"
    text = (
        f"DeepSpeed's warm-up is {shape}, and its first two steps have the least rate; launcher's is "
        "linear, and two steps ahead"
    )
    reading.cannot_say(prefix + "warmup_type", params.get("warmup_type", "log"), text)
