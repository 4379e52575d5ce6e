"""A Trainer script that saves its model in every way, and what it trained, gathered by hand; it knows nothing
of launcher."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class Ours:
    """Beside the Trainer's own arguments."""

    model: str
    out: str
    alone: bool = False


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are trained, without any state dict."""
    gathered = contextlib.nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        return {
            name: getattr(value, "full_tensor", lambda value=value: value)().detach().clone()
            for name, value in model.named_parameters()
        }


def main() -> None:
    options, ours = HfArgumentParser((TrainingArguments, Ours)).parse_args_into_dataclasses(sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(ours.model)
    words = torch.arange(64)[:, None] + torch.arange(12)[None] * 3
    rows = [{"input_ids": line % 131, "labels": line % 131} for line in words]
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    trainer.train(resume_from_checkpoint=os.environ.get("RESUME_FROM"))
    trained = whole(trainer.model)
    if not ours.alone:
        trainer.save_model(ours.out)
    elif trainer.is_world_process_zero():
        trainer.save_model(ours.out)
        trainer.save_model(f"{ours.out}-again")
    if trainer.is_world_process_zero():
        torch.save(trained, f"{ours.out}.pt")
        with open(f"{ours.out}.json", "w") as file:
            json.dump([record["loss"] for record in trainer.state.log_history if "loss" in record], file)


if __name__ == "__main__":
    main()
