"""Configurations for the memory model, drawn at random from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.planner.memory.families import program_of
from launcher.planner.memory.program import Batch
from launcher.planner.plan import Plan
from tests.training.plans import plan_of

FAMILIES = ("llama", "qwen3", "qwen2", "mistral", "gpt2", "bert", "roberta", "vit", "bart")
POOLS = {
    "first": FAMILIES,
    "t5": ("t5", "mt5", "umt5"),
    "experts": ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
}
"""Families that are drawn from together: one that is added to a pool would change every draw of its seeds."""
KINDS = {"bert": "classifying", "roberta": "classifying", "vit": "seeing"} | dict.fromkeys(
    ("bart", *POOLS["t5"]), "translating"
)
TASKS = {
    "classifying": "sequence-classification",
    "seeing": "image-classification",
    "translating": "translation",
}


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
    targets: tuple[int, ...]
    accumulation: int

    @property
    def kind(self) -> str:
        return KINDS.get(self.family, "causal")

    @property
    def batch(self) -> Batch:
        return Batch(self.lengths, self.kind != "causal", self.targets)

    def describe(self) -> str:
        sizes = f"{self.width} x {self.depth}, {self.config.get('vocab_size', 0):,} words"
        return f"{self.family} {sizes}"

    @property
    def width(self) -> int:
        return self.config.get("hidden_size") or self.config.get("n_embd") or self.config["d_model"]

    @property
    def depth(self) -> int:
        return (
            self.config.get("num_hidden_layers")
            or self.config.get("n_layer")
            or sum(
                self.config[name]
                for name in ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
                if name in self.config
            )
        )

    def plan(self, directory: Path) -> Plan:
        """The plan of the case for a model in `directory`, which holds its config."""
        from transformers import AutoConfig

        AutoConfig.for_model(self.family, **self.config).save_pretrained(directory)
        micro, world = len(self.lengths), self.world_size
        batch = {"global_batch_size": micro * world * self.accumulation, "micro_batch_size": micro}
        changes: dict[str, Any] = {
            "precision": self.precision,
            "activation_checkpointing": self.checkpointing,
            "model__weights": "random",
            "model__freeze": self.freeze,
            "attention": "packed" if self.kind == "causal" else "sdpa",
            "layout": "packed" if self.kind == "causal" else "padded",
            "training__optimizer": self.optimizer,
            "batch": batch | {"accumulation_steps": self.accumulation, "data_parallel_size": world},
        }
        plan = plan_of(directory, world, **changes | self._sharding())
        plan = plan.model_copy(update={"task": TASKS.get(self.kind, "causal-lm")})
        return plan if plan.engine == "fsdp" else self._with_buckets(plan)

    def _sharding(self) -> dict[str, Any]:
        if self.engine == "fsdp 2 copies":
            return {"mesh__replicate": 2, "mesh__shard": self.world_size // 2}
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

    def _with_buckets(self, plan: Plan) -> Plan:
        """The sizes that the planner would choose, without its least of a million elements, which would hold
        all of so small a model."""
        assert plan.zero is not None
        program = program_of(self.config | {"model_type": self.family})
        assert program is not None
        root, layers = program.units()
        layer = max(unit.num_elements() for unit in layers)
        kept = {
            "persistence_threshold": 10 * self.width,
            "max_live_parameters": root.num_elements() + 3 * layer,
        }
        every = dict.fromkeys(
            ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "sub_group_size"),
            layer + layer % 2,
        )
        return plan.model_copy(update={"zero": plan.zero.model_copy(update=every | kept)})


def draw(seed: int, count: int, pool: str = "first") -> list[Case]:
    """`count` cases, always the same for the same seed and pool."""
    generator = random.Random(seed)
    return [_draw(generator, number, POOLS[pool]) for number in range(count)]


def _draw(r: random.Random, number: int, families: tuple[str, ...]) -> Case:
    family = r.choice(families)
    world = r.choice((1, 2, 2, 4))
    engines = ["fsdp", "fsdp", "zero 1", "zero 2", "zero 3"] if world > 1 else ["fsdp", "fsdp", "zero 2"]
    engine = r.choice(
        [*engines, *(["fsdp gradients"] if world > 1 else []), *(["fsdp 2 copies"] if world == 4 else [])]
    )
    checkpointing = r.choice(
        ("none", "none", "full", "selective") if engine != "zero 3" else ("none", "full")
    )
    # DeepSpeed takes fp16 on a CPU only where that has units for it.
    precision = r.choice(
        ("bf16", "bf16", "fp32", "fp16") if not engine.startswith("zero") else ("bf16", "fp32")
    )
    config = _config(r, family)
    lengths = _lengths(r)
    equal = family == "vit" or r.random() < 0.3
    lengths = (max(lengths),) * len(lengths) if equal else lengths
    targets = tuple(r.randint(10, 60) for _ in lengths) if KINDS.get(family) == "translating" else ()
    freeze = _freeze(r, family) if r.random() < 0.25 else ()
    return Case(
        number, family, config, world, engine, precision, r.choice(("adamw", "adamw", "sgd")), checkpointing,
        freeze, lengths, targets,
        r.choice((1, 1, 2, 3)),
    )  # fmt: skip


def _lengths(r: random.Random) -> tuple[int, ...]:
    return tuple(r.randint(16, 128) for _ in range(r.randint(1, 4)))


def _freeze(r: random.Random, family: str) -> tuple[str, ...]:
    embeddings = {"gpt2": "transformer.wte.*", "bert": "bert.embeddings.*", "roberta": "roberta.embeddings.*"}
    layers = {
        "gpt2": "transformer.h.",
        "bert": "bert.encoder.layer.",
        "roberta": "roberta.encoder.layer.",
        "vit": "vit.layers.",
    }
    first = (
        {"vit": "vit.embeddings.*", "bart": "model.shared.*"}
        | dict.fromkeys(POOLS["t5"], "shared.*")
        | embeddings
    )
    stem = first.get(family, "model.embed_tokens.*")
    prefix = {"bart": "model.encoder.layers."} | dict.fromkeys(POOLS["t5"], "encoder.block.") | layers
    return r.choice([(stem,), (stem, f"{prefix.get(family, 'model.layers.')}0.*")])


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
        sides = {
            "encoder_layers": layers,
            "decoder_layers": r.randint(2, 4),
            "encoder_ffn_dim": wide,
            "decoder_ffn_dim": wide,
        }
        each = {
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "max_position_embeddings": 256,
        }
        return (
            sides
            | each
            | {"d_model": hidden, "vocab_size": words, "dropout": dropout, "attention_dropout": 0.0}
        )
    if family in POOLS["t5"]:
        sides = {
            "num_layers": layers,
            "num_decoder_layers": r.randint(2, 4),
            "num_heads": heads,
            "d_kv": r.choice((24, 32)),
        }
        ways = {"feed_forward_proj": r.choice(("relu", "gated-gelu", "gated-silu")), "dropout_rate": dropout}
        return sides | ways | {"d_model": hidden, "d_ff": wide, "vocab_size": words}
    common = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": wide,
    }
    if family == "vit":
        return common | {
            "image_size": r.choice((32, 64)),
            "patch_size": 8,
            "num_channels": 3,
            "hidden_dropout_prob": dropout,
        }
    if family in ("bert", "roberta"):
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return common | drops | {"vocab_size": words, "max_position_embeddings": 256}
    groups = r.choice([g for g in (1, 2, 4) if heads % g == 0])
    tied = r.random() < 0.5
    if family in POOLS["experts"]:
        common |= _experts(r, family, hidden)
    return common | {
        "num_key_value_heads": groups,
        "head_dim": hidden // heads,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }
