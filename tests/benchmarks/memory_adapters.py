"""Configurations with adapters for the memory model: models that lie in files, because what is frozen has to
come from somewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.planner.memory.program import Batch
from launcher.planner.plan import Plan
from tests.training.plans import deepspeed, plan_of

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 128, "n_layer": 5, "n_head": 4, "vocab_size": 2048, "n_positions": 256}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


@dataclass(frozen=True)
class AdapterCase:
    """One model, one plan, one micro-batch."""

    family: str
    world_size: int
    precision: str
    checkpointing: str
    adapter: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    accumulation: int = 1
    lengths: tuple[int, ...] = (96, 128, 61)

    @property
    def name(self) -> str:
        engine = f"zero {self.stage}" if self.stage else "fsdp"
        run = f"{self.family}, {self.world_size} ranks, {engine}, {self.precision}, {self.checkpointing}"
        return f"{run}, {self.adapter or 'as it comes'}, {self.accumulation} micro-batches"

    @property
    def batch(self) -> Batch:
        return Batch(self.lengths)

    def write(self, directory: Path) -> Path:
        """The model, in the precision that it is trained beside."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.family, **SIZES[self.family])
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return directory

    def plan(self, directory: Path) -> Plan:
        """For the model in `directory`."""
        micro, world = len(self.lengths), self.world_size
        batch = {"global_batch_size": micro * world * self.accumulation, "micro_batch_size": micro}
        changes: dict[str, Any] = {
            "precision": self.precision,
            "activation_checkpointing": self.checkpointing,
            "model__adapter": self.adapter,
            "data": {"train": {"path": "t"}, "text": "text", "max_length": max(self.lengths)},
            "batch": batch | {"accumulation_steps": self.accumulation, "data_parallel_size": world},
        }
        return plan_of(directory, world, **changes, **(deepspeed(self.stage) if self.stage else {}))


IA3 = {"method": "ia3", "targets": ("k_proj", "v_proj", "down_proj"), "feedforward": ("down_proj",)}
PROMPT = {"method": "prompt-tuning", "virtual_tokens": 16}
MLP = {"method": "p-tuning", "virtual_tokens": 16}
PREFIX = {"method": "prefix-tuning", "virtual_tokens": 16}
LSTM = {"method": "p-tuning", "virtual_tokens": 16, "encoder": "lstm"}
CASES = (
    AdapterCase("llama", 1, "fp32", "none"),
    AdapterCase("llama", 1, "bf16", "none"),
    AdapterCase("llama", 1, "bf16", "full", {"dropout": 0.1}),
    AdapterCase(
        "llama", 1, "bf16", "selective", {"rank": 8, "targets": ("q_proj", "v_proj")}, accumulation=2
    ),
    AdapterCase("llama", 2, "bf16", "none", {"rank": 8}),
    AdapterCase("llama", 2, "bf16", "full", {"train_also": ("lm_head.*", "model.norm.*")}),
    AdapterCase(
        "llama", 2, "fp32", "none", {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}, accumulation=2
    ),
    AdapterCase("gpt2", 2, "bf16", "none", {"targets": ("attn.c_attn", "mlp.c_fc")}),
    AdapterCase("gpt2", 1, "bf16", "full"),
    AdapterCase("llama", 2, "bf16", "none", {"rank": 8}, stage=2),
    AdapterCase("llama", 2, "bf16", "full", {"rank": 8}, stage=3),
    AdapterCase("llama", 2, "fp32", "none", {"rank": 8}, stage=3),
    AdapterCase("llama", 1, "bf16", "none", IA3, lengths=(96, 96, 96)),
    AdapterCase("llama", 1, "fp32", "full", IA3, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "none", IA3, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "full", IA3, lengths=(96, 96, 96), stage=3),
    AdapterCase("llama", 1, "bf16", "none", PROMPT, lengths=(96, 96, 96)),
    AdapterCase("llama", 1, "fp32", "full", PROMPT, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "none", PROMPT, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "full", PROMPT, lengths=(96, 96, 96), stage=3),
    AdapterCase("llama", 2, "fp32", "none", MLP, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "full", MLP, lengths=(96, 96, 96), stage=3),
    AdapterCase("llama", 1, "fp32", "full", LSTM, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "none", LSTM, lengths=(96, 96, 96)),
    AdapterCase("llama", 1, "fp32", "none", PREFIX, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "fp32", "full", PREFIX, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "none", PREFIX, lengths=(96, 96, 96)),
    AdapterCase("llama", 2, "bf16", "full", PREFIX, lengths=(96, 96, 96), stage=3),
)
