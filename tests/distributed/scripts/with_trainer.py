"""A plain Hugging Face Trainer script: it knows nothing of launcher. Writes its losses to a file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class Ours:
    """Beside the Trainer's own arguments."""

    model: str
    out: str


def main() -> None:
    options, ours = HfArgumentParser((TrainingArguments, Ours)).parse_args_into_dataclasses(sys.argv[1:])
    set_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(ours.model)
    words = torch.arange(64)[:, None] + torch.arange(12)[None] * 3
    rows = [{"input_ids": line % 131, "labels": line % 131} for line in words]
    trainer = Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows[:16])
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        losses += [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
        content = {
            "losses": losses,
            "distributed": trainer.accelerator.distributed_type.value,
            "ranks": options.world_size,
        }
        with open(ours.out, "w") as file:
            json.dump(content, file)


if __name__ == "__main__":
    main()
