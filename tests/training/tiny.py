"""Models of a few thousand parameters, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

# Wide enough weights that no gradient is near Adam's epsilon, where rounding decides the direction of a step.
COMMON: dict[str, Any] = {
    "initializer_range": 0.2,
    "vocab_size": 131,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = COMMON | {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DECODER | {"tie_word_embeddings": True},
    "qwen3": DECODER,
    "mistral": DECODER | {"sliding_window": 9},
    "gemma2": DECODER | {"attn_logit_softcapping": None, "query_pre_attn_scalar": 12, "sliding_window": 9},
    "granite": DECODER | {"logits_scaling": 4.0},
    "cohere": DECODER | {"logit_scale": 0.25},
    "phi": DECODER | {"num_key_value_heads": 4},
    "gpt2": COMMON | {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": DECODER | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": DECODER
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": DECODER
    | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "olmoe": DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
}
"""Numbers of experts that two ranks cut evenly, and one that they do not."""
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_oss": DECODER
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    | {"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "lfm2": DECODER | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": DECODER
    | {
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "stablelm": DECODER | {"partial_rotary_factor": 0.5},
    "gpt_neo": COMMON
    | {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 9,
        "attention_types": [[["global", "local"], 1]],
    }
    | {"attention_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0, "max_position_embeddings": 256},
    "bloom": COMMON | {"hidden_size": 48, "n_layer": 3, "n_head": 4},
}
"""Which cannot be joined end to end, or whose head does more than multiply."""
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": COMMON
    | {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4},
    "distilbert": COMMON | {"dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 4},
    "roberta": COMMON
    | {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4},
    "modernbert": COMMON
    | {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}


def config_of(family: str, **changes: Any) -> Any:
    """The config of a tiny model of that family."""
    return AutoConfig.for_model(family, **((FAMILIES | MIXTURES | SPECIAL | ENCODERS)[family] | changes))


def model_of(
    family: str, auto_class: str = "AutoModelForCausalLM", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A tiny model in fp32, always with the same weights for the same seed."""
    torch.manual_seed(seed)
    attention = changes.pop("attn_implementation", None)
    model: PreTrainedModel = getattr(transformers, auto_class).from_config(
        config_of(family, **changes), attn_implementation=attention
    )
    return model.float()
