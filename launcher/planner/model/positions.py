"""Number of positions of a model: the size of its table, or the length it was trained with."""

from __future__ import annotations

from typing import Any

from launcher.planner.model.model_sizes import is_size

_OF_A_TABLE = {
    "max_position_embeddings": """
        albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small canine
        convbert deberta deberta-v2 distilbert electra ernie flaubert fnet git gpt_neo layoutlm layoutlmv2
        marian mbart megatron-bert mobilebert mra mvp nomic_bert nystromformer opt pegasus perceiver plbart
        prophetnet rembert roc_bert roformer squeezebert tapas trocr xlm yoso
    """,
    "n_positions": "codegen ctrl gpt-sw3 gpt2 gpt_bigcode gptj openai-gpt",
    "max_target_positions": "whisper",
    "max_seq_len": "mpt",
}
"""Model types whose positions are rows of a table, learned or computed once, by the config key of its size.
Read in transformers 5.23."""
_BEHIND_PADDING = frozenset(
    [
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "jina_embeddings_v3",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
"""Types that count from the row after the padding token's: RoBERTa's 514 rows hold 512 positions."""
_KEYS = {kind: key for key, kinds in _OF_A_TABLE.items() for kind in kinds.split()}
_OTHER_NAMES = {"max_position_embeddings": "n_positions", "n_positions": "max_position_embeddings"}


def held(config: dict[str, Any]) -> tuple[int, str] | None:
    """Return the number of positions in the model's table, and its source in the config; None for a model
    without a table."""
    kind = str(config.get("model_type"))
    if kind not in _KEYS and kind not in _BEHIND_PADDING:
        return None
    if kind.startswith("deberta") and config.get("position_biased_input", True) is False:
        return None
    if kind == "esm" and config.get("position_embedding_type", "absolute") != "absolute":
        return None
    key = _KEYS.get(kind, "max_position_embeddings")
    key = key if key in config else _OTHER_NAMES.get(key, key)
    if not is_size(number := config.get(key)):
        return None
    if kind not in _BEHIND_PADDING:
        return number, f"{key} {number}"
    padding = config.get("pad_token_id", 1)
    first = padding + 1 if isinstance(padding, int) else 2
    return (
        number - first,
        f"{key} {number}, of which the first {first} are the padding token's and those before it",
    )


def trained(config: dict[str, Any]) -> tuple[int, str] | None:
    """Return the number of positions for which a rotary model was made, scaling included, and its source in
    the config; None if that has none."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    number = text.get("max_position_embeddings")
    if held(text) is not None or not is_size(number):
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    scaling = scaling if isinstance(scaling, dict) else {}
    factor = scaling.get("factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or factor <= 1:
        return number, f"max_position_embeddings {number}"
    # A factor stretches the original length. If that is not given, it is max_position_embeddings.
    before = (
        scaling.get("original_max_position_embeddings")
        or text.get("original_max_position_embeddings")
        or number
    )
    stretched = max(number, int(before * factor)) if is_size(before) else number
    return stretched, f"max_position_embeddings {number}, stretched {factor:g}x"
