"""Read SFT keys of TRL and alignment-handbook: data, adapter, what is learned."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from launcher.data.formats import FORMATS
from launcher.importing import defaults, lora, trainer_keys
from launcher.importing.reading import Reading, brief
from launcher.importing.trainer_keys import HELD_OUT

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
"""Keys of DPO, ORPO, KTO, GRPO and their like (TRL 1.16): SFT has none of them."""
_DATA = {"dataset_name", "dataset_config", "dataset_config_name", "dataset_train_split", "dataset_test_split"}
_MIXTURES = ("dataset_mixer", "dataset_mixture", "datasets")
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
    "dataset_streaming": "launcher reads the whole data set before it begins",
    "formatting_func": "launcher takes columns: data.text, data.prompt and data.completion, or data.messages",
    "router_aux_loss_coef": "launcher takes it from the model's config, where output_router_logits is true; "
    "write it there",
    "ignore_bias_buffers": "launcher has no such key",
}
"""Keys that change what is learned, and what is nearest."""


def read(content: dict[str, Any], reading: Reading) -> set[str]:
    """Say what TRL's own keys say; the keys that were read. Those of its other trainers are a problem of the
    reading."""
    if (
        other := next((key for key in _OTHER_LOSSES if content.get(key) not in (None, "", [])), None)
    ) is not None:
        text = (
            "is of a trainer that learns by another loss than cross entropy, which is all launcher has; "
            "the nearest is SFT"
        )
        reading.refuse(other, content[other], text)
    _adapter(content, bool(reading.flag(content, "use_peft")), reading)
    mixed = _mixture(content, reading)
    when = str(content.get("eval_strategy", content.get("evaluation_strategy", "no")))
    evaluates = when.rpartition(".")[2].lower() not in ("no", "false", "none")
    named = data_set(content, reading, evaluates)
    _loss(content, mixed, reading)
    _packing(content, reading)
    trainer_keys.changes(content, _LEARNED, reading)
    if "max_length" in content and content["max_length"] is None and content.get("max_seq_length") is None:
        reading.leave_open("data.max_length")
        why = "nothing is cut there; launcher's data.max_length must be a number: write it"
        reading.cannot_say("max_length", None, why)
    learned = {
        "completion_only_loss", "assistant_only_loss", "loss_type", "packing", "packing_strategy", "use_peft",
        "dataset_splits",
    }  # fmt: skip
    read_keys = {*ADAPTER.all(), *lora.QUANTISED, *_MIXTURES, *_LEARNED, *learned, *named}
    if reading.says("data.messages") or content.get("completion_only_loss") is not None:
        return read_keys | {"dataset_text_field"}
    if content.get("dataset_text_field") is not None:
        text = (
            "the column, where the rows are texts; TRL finds chats, and prompts with completions, by their "
            "own columns"
        )
        reading.choose("dataset_text_field", brief(content["dataset_text_field"]), text)
    return read_keys


def adapter_of_a_script(content: dict[str, Any], reading: Reading) -> set[str]:
    """Say the adapter of a script that is no tool's but asks for LoRA by the usual names; the keys that were
    read."""
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


def source(value: str) -> tuple[str, str]:
    """`path` or `name`, for a file or directory here or a data set on the hub, and the value as data.train
    has it."""
    is_local = PurePath(value).suffix.lower() in FORMATS or value.startswith(("/", "./", "../", "~"))
    return ("path", value) if is_local else ("name", value)


def data_set(content: dict[str, Any], reading: Reading, evaluates: bool = False) -> set[str]:
    """Say the data set that is named, with its splits; the keys that were read."""
    name = reading.word(content, "dataset_name")
    if name is None or reading.says("data.train.name"):
        return _DATA if name is None else _DATA - {"dataset_name"}
    kind, value = source(name)
    reading.say(f"data.train.{kind}", value, "dataset_name")
    subset_said = "dataset_config" if content.get("dataset_config") is not None else "dataset_config_name"
    subset = reading.word(content, subset_said)
    split, held_out = (
        reading.word(content, "dataset_train_split"),
        reading.word(content, "dataset_test_split"),
    )
    if kind == "path":
        return _DATA
    if subset is not None:
        reading.say("data.train.subset", subset, subset_said)
    if split is not None:
        reading.say("data.train.split", split, "dataset_train_split")
    if evaluates:
        for key, part, option in (("name", value, "dataset_name"), ("subset", subset, subset_said)):
            if part is not None:
                reading.say(f"data.evaluation.{key}", part, option)
        reading.say("data.evaluation.split", held_out or "test", "dataset_test_split")
    return _DATA


def _mixture(content: dict[str, Any], reading: Reading) -> list[str]:
    """Say the one data set of a mixture; the columns it keeps. Several, or a share of one, cannot be said."""
    key = next((key for key in _MIXTURES if content.get(key)), None)
    if key is None:
        return []
    entries, more = _entries(content[key], content.get("dataset_splits"), reading)
    if not entries or not isinstance(entries[0].get("id"), str):
        text = "cannot be read as data sets with their names; write data.train yourself"
        reading.cannot_say(key, brief(content[key]), text)
        return []
    first = entries[0]
    kind, name = source(first["id"])
    reading.say(f"data.train.{kind}", name, key)
    for option, part in (("subset", first.get("config")), ("split", first.get("split"))):
        if part and part != "default" and kind == "name":
            reading.say(f"data.train.{option}", str(part), key)
    if len(entries) > 1:
        text = (
            f"launcher reads one data set; taken: {first['id']}. Write the rows of all to one file, and "
            "name that"
        )
        reading.cannot_say(key, ", ".join(str(entry.get("id")) for entry in entries)[:120], text)
    if first.get("weight") not in (None, 1, 1.0):
        text = (
            "a share of its rows, drawn at random; launcher takes all, or by data.train.limit the first so "
            "many"
        )
        reading.cannot_say(f"{key}.weight", first["weight"], text)
    for option, value in more.items():
        reading.cannot_say(f"{key}.{option}", brief(value), HELD_OUT)
    columns = first.get("columns")
    return [str(column) for column in columns] if isinstance(columns, list) else []


def _entries(value: Any, splits: Any, reading: Reading) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The data sets of a mixture as {id, config, split, columns, weight}, and its other keys that change what
    is learned."""
    if isinstance(value, dict) and "datasets" in value:  # alignment-handbook since 2025
        listed = value["datasets"]
        more = {key: entry for key, entry in value.items() if key == "test_split_size" and entry}
    elif isinstance(value, dict):  # before: data set -> share, with the splits beside it
        names = [str(split) for split in splits] if isinstance(splits, list) else ["train"]
        train = [split for split in names if "train" in split] or names[:1]
        listed = [
            {"id": str(name), "weight": share, "split": split}
            for name, share in value.items()
            for split in train
        ]
        held_out = next((split for split in names if "test" in split), None)
        if held_out and listed:
            reading.say("data.evaluation.name", listed[0]["id"], "dataset_splits")
            reading.say("data.evaluation.split", held_out, "dataset_splits")
        more = {}
    else:  # TRL's list
        listed, more = value, {}
    entries = listed if isinstance(listed, list) else []
    renamed = (
        {"path": "id", "name": "config"} if "id" not in entry else {}
        for entry in entries
        if isinstance(entry, dict)
    )
    parts = [
        {names.get(str(key), str(key)): entry_value for key, entry_value in entry.items()}
        for entry, names in zip([entry for entry in entries if isinstance(entry, dict)], renamed, strict=True)
    ]
    return parts, more


def _loss(content: dict[str, Any], columns: list[str], reading: Reading) -> None:
    """Say which tokens are learned."""
    whole, answers = (
        reading.flag(content, "assistant_only_loss") is not True,
        reading.flag(content, "completion_only_loss"),
    )
    kind = reading.word(content, "loss_type") or "nll"
    if kind not in ("nll", "chunked_nll"):
        reading.cannot_say("loss_type", kind, "launcher has plain cross entropy")
    if not whole or "messages" in columns:
        reading.say("data.messages", "messages", "columns" if whole else "assistant_only_loss")
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
        reading.say("data.packing", packs, "packing")
    if packs and strategy != "bfd":
        text = (
            "cuts rows to fill each pack; launcher packs whole rows by best fit, and they never see each "
            "other"
        )
        reading.cannot_say("packing_strategy", strategy, text)
