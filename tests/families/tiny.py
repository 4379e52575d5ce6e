"""A tiny model, drawn at random, of every model_type that transformers can fine-tune here."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.special import SPECIAL, VARIANTS, VOCABULARY

CAUSAL_LM, SEQUENCE_CLASSIFICATION = "causal-lm", "sequence-classification"
MASKED_LM, TOKEN_CLASSIFICATION = "masked-lm", "token-classification"
QUESTION_ANSWERING, SEQUENCE_TO_SEQUENCE = "question-answering", "sequence-to-sequence"
IMAGE_CLASSIFICATION = "image-classification"
AUDIO_CLASSIFICATION = "audio-classification"
SPEECH_RECOGNITION = "speech-recognition"
IMAGE_TO_TEXT = "image-to-text"
IMAGE_TEXT_TO_TEXT = "image-text-to-text"
_AUTO = {
    IMAGE_CLASSIFICATION: AutoModelForImageClassification,
    CAUSAL_LM: AutoModelForCausalLM,
    SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    MASKED_LM: AutoModelForMaskedLM,
    TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
    QUESTION_ANSWERING: AutoModelForQuestionAnswering,
    SEQUENCE_TO_SEQUENCE: AutoModelForSeq2SeqLM,
}
NUM_LABELS = 3
"""Of a model that classifies."""

PAD, BEGIN, END = 1, 2, 3
WINDOW = 9
MAX_POSITIONS = 64

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END,
    "sep_token_id": END,
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "emb_dim": 64, "embedding_size": 64,
    "embedding_dim": 64,
    "word_embed_proj_dim": 64,
    "attention_hidden_size": 64, "hidden_size_global": 128, "lru_width": 64, "input_embedding_size": 64,
    "output_embedding_size": 48,
    "cross_attention_hidden_size": 64,
    "intermediate_size": 96, "d_ff": 96, "dff": 96, "ffn_dim": 96, "dim_ff": 96, "ffn_hidden_size": 96,
    "hidden_dim": 96, "d_inner": 96,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "feed_forward_size": 96, "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_encoder_layers": 2,
    "num_decoder_layers": 2, "num_blocks": 2, "num_layers_per_stack": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "swa_num_key_value_heads": 2, "num_query_groups": 2,
    "head_dim": 16, "dim_head": 16, "attention_head_size": 16, "d_kv": 16, "d_head": 16, "kv_channels": 16,
    "swa_head_dim": 16,
    "global_head_dim": 16,
    "rotary_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "qk_head_dim": 24, "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "attention_head_dim": 16, "o_lora_rank": 16, "o_groups": 2,
    "max_position_embeddings": MAX_POSITIONS, "n_positions": MAX_POSITIONS, "n_ctx": MAX_POSITIONS,
    "max_seq_len": MAX_POSITIONS,
    "model_max_length": MAX_POSITIONS, "max_target_positions": MAX_POSITIONS,
    "max_source_positions": MAX_POSITIONS,
    "context_length": MAX_POSITIONS,
    "original_max_position_embeddings": MAX_POSITIONS,
    "sliding_window": WINDOW, "sliding_window_size": WINDOW, "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "attention_chunk_size": WINDOW, "keep_window_size": WINDOW, "use_sliding_window": True,
    "max_window_layers": 1,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 2, "num_expert_group": 2, "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "moe_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 48, "shared_experts_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1, "interleave_moe_layer_step": 1, "zero_expert_num": 2, "router_hidden_size": 32,
    "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "mamba_n_heads": 4, "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_headdim": 32, "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1, "mamba_chunk_size": 8,
    "chunk_size": 8, "mamba_dt_rank": 4,
    "time_step_rank": 4, "n_mamba_heads": 2, "mamba_d_ssm": 128, "use_mamba_kernels": False,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_head_dim": 16,
    "linear_num_heads": 4, "block_size": 8, "laurel_rank": 8,
    "index_head_dim": 16, "index_n_heads": 16, "index_topk": 6, "index_block_size": 8, "index_topk_blocks": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
    "decoder_vocab_size": VOCABULARY,
    "type_vocab_size": 2, "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0, "pretraining_tp": 1,
    "image_size": 28, "patch_size": 14, "adapter_rank": 8, "n_layers_per_attn_res_block": 2, "rel_extent": 64,
    "d_rel": 8,
    # What a head or a layer may do to its numbers, at a value that matters.
    "lm_head_multiplier": 0.3, "logits_scaling": 4.0, "logit_scale": 0.25, "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 10.0,
    "logits_soft_cap": 5.0, "output_logit_soft_cap": 5.0, "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3, "key_multiplier": 0.8, "attention_out_multiplier": 0.9,
    "attention_in_multiplier": 1.1,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.8, "logits_mup_width_multiplier": 3.0,
    "output_router_logits": True, "router_aux_loss_coef": 0.1, "aux_loss_coef": 0.1,
}  # fmt: skip
"""Attribute -> value, for every config that has the attribute with a value of its own."""

ALTHOUGH_NONE = {
    "pad_token_id", "bos_token_id", "eos_token_id", "logit_scale", "final_logit_softcapping",
    "sliding_window", "attn_logit_softcapping",
    "head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "n_shared_experts",
    "moe_intermediate_size",
}  # fmt: skip
"""Attributes that are set although their default is None."""
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
_DROPOUTS = ("dropout", "drop", "pdrop", "layerdrop", "jitter_noise")


def config_of(model_type: str, task: str, dropout: float | None = None) -> PreTrainedConfig:
    """Make the config of a tiny model of this type, or `type+variant`; `dropout` sets every rate of dropout
    (None leaves the defaults)."""
    variant = VARIANTS.get((task, model_type), {})
    model_type = model_type.partition("+")[0]
    special = SPECIAL.get(model_type, {}) | variant
    if task == CAUSAL_LM and "is_decoder" in _fields(CONFIG_MAPPING[model_type]):
        special = {"is_decoder": True, **special}
    config = _build(CONFIG_MAPPING[model_type], special)
    num_labels = {
        SEQUENCE_CLASSIFICATION: NUM_LABELS,
        IMAGE_CLASSIFICATION: NUM_LABELS,
        TOKEN_CLASSIFICATION: NUM_LABELS,
        QUESTION_ANSWERING: 2,
    }
    for part in _parts(config) if task in num_labels else ():
        part.num_labels = num_labels[task]
    if task == SEQUENCE_TO_SEQUENCE:
        _set_start(config)
    if dropout is not None:
        set_dropout(config, dropout)
    return config


def _set_start(config: PreTrainedConfig) -> None:
    """Have the decoder start from a token that there is; a mixture's routers add nothing to the loss, as by
    default."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None or start >= VOCABULARY:
        config.decoder_start_token_id = BEGIN
    for part in _parts(config):
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set every rate of dropout, of layers left out and of noise on routers in this config and those inside
    it."""
    for part in _parts(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and any(word in name for word in _DROPOUTS):
                setattr(part, name, rate)


def model_of(
    model_type: str,
    task: str,
    attention: str | None = None,
    seed: int = 0,
    *,
    dropout: float | None = None,
    config: PreTrainedConfig | None = None,
    experts: str | None = None,
) -> PreTrainedModel:
    """Make a tiny model of this type in fp32 on the CPU; equal seeds give equal weights, whatever the
    attention.

    `experts` is the way in which transformers runs the experts of a mixture, `eager` where float64 is wanted;
    None leaves its default.
    """
    config = config_of(model_type, task, dropout) if config is None else config
    torch.manual_seed(seed)
    more = {} if experts is None else {"experts_implementation": experts}
    model = _AUTO[task].from_config(config, attn_implementation=attention, dtype=torch.float32, **more)
    redraw(model, seed)
    for module in model.modules() if dropout is not None else ():
        if isinstance(module, torch.nn.Dropout):  # a head may have a rate that no config says
            module.p = dropout
    return model


def redraw(model: PreTrainedModel, seed: int, std: float = 0.25) -> None:
    """Draw matrices anew with this standard deviation; vectors, and what a recurrence starts from, get noise
    on what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() >= 2 and not any(word in name for word in ("A_log", "lambda", "time_", "dt_")):
                parameter.copy_(noise * std)
            elif parameter.is_floating_point():
                parameter.copy_(parameter.nan_to_num() + noise * 0.1)


def _fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Attribute -> default of a config class."""
    if dataclasses.is_dataclass(kind):
        return {
            field.name: field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
            for field in dataclasses.fields(kind)
        }
    return {
        name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()
    }


def _build(kind: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    defaults = _fields(kind)
    values = {
        name: value
        for name, value in SMALL.items()
        if name in defaults and (defaults[name] is not None or name in ALTHOUGH_NONE)
    }
    if "kv_lora_rank" in defaults:  # latent attention: as many keys and values as queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    try:
        default = kind()
    except Exception:
        default = None
    for name in kind.sub_configs or ():
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = _build(type(part), special.get(name, {}))
    values |= _layers(default, defaults, special)
    values |= {name: value for name, value in special.items() if name not in (kind.sub_configs or ())}
    return kind(**{name: value for name, value in values.items() if value is not ...})


def _layers(
    default: PreTrainedConfig | None, defaults: dict[str, Any], special: dict[str, Any]
) -> dict[str, Any]:
    """Every kind of layer that this family's default has, each once, in the order in which they come."""
    kinds = {}
    for name in LAYER_LISTS:
        if (
            name in defaults
            and name not in special
            and isinstance(getattr(default, name, None), (list, tuple))
        ):
            kinds[name] = list(dict.fromkeys(getattr(default, name)))
    if not kinds:
        return {}
    count = special.get("num_hidden_layers", max(2, *(len(each) for each in kinds.values())))
    values: dict[str, Any] = {name: (each * count)[:count] for name, each in kinds.items()}
    return values | {name: count for name in ("num_hidden_layers",) if name in defaults}


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for each in inner for part in _parts(each))]
