"""The defaults of other tools for keys that a file leaves out.

The tests compare these small tables with the installed packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher import tasks
from launcher.importing.reading import Fact, Reading
from launcher.job.adapter import Adapter
from launcher.job.schema import Training
from launcher.values import Section


@dataclass(frozen=True)
class Defaults:
    """The defaults of one tool: a job's key, with the tool's own key and value."""

    tool: str
    values: dict[str, tuple[str, Any]]

    def but(self, tool: str, **changes: tuple[str, Any]) -> Defaults:
        """Return the defaults of a tool that builds on this one; `changes` are keys with `__` for a dot."""
        return Defaults(tool, self.values | {key.replace("__", "."): value for key, value in changes.items()})

    def apply(self, reading: Reading) -> None:
        """Record each default whose key the file does not set. With a number of steps there are no epochs."""
        reading.tool = self.tool
        if reading.is_partial:
            return
        for key, (option, value) in self.values.items():
            if key == "training.epochs" and reading.has("training.max_steps"):
                continue
            reading.default(key, value, option)


TRAINER = Defaults(
    "transformers 5.23.0",  # dataclass TrainingArguments
    {
        "training.learning_rate": ("learning_rate", 5e-05),
        "training.schedule": ("lr_scheduler_type", "linear"),
        "training.warmup": ("warmup_steps", 0.0),
        "training.epochs": ("num_train_epochs", 3.0),
        "training.seed": ("seed", 42),
        "training.optimizer": ("optim", "adamw"),
        "training.weight_decay": ("weight_decay", 0.0),
        "training.betas": ("adam_beta1, adam_beta2", [0.9, 0.999]),
        "training.epsilon": ("adam_epsilon", 1e-08),
        "training.clip_norm": ("max_grad_norm", 1.0),
        "precision": ("bf16, fp16", "fp32"),
        "batch.micro_batch_size": ("per_device_train_batch_size", 8),
        "batch.accumulation_steps": ("gradient_accumulation_steps", 1),
    },
)
TRL = TRAINER.but(
    "TRL 1.16.0",  # dataclass SFTConfig
    training__learning_rate=("learning_rate", 2e-05),
    precision=("bf16", "bf16"),
    data__max_length=("max_length", 1024),
    data__packing=("packing", False),
)
LLAMA_FACTORY = TRAINER.but(
    "LLaMA-Factory 0.9.6",  # src/llamafactory/hparams: data_args.py; the training arguments are the Trainer's
    data__max_length=("cutoff_len", 2048),
    data__packing=("packing", False),
)
AXOLOTL = TRAINER.but(
    # src/axolotl/utils/schemas: training.py, config.py; core/builders/base.py for the warm-up
    "axolotl 0.18.0",
    training__schedule=("lr_scheduler_type", "cosine"),
    training__warmup=("warmup_steps", 0.03),
    training__epochs=("num_train_epochs", 1.0),
    precision=("bf16", "auto"),
    batch__micro_batch_size=("per_device_train_batch_size", 1),
    data__max_length=("max_length", 512),
    data__packing=("packing", False),
    data__too_long=("excess_length_strategy", "drop"),
)
DEEPSPEED = Defaults(
    "DeepSpeed 0.19.8",  # ops/adam/fused_adam.py; without a scheduler the rate stays
    {
        "training.learning_rate": ("optimizer.params.lr", 0.001),
        "training.weight_decay": ("optimizer.params.weight_decay", 0.0),
        "training.betas": ("optimizer.params.betas", [0.9, 0.999]),
        "training.epsilon": ("optimizer.params.eps", 1e-08),
        "training.schedule": ("scheduler", "constant"),
        "training.warmup": ("scheduler", 0.0),
    },
)
DEEPSPEED_CLIPPING = 1.0
"""DeepSpeed 0.19.8, runtime/constants.py: GRADIENT_CLIPPING_DEFAULT. Older versions clipped nothing."""
ACCELERATE = Defaults(
    "accelerate 1.15.0", {"precision": ("mixed_precision", "fp32")}
)  # `accelerate launch` says "no"


@dataclass(frozen=True)
class AdapterDefaults:
    """The values of an adapter that a file leaves out. None: the tool requires the key, or derives it from other
    keys."""

    rank: int | None
    alpha: float | None
    """The value as a number; if `is_twice`, it is twice the rank instead."""
    dropout: float
    targets: str | None
    is_twice: bool = False


TRL_ADAPTER = AdapterDefaults(16, 32.0, 0.05, None)  # dataclass ModelConfig
LLAMA_FACTORY_ADAPTER = AdapterDefaults(
    8, None, 0.0, "all", is_twice=True
)  # hparams/finetuning_args.py; alpha is twice the rank
AXOLOTL_ADAPTER = AdapterDefaults(None, None, 0.0, None)  # utils/schemas/peft.py


def differs(fact: Fact) -> bool:
    """Return whether launcher's own default differs from a fact's value."""
    section, _, key = fact.key.partition(".")
    if section == "model" and key.startswith("adapter."):
        section, key = "adapter", key.removeprefix("adapter.")
    sections: dict[str, type[Section]] = {
        "training": Training,
        "data": tasks.find("causal-lm").Columns,
        "adapter": Adapter,
    }
    model = sections.get(section)
    if model is None or key not in model.model_fields:
        return (fact.key, fact.value) not in (("precision", "auto"), ("batch.accumulation_steps", 1))
    own = model.model_fields[key].default
    return bool(fact.value != (list(own) if isinstance(own, tuple) else own))
