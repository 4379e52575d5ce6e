"""A script on Accelerate as its examples are: it knows nothing of launcher. Writes the loss of each step to a
file."""

from __future__ import annotations

import argparse
import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    """The label is whether the first word is an even one."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(3, 131, (number, 12), generator=generator)
    return [
        {"input_ids": line, "attention_mask": torch.ones_like(line), "labels": line[0] % 2} for line in words
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    accelerator = Accelerator()
    set_seed(11)
    model = AutoModelForSequenceClassification.from_pretrained(options.model)
    loader = DataLoader(rows(64), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(loader) * options.epochs)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for _ in range(options.epochs):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
    if accelerator.is_main_process:
        content = {
            "losses": losses,
            "distributed": accelerator.distributed_type.value,
            "ranks": accelerator.num_processes,
        }
        with open(options.out, "w") as file:
            json.dump(content, file)


if __name__ == "__main__":
    main()
