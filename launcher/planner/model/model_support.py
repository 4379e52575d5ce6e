"""Layouts and attentions that each architecture supports, from model_support.json.

The table was made by comparing losses.

`tests/families/sweep.py` makes the table. For every `model_type` of transformers it builds a tiny model, and
compares its loss over samples that share a micro-batch with that of transformers' own class on each sample
alone.
docs/models.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import Adapter
from launcher.planner.plan import Attention
from launcher.tasks.task import Head, SampleLayout

TABLE = Path(__file__).with_name("model_support.json")
WITHOUT_ADAPTER = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), "out_proj")
"""Linear layers that cannot have an adapter, by model_type: their kernels use the matrix without calling the
layer; peft (0.21) refuses them."""
WITHOUT_PROMPTS = frozenset(
    (
        *("blt", "canine", "cpmant", "fsmt", "perceiver"),  # have no one table of input embeddings
        *("deepseek_v4", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "mllama"),
        *("moshi", "qwen4_exp", "qwen4_exp_text"),  # read the ids beyond that table
        *("bros", "esm", "esmc", "ibert", "layoutlmv2", "layoutlmv3", "longformer"),
        "falcon_h1",  # multiplies the embeddings of ids, and not those that it is given
    )
)
"""The model_types whose class gives other numbers, or none, for embeddings than for ids: virtual tokens cannot
stand before its texts with PEFT's own loss."""
WITH_PREFIX = frozenset((
    "afmoe", "apertus", "arcee", "aria_text", "beam", "bert", "bert-generation", "biogpt",
    "bitnet", "camembert", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl",
    "cwm", "data2vec-text", "dots1", "electra", "emu3", "ernie", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "flint", "fuyu", "gemma", "gemma2", "gemma3",
    "gemma3_text", "glm", "glm4", "glm4_moe", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "llama", "llama4",
    "llama4_text", "mellum", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert-decoder", "moss_transcribe_diarize", "nanochat", "nemotron", "olmo", "olmo2",
    "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "roberta-prelayernorm", "roc_bert",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
))  # fmt: skip
"""The model_types whose causal LM reads the keys and values of prefix tuning with PEFT's own numbers.

Each layer has one attention of transformers' interface, and heads of the size that PEFT takes from the config. A
test compares them all."""
COSTS_BY_TOKEN = frozenset(
    (
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
        *("modernbert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    )
)
"""The model_types a pass of which costs no more than its number of samples times the longest of them: they pad
to no block's size, and keep nothing of a fixed size for each sample."""
SEES_PADDING = frozenset(
    (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
        *("plbart", "trocr", "whisper", "roformer"),  # count positions from the first column
        *("recurrent_gemma", "rwkv"),  # read padding as they read a text
        *("deepseek_v4", "minimax_m3_vl_text"),  # put tokens together in blocks from the first column
    )
)
"""Causal LMs whose continuation of a prompt changes with padding before it."""


class Way(NamedTuple):
    """One way for samples to share a micro-batch that gives transformers' own loss."""

    layout: SampleLayout
    attention: Attention
    head: Head = "chunked"


@dataclass(frozen=True)
class Support:
    """The known ways of one `model_type` and task."""

    ways: tuple[Way, ...]
    """The first is taken if the job sets nothing else; empty if the job is refused."""
    refused: str = ""
    """Why there is no way, in one line."""


_UNKNOWN: dict[SampleLayout, Support] = {
    "packed": Support(
        (
            Way("packed", "packed"),
            Way("packed", "sdpa"),
            Way("packed", "eager"),
            Way("padded", "sdpa"),
            Way("padded", "eager"),
        )
    ),
    "padded": Support((Way("padded", "sdpa"), Way("padded", "eager"))),
}
_UNTRIED: dict[SampleLayout, Support] = {
    "packed": Support(
        (Way("padded", "eager", "model"), Way("padded", "sdpa", "model"), Way("packed", "packed", "model"))
    ),
    "padded": Support((Way("padded", "eager"), Way("padded", "sdpa"))),
}


def unknown(task: str) -> Support:
    """Return the ways of most models, for a config that is not here yet. The ranks check again once they have
    read it."""
    return _UNKNOWN[tasks.find(task).traits.layout]


def untried(task: str) -> Support:
    """Return the ways of most classes, for an architecture or a task that is not in the table.

    The ranks compare its loss with the class's own after loading.
    """
    return _UNTRIED[tasks.find(task).traits.layout]


def why_no_prompt(adapter: Adapter, task: str, config: dict[str, Any]) -> str | None:
    """Return why an adapter's virtual tokens cannot stand before the samples of a model, by its config.json.

    None if they can as far as it says.
    """
    kind = str(config.get("model_type"))
    if adapter.is_prefix:
        return _why_no_prefix(kind, config) if "model_type" in config else None
    if kind in WITHOUT_PROMPTS:
        return f"a {kind} model does not compute the same from embeddings as from tokens; write lora"
    if config.get("is_encoder_decoder") and tasks.find(task).traits.head != "every-position":
        return f"the {task} class of a {kind} model, an encoder-decoder, reads no embeddings; write lora"
    return None


def _why_no_prefix(kind: str, config: dict[str, Any]) -> str | None:
    if kind not in WITH_PREFIX:
        return (
            f"the attention of a {kind} model is not known to read learned keys and values as in peft; write "
            "prompt-tuning or lora"
        )
    if config.get("output_router_logits"):
        return "the loss of its routers (output_router_logits) would count virtual tokens; write lora"
    return None


@lru_cache(maxsize=1)
def read_table() -> dict[str, Any]:
    """Return the table: `versions`, `types` (every model_type of that transformers), and entries by task and
    model_type."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def support(
    task: str,
    config: dict[str, Any] | None,
    trust_remote_code: bool = False,
    max_length: int = 0,
    one_length: bool = False,
) -> Support:
    """Return a model's support by its config.json, for samples of at most `max_length` tokens, or all of
    `one_length`.

    It is `unknown` without a config, and `untried` for entries that are not in the table.
    """
    if config is None:
        return unknown(task)
    table, kind = read_table(), str(config.get("model_type"))
    if trust_remote_code and "auto_map" in config:
        return untried(task)
    if task not in table:
        return untried(task)
    entry = table[task].get(kind)
    if entry is None:
        return untried(task) if kind not in table["types"] else Support((), _cannot(table, kind, task))
    ways = entry.get("ways", ())
    if config.get("feat_extract_norm") == "layer":
        ways = entry.get("layer", ways)
    if one_length:
        ways = entry.get("one_length", ways)
    ways = _both(ways, entry, config)
    known = Support(tuple(Way(*way.split()) for way in ways), entry.get("refused", ""))
    if not known.ways:
        return known
    # In a composite model the text part is trained.
    values = {**config, **(config.get("text_config") or {}), "model_type": kind}
    if tasks.find(task).traits.causal:
        known = _with_values(known, entry, values)
    return _with_positions(known, values, max_length)


def support_of_tasks(
    names: Sequence[str],
    config: dict[str, Any] | None,
    trust_remote_code: bool = False,
    max_length: int = 0,
    one_length: bool = False,
) -> Support:
    """Return the ways that are valid for all of several tasks, like `support` for one."""
    known = [support(name, config, trust_remote_code, max_length, one_length) for name in names]
    refused = [one for one in known if not one.ways]
    pairs = zip(names, known, strict=True)
    doubtful = [one for name, one in pairs if one is untried(name) or one is unknown(name)]
    if first := next(iter((*refused, *doubtful)), known[0] if len(known) == 1 else None):
        return first
    return Support(tuple(way for way in known[0].ways if all(way in one.ways for one in known)))


def _both(ways: Any, entry: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return the ways that are valid for both encoder and decoder of a composite model. If one was not tried,
    eager attention comes first, which every class has."""
    parts: dict[str, list[str]] = entry.get("parts", {})
    given = [config[key] for key in ("encoder", "decoder") if isinstance(config.get(key), dict)]
    if not parts or not given:
        return ways
    kinds = [str(part.get("model_type")) for part in given]
    if not all(kind in parts for kind in kinds):
        return sorted(ways, key=lambda way: "eager" not in way)
    return [way for way in ways if all(way in parts[kind] for kind in kinds)]


_WIDELY_USED = ("llama", "qwen3", "bert", "distilbert", "roberta", "deberta-v2", "t5", "bart", "marian")
"""Types that a refusal suggests, if they support the task."""


def _cannot(table: dict[str, Any], kind: str, task: str) -> str:
    others = [name for name in tasks.TASKS if table.get(name, {}).get(kind, {}).get("ways")]
    can = [name for name, entry in table[task].items() if "ways" in entry]
    named = [name for name in _WIDELY_USED if name in can] or can
    return (
        f"a {kind} model cannot do {task}"
        + (f"; it can do {', '.join(others)}" if others else "")
        + (f"; {len(can)} other types can do {task}, such as {', '.join(named[:4])}" if can else "")
    )


def _with_values(known: Support, entry: dict[str, Any], config: dict[str, Any]) -> Support:
    """Return a causal LM's support after changes due to values in its config. The sweep tried each, as
    `type+variant`."""
    kind = config["model_type"]
    if "encoder" in entry and not config.get("is_decoder"):
        reason = (
            "is an encoder, whose tokens see those that come after; with is_decoder: true in its config it "
            "is a causal LM"
        )
        return Support((), f"a {kind} model {reason}")
    for key, values in _NOT_CAUSAL.items():
        if (value := config.get(key)) in values:
            return Support(
                (),
                f"with {key}: {str(value).lower()} in its config tokens see those that come after, so "
                "that it is no causal LM",
            )
    for key, reason in _REFUSED_VALUES.get(kind, {}).items():
        if config.get(key):
            return Support((), f"with {key}: {config[key]} in its config {reason}")
    if kind == "falcon" and config.get("alibi"):
        return Support(tuple(way for way in known.ways if way.attention == "eager"))
    return known


def _with_positions(known: Support, config: dict[str, Any], max_length: int) -> Support:
    """Return the support, changed if rotary frequencies depend on the longest sample of a micro-batch."""
    rope, begun = _growing_positions(config)
    if begun and max_length > begun and rope == "dynamic":
        reason = (
            "its rotary frequencies hang on the longest sample so far, so that the loss of one would hang "
            "on those before it"
        )
        return Support((), f"{reason}; write data.max_length: {begun} at most")
    if begun and max_length > begun:
        return Support(
            (Way("single", "sdpa", known.ways[0].head), Way("single", "eager", known.ways[0].head))
        )
    return known


_NOT_CAUSAL: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (True, "all"),
    "is_causal": (False,),
}
"""Values for any type; Gemma's other value, `vision`, is for images."""
_REFUSED_VALUES = {
    "bamba": {
        "z_loss_coefficient": "its class adds to the loss what launcher does not compute; write 0 there"
    },
    "doge": {"is_moe": "its router mixes the tokens of a sample, so that it is no causal LM"},
}


def _growing_positions(config: dict[str, Any]) -> tuple[str, int]:
    """Return the kind of rotary embedding whose frequencies depend on the longest sample of a micro-batch,
    and the length from which on; 0 if there is none."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for rope in (parameters, *parameters.values()) if isinstance(parameters, dict) else ():
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        if kind in ("longrope", "dynamic"):
            keys = (
                rope.get("original_max_position_embeddings"),
                config.get("original_max_position_embeddings"),
            )
            begun = next(
                (size for size in (*keys, config.get("max_position_embeddings")) if isinstance(size, int)), 0
            )
            return kind, begun
    return "", 0


def continues_alone(config: dict[str, Any], longest: int) -> bool:
    """Return whether a causal LM's continuation of a prompt changes with longer prompts in its micro-batch.
    longest: tokens of the longest prompt and answer.

    It does if the model sees the padding before a prompt, or if rotary frequencies follow the longest.
    """
    text = {**config, **(config.get("text_config") or {})}
    _, begun = _growing_positions(text)
    sees_padding = not SEES_PADDING.isdisjoint((config.get("model_type"), text.get("model_type")))
    return sees_padding or 0 < begun < longest


def fitting(known: Support, attention: str) -> list[Way]:
    """Return the ways that a job's `model.attention` allows; `packed` is PyTorch's own fused attention sample
    by sample, so `sdpa` too."""
    if attention == "auto":
        return list(known.ways)
    if attention == "flash_attention_2":
        # Its kernel takes concatenated samples and their lengths. The class has to use transformers' registry
        # of attentions.
        return [
            Way(way.layout, "flash_attention_2", way.head)
            for way in known.ways
            if way.attention in ("packed", "sdpa")
        ][:1]
    names = ("packed", "sdpa") if attention == "sdpa" else (attention,)
    return [way for way in known.ways if way.attention in names]


def choose(
    known: Support, model: str, kind: str, attention: str, packing: bool, micro_batch_size: int | str
) -> Way:
    """Return a model's first way that the job's settings allow. kind: its `model_type`.

    Raises ConfigurationError with a setting that works if there is none.
    """
    if not known.ways:
        raise ConfigurationError(Problem("model.name", model, known.refused))
    ways = fitting(known, attention)
    if not ways:
        can = ", ".join(
            dict.fromkeys("sdpa" if way.attention == "packed" else way.attention for way in known.ways)
        )
        reason = f"a {kind} model's loss would not be its own with it; write {can} or auto"
        raise ConfigurationError(Problem("model.attention", attention, reason))
    if packing:
        ways = [way for way in ways if way.layout == "packed"]
        if not ways:
            reason = (
                f"samples of a {kind} model cannot stand in one row without seeing each other; write false"
            )
            raise ConfigurationError(Problem("data.packing", True, reason))
    if ways[0].layout == "single" and micro_batch_size != 1:
        reason = f"several samples of a {kind} model in one pass have another loss than each alone; write 1"
        raise ConfigurationError(Problem("batch.micro_batch_size", micro_batch_size, reason))
    return ways[0]
