"""What single families need besides the table of `tiny`; `...` leaves an attribute at its default."""

from __future__ import annotations

from typing import Any

VOCABULARY = 131

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "num_hidden_layers": 3,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_GEMMA_SHARED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA4 = {
    **_GEMMA_SHARED,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"], "num_hidden_layers": 3,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 6, "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
    "split_ngram_parts": 1,
}  # fmt: skip
_REFORMER = {
    "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32],
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0, "feed_forward_size": 96,
    "num_hidden_layers": ...,
}  # fmt: skip
_XMOD = {"default_language": "en_XX"}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {**_SLIDING,
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "canine": {"num_hash_buckets": 64, "downsampling_rate": 4, "upsampling_kernel_size": 4,
    "local_transformer_stride": 16},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": _SLIDING,
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2, "moe_loss_weight": 0.1, "ffn_hidden_size": 48, "hidden_size": 64},
    },
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "visual_embed": False},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "longcat_flash": {"head_dim": 8},
    "blt": {"global_config": {"hidden_size": 128, "num_key_value_heads": 4, "num_attention_heads": 4},
    "encoder_hash_byte_group_vocab": 100,
            "local_attention_window_len": 9},
    "flint": {"layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 3, "mlp_only_layers": [0]},
    "gemma3n_text": {**_GEMMA_SHARED, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    "intermediate_size": [96] * 4},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA_SHARED},
    "gemma4_unified_text": _GEMMA_SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "granitemoehybrid": {"position_embedding_type": "rope",
    "layer_types": ["linear_attention", "full_attention"]},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "inkling_text": {"vocab_size": VOCABULARY + 5, "unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"vocab_size": VOCABULARY + 5, "unpadded_vocab_size": VOCABULARY},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 3, "expert_layer_offset": 1},
    "laguna": {**_SLIDING, "num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
    "num_dense_layers": 1},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 16},
    "mamba2": {"head_dim": 32},
    "mellum": _SLIDING,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 2,
    },
    "ministral": _SLIDING,
    "phimoe": {"lm_head_bias": True},
    "perceiver": {
        "num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen2": _SLIDING,
    "qwen2_moe": {**_SLIDING, "mlp_only_layers": [0]},
    "qwen3": _SLIDING,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": _REFORMER,
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "smollm3": {**_SLIDING, "no_rope_layer_interval": 2},
    "t5": {"decoder_start_token_id": 0},
    "xmod": _XMOD,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": ..., "attention_head_dim": ..., "num_key_value_heads": 4,
    },
    "zaya": {"lm_head_bias": True, "num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}  # fmt: skip

_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "original_max_position_embeddings": 16,
}
_SPEECH = (
    "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize",
    "musicflamingo", "nemo_speechlm", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral",
    "voxtral_realtime",
)  # fmt: skip

VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    **{
        (task, f"{kind}+layer"): {"feat_extract_norm": "layer"}
        for task in ("audio-classification", "speech-recognition")
        for kind in (
            "hubert",
            "sew",
            "sew-d",
            "unispeech",
            "unispeech-sat",
            "wav2vec2",
            "wav2vec2-conformer",
            "wavlm",
        )
    },
    **{
        ("image-to-text", f"vision-encoder-decoder+{part}"): {}
        for part in (
            *("beit", "deit", "dinov2", "donut-swin", "swin", "swinv2", "vit"),
            *("bart", "bert", "gpt2", "mbart", "roberta", "trocr", "xlm-roberta"),
        )
    },
    ("causal-lm", "bamba+z_loss"): {"z_loss_coefficient": 0.1},
    ("causal-lm", "deepseek_v2+no_query_lora"): {"q_lora_rank": None},
    ("causal-lm", "falcon+alibi"): {"alibi": True},
    ("causal-lm", "falcon+new"): {"new_decoder_architecture": True},
    ("causal-lm", "gpt2+scaled"): {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ("causal-lm", "gpt_bigcode+many_heads"): {"multi_query": False},
    ("causal-lm", "gemma3_text+bidirectional"): {"use_bidirectional_attention": True},
    ("causal-lm", "gpt_neox+sequential"): {"use_parallel_residual": False},
    ("causal-lm", "llama+yarn"): {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    ("causal-lm", "llama+dynamic"): {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 16,
    },
    ("causal-lm", "mistral+no_window"): {"sliding_window": None},
    ("causal-lm", "mpt+learned"): {"attn_config": {"alibi": False}},
    ("causal-lm", "opt+projected"): {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ("causal-lm", "phi3+longrope"): _LONGROPE,
    ("causal-lm", "phi3+no_window"): {"sliding_window": None},
    ("causal-lm", "phimoe+no_window"): {"sliding_window": None},
    ("causal-lm", "qwen2_moe+no_window"): {
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    },
    ("causal-lm", "qwen2+no_window"): {
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    },
    ("causal-lm", "smollm3+no_window"): {
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    },
    ("causal-lm", "stablelm+parallel"): {"use_parallel_residual": True, "qk_layernorm": True},
    ("causal-lm", "starcoder2+no_window"): {"sliding_window": None},
    ("causal-lm", "xlm+causal"): {"causal": True},
    ("causal-lm", "doge+experts"): {"is_moe": True, "num_experts": 16},
    ("causal-lm", "doge+no_window"): {"sliding_window": None, "keep_window_size": 2048},
    ("causal-lm", "gemma4_text+dense"): {"enable_moe_block": False, "num_kv_shared_layers": 0},
    ("causal-lm", "zaya+no_window"): {"layer_types": ["hybrid", "hybrid"]},
    ("causal-lm", "granitemoehybrid+attention"): {"layer_types": ["full_attention", "full_attention"]},
    ("token-classification", "phi3+longrope"): _LONGROPE,
    ("sequence-classification", "phi3+no_window"): {"sliding_window": None},
    ("sequence-classification", "deberta-v2+relative"): {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
    },
    ("sequence-classification", "deberta+relative"): {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
}
"""`model_type+name`: what else a config of this type may say that bears on how samples may share a pass."""

UNABLE: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        (
            ("image-classification", name)
            for name in (
                "clip",
                "dinat",
                "hiera",
                "imagegpt",
                "metaclip_2",
                "mobilevitv2",
                "pp_lcnet",
                "shieldgemma2",
                "siglip",
                "siglip2",
                "timm_wrapper",
            )
        ),
        "launcher has not tried it: no small model of it was made",
    ),
    ("image-classification", "cvt"): "several images in a pass have another loss than each alone",
    ("causal-lm", "gemma3n"): "its image encoder needs timm; gemma3n_text is the same without it",
    (
        "causal-lm",
        "gemma4_assistant",
    ): "drafts tokens from another model's keys and values: not trained on text alone",
    (
        "causal-lm",
        "gemma4_unified_assistant",
    ): "drafts tokens from another model's keys and values: not trained on text alone",
    (
        "causal-lm",
        "git",
    ): "its loss leaves out as many logits as an image has patches, although there is no image",
    (
        "causal-lm",
        "musicgen",
    ): "AutoModelForCausalLM gives the decoder the whole config, and it wants its own (musicgen_decoder)",
    (
        "causal-lm",
        "musicgen_melody",
    ): "AutoModelForCausalLM gives the decoder the whole config, and it wants its own "
    "(musicgen_melody_decoder)",
    (
        "causal-lm",
        "reformer",
    ): "trains only on samples of exactly the length that axial_pos_shape multiplies to",
    (
        "sequence-classification",
        "reformer",
    ): "trains only on samples of exactly the length that axial_pos_shape multiplies to",
    ("sequence-classification", "layoutlmv2"): "needs detectron2 and an image of each page",
    **dict.fromkeys(
        (("masked-lm", kind) for kind in ("bart", "mbart", "mvp")),
        "reads one sequence and writes another; masked-lm is for encoders such as BERT",
    ),
    ("masked-lm", "perceiver"): "its outputs are as many as it was made for, not as many as the text has",
    **dict.fromkeys(
        ((task, "reformer") for task in ("masked-lm", "question-answering")),
        "trains only on samples of exactly the length that axial_pos_shape multiplies to",
    ),
    **dict.fromkeys(
        ((task, "layoutlmv2") for task in ("token-classification", "question-answering")),
        "needs detectron2 and an image of each page",
    ),
    ("token-classification", "bros"): "needs the place of each word on a page",
    ("question-answering", "lxmert"): "needs an image beside the question",
    ("sequence-to-sequence", "fsmt"): "its class does not say what the decoder reads to write its labels",
    ("sequence-to-sequence", "prophetnet"): "its own loss asks each position for several tokens",
    **dict.fromkeys(
        (("sequence-to-sequence", kind) for kind in _SPEECH),
        "reads sound; what it makes of text alone is a causal LM's",
    ),
}
"""Why a family has no tiny model, or none whose loss can be had of text alone."""
