"""Configurations for the memory model, drawn at random from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.planner.memory.program import Unit
from launcher.planner.plan import Plan
from tests.training.plans import plan_of

DECODERS = ("llama", "qwen3", "qwen2", "mistral", "gpt2")
ENCODERS = ("bert", "roberta", "distilbert")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
OTHERS = ("gpt_neox", "gemma3_text")
FAMILIES = (*DECODERS, *ENCODERS, "bart", *EXPERTS, *OTHERS)
CLASSIFIERS = (*ENCODERS, "bart")
ADAPTED = ("llama", "qwen2", "gpt2", "bert", "distilbert", "gpt_neox")
"""Families that are drawn with an adapter now and then."""


@dataclass(frozen=True)
class Case:
    """One model, one plan, one micro-batch."""

    number: int
    family: str
    config: dict[str, Any]
    world_size: int
    engine: str
    """`fsdp`, `fsdp gradients`, `fsdp 2 copies`, `zero 1` to `zero 3`."""
    precision: str
    optimizer: str
    checkpointing: str
    freeze: tuple[str, ...]
    lengths: tuple[int, ...]
    adapter: dict[str, Any] | None
    accumulation: int

    @property
    def classifies(self) -> bool:
        """Whether it classifies padded samples, rather than learn packed ones."""
        return self.family in CLASSIFIERS

    def describe(self) -> str:
        sizes = f"{self.width} x {self.depth}, {self.config.get('vocab_size', 0):,} words"
        return f"{self.family} {sizes}"

    @property
    def width(self) -> int:
        names = ("hidden_size", "n_embd", "d_model", "dim")
        return next(self.config[name] for name in names if name in self.config)

    @property
    def depth(self) -> int:
        names = ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
        return sum(self.config[name] for name in names if name in self.config)

    def plan(self, directory: Path) -> Plan:
        """The plan of the case for a model in `directory`, which it writes: of an adapter's with its weights."""
        config = self.write(directory)
        if self.adapter is not None:
            auto_class = tasks.find(self.task).auto_class.fget(None)  # type: ignore[attr-defined]
            config.architectures = None
            auto_class.from_config(config).save_pretrained(directory)
        micro, world = len(self.lengths), self.world_size
        batch = {"global_batch_size": micro * world * self.accumulation, "micro_batch_size": micro}
        layout = self.layout
        changes: dict[str, Any] = {
            "precision": self.precision,
            "activation_checkpointing": self.checkpointing,
            "model__task": self.task,
            "model__freeze": self.freeze,
            **({"model__weights": "random"} if self.adapter is None else {"model__adapter": self.adapter}),
            "task": self.task,
            "layout": layout[0],
            "attention": layout[1],
            "data": {"train": {"path": "t"}, "max_length": max(self.lengths)} | self.data(),
            "training__optimizer": self.optimizer,
            "batch": batch | {"accumulation_steps": self.accumulation, "data_parallel_size": world},
        }
        return plan_of(directory, world, **changes | self._sharding())

    def write(self, directory: Path) -> Any:
        """Write the model's config into a directory, and return it."""
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.family, **self.config)
        config.save_pretrained(directory)
        return config

    @property
    def layout(self) -> tuple[str, str]:
        """Return how samples share a pass, and the attention."""
        return ("padded", "sdpa") if self.classifies else ("packed", "packed")

    def data(self) -> dict[str, Any]:
        """Return the columns of the data, and what of them is taken."""
        return {"text": "text"} | ({"label": "label"} if self.classifies else {})

    @property
    def task(self) -> str:
        return "sequence-classification" if self.classifies else "causal-lm"

    def _sharding(self) -> dict[str, Any]:
        if self.engine == "fsdp 2 copies":
            return {"mesh__dp_replicate": 2, "mesh__dp_shard": self.world_size // 2}
        if self.engine == "fsdp gradients":
            return {"mesh__reshard_after_forward": False, "sharding": "gradients"}
        if self.engine == "fsdp":
            return {}
        stage = int(self.engine[-1])
        sizes = dict.fromkeys(
            ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "persistence_threshold"),
            2,
        )
        zero = sizes | {"stage": stage, "max_live_parameters": 1, "sub_group_size": 1}
        return {
            "engine": "deepspeed",
            "sharding": {1: "optimizer", 2: "gradients", 3: "full"}[stage],
            "zero": zero,
        }

    def with_buckets(self, plan: Plan, units: tuple[Unit, list[Unit]]) -> Plan:
        """Return the plan with the sizes that the planner would choose for ZeRO, without its least of a million
        elements, which would hold all of so small a model."""
        if plan.zero is None:
            return plan
        root, layers = units
        layer = max(unit.num_elements() for unit in layers)
        kept = {
            "persistence_threshold": 10 * self.width,
            "max_live_parameters": root.num_elements() + 3 * layer,
        }
        names = ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "sub_group_size")
        every = dict.fromkeys(names, layer + layer % 2)
        return plan.model_copy(update={"zero": plan.zero.model_copy(update=every | kept)})


def draw(seed: int, count: int) -> list[Case]:
    """`count` cases, always the same for the same seed."""
    generator = random.Random(seed)
    return [_draw(generator, number) for number in range(count)]


def _draw(r: random.Random, number: int) -> Case:
    family = r.choice(FAMILIES)
    world = r.choice((1, 2, 2, 4))
    engines = ["fsdp", "fsdp", "zero 1", "zero 2", "zero 3"] if world > 1 else ["fsdp", "fsdp", "zero 2"]
    engine = r.choice(
        [*engines, *(["fsdp gradients"] if world > 1 else []), *(["fsdp 2 copies"] if world == 4 else [])]
    )
    ways = ("none", "none", "full", "selective") if engine != "zero 3" else ("none", "full")
    checkpointing = r.choice(ways)
    # DeepSpeed takes fp16 on a CPU only where that has units for it.
    precision = r.choice(
        ("bf16", "bf16", "fp32", "fp16") if not engine.startswith("zero") else ("bf16", "fp32")
    )
    config = _config(r, family)
    samples, length = r.randint(1, 6), r.randint(16, 128)
    # Padded samples are as the planner has them: all but one as long as they may be.
    shorter = family in CLASSIFIERS and samples > 1
    lengths = (length,) * (samples - shorter) + (length - 1,) * shorter
    adapter = {"rank": r.choice((4, 8))} if family in ADAPTED and r.random() < 0.3 else None
    freeze = _freeze(r, family) if r.random() < 0.25 and adapter is None else ()
    optimizer, passes = r.choice(("adamw", "adamw", "sgd")), r.choice((1, 1, 2, 3))
    return Case(
        number,
        family,
        config,
        world,
        engine,
        precision,
        optimizer,
        checkpointing,
        freeze,
        lengths,
        adapter,
        passes,
    )


def _freeze(r: random.Random, family: str) -> tuple[str, ...]:
    stems = {
        "gpt2": ("transformer.wte.*", "transformer.h."),
        "bert": ("bert.embeddings.*", "bert.encoder.layer."),
        "roberta": ("roberta.embeddings.*", "roberta.encoder.layer."),
        "distilbert": ("distilbert.embeddings.*", "distilbert.transformer.layer."),
        "bart": ("model.shared.*", "model.encoder.layers."),
        "gpt_neox": ("gpt_neox.embed_in.*", "gpt_neox.layers."),
    }
    stem, prefix = stems.get(family, ("model.embed_tokens.*", "model.layers."))
    return r.choice([(stem,), (stem, f"{prefix}0.*")])


def _experts(r: random.Random, family: str, hidden: int) -> dict[str, Any]:
    """Of qwen3_moe some have plain layers among the others."""
    number, wide = r.choice((4, 8, 16)), hidden // 2 * r.choice((1, 2, 4))
    sizes: dict[str, Any] = {"num_experts_per_tok": r.choice((1, 2, 4)), "num_experts": number}
    if family == "mixtral":
        return {"num_experts_per_tok": sizes["num_experts_per_tok"], "num_local_experts": number}
    if family == "olmoe":
        return sizes | {"intermediate_size": wide}
    shared = (
        {"shared_expert_intermediate_size": 2 * hidden}
        if family == "qwen2_moe"
        else {"mlp_only_layers": r.choice(([], [], [0], [1]))}
    )
    return sizes | shared | {"moe_intermediate_size": wide, "norm_topk_prob": r.random() < 0.5}


def _config(r: random.Random, family: str) -> dict[str, Any]:
    heads = r.choice((2, 4))
    hidden = heads * r.choice((24, 32, 48))
    layers, wide, words = r.randint(2, 8), hidden * r.choice((2, 3, 4)), r.choice((300, 1000, 4000, 12000))
    dropout = r.choice((0.0, 0.1))
    if family == "gpt2":
        drops = {"resid_pdrop": dropout, "attn_pdrop": dropout, "embd_pdrop": dropout}
        return {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "vocab_size": words,
            "n_positions": 256,
        } | drops
    if family == "bart":
        sides = {"encoder_layers": layers, "decoder_layers": r.randint(2, 4)}
        each = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), wide)
        each |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), heads)
        drops = {"dropout": dropout, "attention_dropout": 0.0}
        return sides | each | drops | {"d_model": hidden, "vocab_size": words, "max_position_embeddings": 256}
    if family == "distilbert":
        drops = {"dropout": dropout, "attention_dropout": dropout}
        sizes = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": wide}
        return sizes | drops | {"vocab_size": words, "max_position_embeddings": 256}
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": wide,
    }
    if family in ("bert", "roberta"):
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return common | drops | {"vocab_size": words, "max_position_embeddings": 256}
    groups = r.choice([g for g in (1, 2, 4) if heads % g == 0])
    tied = r.random() < 0.5
    if family in EXPERTS:
        common |= _experts(r, family, hidden)
    return common | {
        "num_key_value_heads": groups,
        "head_dim": hidden // heads,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }
