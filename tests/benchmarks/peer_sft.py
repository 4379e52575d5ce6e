"""The peer: TRL's SFTTrainer on the same model, rows, ranks and lengths. Run by bench_speed.py under torchrun
with the peer's Python.

Nothing is tuned for or against it: what is not named below is TRL's default (as its activation checkpointing,
which
--no-checkpointing turns off). Prints one JSON line: non-padding tokens per second over the steps after the
  warm-up.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import torch.distributed
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train for --steps steps and print the rate over those after --warmup."""
    options = parse()
    settings: dict[str, Any] = {"gradient_checkpointing": False} if options.no_checkpointing else {}
    configuration = SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        max_length=options.max_length,
        packing=options.packing,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.accumulation,
        bf16=options.precision == "bf16",
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    rows = load_dataset("json", data_files=options.data, split="train").select_columns(
        ["prompt", "completion"]
    )
    trainer = CountingTrainer(model=options.model, args=configuration, train_dataset=rows)
    trainer.add_callback(Clock(trainer, options.warmup))
    trainer.train()
    if trainer.args.process_index == 0:
        result = trainer.result | {"gradient_checkpointing": bool(configuration.gradient_checkpointing)}
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.barrier()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "output", "precision"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("steps", "warmup", "max-length", "micro-batch", "accumulation"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("packing", "no-checkpointing"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


class CountingTrainer(SFTTrainer):
    """Counts the real tokens that go into each forward pass; padding is not work."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.num_tokens = 0
        self.result: dict[str, float] = {}

    def training_step(
        self, model: Any, inputs: dict[str, Any], *arguments: Any, **settings: Any
    ) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.num_tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return super().training_step(model, inputs, *arguments, **settings)


class Clock(TrainerCallback):
    """Starts after the warm-up steps and stops after the last."""

    def __init__(self, trainer: CountingTrainer, warmup: int) -> None:
        self.trainer, self.warmup = trainer, warmup
        self.started, self.before = 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.warmup:
            self.started, self.before = time.perf_counter(), self.trainer.num_tokens
        if state.global_step == args.max_steps:
            seconds = time.perf_counter() - self.started
            total = torch.tensor([self.trainer.num_tokens - self.before])
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(total)
            self.trainer.result = {
                "num_tokens": int(total),
                "seconds": seconds,
                "tokens_per_second": int(total) / seconds,
            }


if __name__ == "__main__":
    main()
