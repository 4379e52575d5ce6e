"""The SFT keys of TRL and alignment-handbook: data, adapter, and the tokens that are learned."""

from __future__ import annotations

from typing import Any

from launcher.importing import defaults, lora, trainer_keys, trl_data
from launcher.importing.reading import Reading, brief

DEFAULTS = defaults.TRL
MARKS = {
    "use_peft", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss", "dataset_mixer",
    "dataset_mixture", "dataset_splits", "dataset_text_field", "dataset_train_split", "dataset_test_split",
    "eval_packing", "padding_free", "lora_task_type", "chat_template_path",
}  # fmt: skip
"""Names that only TRL gave."""
ADAPTER = lora.Names(
    rank="lora_r",
    targets="lora_target_modules",
    also="lora_modules_to_save",
    stabilised="use_rslora",
    variants=("use_dora", "lora_target_parameters"),
    details=("lora_task_type", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
_OTHER_LOSSES = (
    "beta", "max_prompt_length", "max_completion_length", "num_generations", "desirable_weight",
    "precompute_ref_log_probs", "reward_model_path", "missing_eos_penalty", "simpo_gamma", "cpo_alpha",
    "stepwise_aggregation",
)  # fmt: skip
"""Keys of DPO, ORPO, KTO, GRPO and similar methods (TRL 1.16), which SFT lacks."""
_TEMPLATE = (
    "launcher writes a chat by the tokenizer's own template; where this is another, put it into the "
    "model's tokenizer_config.json"
)
_LEARNED: dict[str, str] = {
    "eos_token": "launcher ends a text with the tokenizer's own eos_token; set it in the model's "
    "tokenizer_config.json",
    "chat_template": _TEMPLATE,
    "chat_template_path": _TEMPLATE,
    "truncation_mode": "launcher keeps the beginning of what is too long; data.too_long: drop leaves it out",
    "model_init_kwargs": "launcher loads the model by the keys of its own section",
    "dataset_kwargs": "launcher prepares the rows by itself",
    "dataset_streaming": "launcher streams files: data.streaming and shuffle_window, with training.max_steps",
    "formatting_func": "launcher takes columns: data.text, data.prompt and data.completion, or data.messages",
    "router_aux_loss_coef": "launcher takes it from the model's config, where output_router_logits is true; "
    "write it there",
    "ignore_bias_buffers": "launcher has no such key",
}
"""Keys that change what is learned, with the nearest alternative."""


def read(content: dict[str, Any], reading: Reading) -> set[str]:
    """Record the facts of TRL's own keys; return the keys that were read. Keys of its other trainers become a
    problem of the reading."""
    if (
        other := next((key for key in _OTHER_LOSSES if content.get(key) not in (None, "", [])), None)
    ) is not None:
        text = (
            "is of a trainer that learns by another loss than cross entropy, which is all launcher has; "
            "the nearest is SFT"
        )
        reading.refuse(other, content[other], text)
    _adapter(content, bool(reading.flag(content, "use_peft")), reading)
    mixed = trl_data.mixture_of(content, reading)
    when = str(content.get("eval_strategy", content.get("evaluation_strategy", "no")))
    evaluates = when.rpartition(".")[2].lower() not in ("no", "false", "none")
    named = trl_data.data_set(content, reading, evaluates)
    _loss(content, mixed, reading)
    _packing(content, reading)
    trainer_keys.changes(content, _LEARNED, reading)
    if "max_length" in content and content["max_length"] is None and content.get("max_seq_length") is None:
        reading.leave_open("data.max_length")
        why = "nothing is cut there; launcher's data.max_length must be a number: write it"
        reading.cannot_say("max_length", None, why)
    learned = {
        "completion_only_loss", "assistant_only_loss", "loss_type", "packing", "packing_strategy", "use_peft",
    }  # fmt: skip
    read_keys = {*ADAPTER.all(), *lora.QUANTISED, *trl_data.MIXTURES, *_LEARNED, *learned, *named}
    if reading.has("data.messages") or content.get("completion_only_loss") is not None:
        return read_keys | {"dataset_text_field"}
    if content.get("dataset_text_field") is not None:
        text = (
            "the column, where the rows are texts; TRL finds chats, and prompts with completions, by their "
            "own columns"
        )
        reading.choose("dataset_text_field", brief(content["dataset_text_field"]), text)
    return read_keys


def adapter_of_a_script(content: dict[str, Any], reading: Reading) -> set[str]:
    """Record the adapter of a user's own script that configures LoRA by the usual names; return the keys that
    were read."""
    switch = next((key for key in ("use_lora", "lora", "lora_enable", "use_peft") if key in content), None)
    rank = next((key for key in ("lora_rank", "lora_dim") if key in content), "lora_r")
    names = lora.Names(
        rank, "lora_target_modules", "lora_modules_to_save", "use_rslora", variants=("use_dora",)
    )
    read_keys = {*names.all(), *([switch] if switch else [])}
    if not read_keys & content.keys():
        return set()
    if switch is not None and not reading.flag(content, switch):
        lora.unused(content, names, f"{switch} is not true", reading)
    else:
        unknown = defaults.AdapterDefaults(None, None, 0.0, None)
        lora.read(content, names, unknown, reading)
    return read_keys


def _adapter(content: dict[str, Any], has_adapter: bool, reading: Reading) -> None:
    if has_adapter:
        lora.read(content, ADAPTER, defaults.TRL_ADAPTER, reading)
    else:
        lora.unused(content, ADAPTER, "without use_peft TRL reads none of them", reading)
    lora.quantised(content, lora.QUANTISED, reading)


def _loss(content: dict[str, Any], columns: list[str], reading: Reading) -> None:
    """Record which tokens are learned."""
    whole, answers = (
        reading.flag(content, "assistant_only_loss") is not True,
        reading.flag(content, "completion_only_loss"),
    )
    kind = reading.word(content, "loss_type") or "nll"
    if kind not in ("nll", "chunked_nll"):
        reading.cannot_say("loss_type", kind, "launcher has plain cross entropy")
    if not whole or "messages" in columns:
        reading.record("data.messages", "messages", "columns" if whole else "assistant_only_loss")
    if whole:
        text = (
            "a chat is learned whole there, the user's words too; of data.messages launcher learns what "
            "the assistant says. Texts, and "
        )
        text += (
            "prompts with completions, are learned alike; for a whole chat, write it out in a column and "
            "name that as data.text"
        )
        reading.cannot_say("assistant_only_loss", False, text)
    if answers is False:
        text = "prompts are learned too there; write both into one column and name that as data.text"
        reading.cannot_say("completion_only_loss", False, text)


def _packing(content: dict[str, Any], reading: Reading) -> None:
    packs, strategy = reading.flag(content, "packing"), reading.word(content, "packing_strategy") or "bfd"
    if packs is not None:
        reading.record("data.packing", packs, "packing")
    if packs and strategy != "bfd":
        text = (
            "cuts rows to fill each pack; launcher packs whole rows by best fit, and they never see each "
            "other"
        )
        reading.cannot_say("packing_strategy", strategy, text)
