"""Memory of generation: the forward pass over the prompts, the cache of keys and values, a token's logits.

Follows transformers' `generate` (5.23): each beam is a row; keys and values grow by one token per forward
pass and are copied as they grow; beam search holds a pass's logits three times in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.plain_files import read_json
from launcher.planner.memory.formulas import Formulas
from launcher.planner.memory.program import Batch, Program, Segment, Setting, Unit
from launcher.planner.memory.timeline import GATHERED, WRITING, Timeline
from launcher.planner.model.model_config import config_of, locate
from launcher.planner.plan import Plan
from launcher.tasks.generation import Generate

_LAYERS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads", "n_heads")
_WIDE = ("intermediate_size", "n_inner", "d_ff", "ffn_dim")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Keys:
    """The sizes of a decoder that determine its cache per token."""

    layers: int
    keys: int
    """Elements of keys and values, for one token in one layer."""
    repeated: int
    """The same after keys and values were repeated for each query head."""
    hidden: int
    vocabulary: int
    across: bool = False
    """Whether its layers also cache keys and values of an encoder's output (cross-attention)."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Keys | None:
        """Return the sizes from a config.json; None without attention heads, as for state space models."""
        across = bool(config.get("is_encoder_decoder")) or isinstance(config.get("decoder"), dict)
        for inner in ("decoder", "text_config"):
            if isinstance(config.get(inner), dict):
                config = config[inner]
        layers, heads, hidden = (_first(config, names) for names in (_LAYERS, _HEADS, _HIDDEN))
        if not layers or not heads or not hidden:
            return None
        head = _first(config, ("head_dim", "d_kv")) or hidden // heads
        groups = _first(config, ("num_key_value_heads",)) or heads
        width = 2 * head
        if latent := _first(
            config, ("v_head_dim",)
        ):  # of DeepSeek keys have two parts, and are kept unfolded
            width = latent + _first(config, ("qk_nope_head_dim",)) + _first(config, ("qk_rope_head_dim",))
        vocabulary = _first(config, ("vocab_size",))
        return cls(layers, groups * width, heads * width, hidden, vocabulary, across)


def _first(config: dict[str, Any], names: Sequence[str]) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


@dataclass(frozen=True)
class Texts:
    """The sizes of the texts that one rank generates together."""

    rows: int
    beams: int
    prompt: int
    """Tokens of the longest prompt, or positions of the encoder's input."""
    new: int
    itemsize: int


def settings_of(plan: Plan) -> Generate | None:
    """Return the generation settings of a plan's evaluation; None if it generates nothing."""
    set_by_job = plan.evaluation.generate if plan.evaluation is not None else None
    return set_by_job or (Generate() if plan.task == "speech-recognition" else None)


def beams_of(plan: Plan, how: Generate) -> int:
    """Return the number of beams. If the job leaves it open, it is that of the model's
    generation_config.json, or of an older model's config.json; 1 if neither is here."""
    if how.num_beams is not None or how.do_sample:
        return 1 if how.do_sample else how.num_beams or 1
    if plan.model.weights == "random" or plan.model.config is not None:
        return 1
    directory = Path(locate(plan.model.name, plan.model.revision))
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError):
            own = read_json(directory / name)
            beams = own.get("num_beams") if isinstance(own, dict) else None
            return beams if isinstance(beams, int) and beams > 0 else 1
    return 1


def beside_parameters(plan: Plan, program: Program, setting: Setting) -> int:
    """Return the peak bytes, in addition to parameters and state, of generating a micro-batch's texts; 0 if
    none are generated.

    setting: the evaluation's. Prompts have the samples' maximum length, and texts theirs.
    """
    how, config = settings_of(plan), config_of(plan.model)
    keys = Keys.of(config) if how is not None and config is not None else None
    if how is None or config is None or keys is None:
        return 0
    rows, length = len(setting.batch.lengths), max(setting.batch.lengths)
    beams, heard = beams_of(plan, how), _first(config, ("max_source_positions",))
    if keys.across:
        texts = Texts(rows, beams, heard or length, how.max_new_tokens, setting.itemsize)
        return _beside_encoder(keys, texts)
    if plan.task == "speech-recognition":
        return 0  # CTC: nothing is written token by token
    texts = Texts(rows, beams, length, how.max_new_tokens, setting.itemsize)
    batch = Batch((length,) * (rows * beams), setting.batch.padded)
    blocks = program.blocks(replace(setting, batch=batch, training=False, checkpointing="none"))
    # The formulas do not count a CPU's workspace for a product in half precision: its result in fp32.
    sums = not setting.cuda and setting.itemsize == 2 and isinstance(program, Formulas)
    wide = _first(config, _WIDE) if sums else 0
    over_prompts = _over_prompts(keys, texts, blocks) + sum(batch.lengths) * wide * setting.itemsize
    return max(over_prompts, _last_token(keys, texts))


def write(
    time: Timeline, plan: Plan, program: Program, setting: Setting, units: tuple[Unit, list[Unit]]
) -> None:
    """Add the generation of a micro-batch's texts to a timeline that has parameters and state.

    All parameters are gathered at once if they take at most half of the free memory, else layer by layer
    (`launcher/training/generating.py`). So if generation needs no more memory than all parameters, room for
    one layer at a time is enough.
    """
    needed = beside_parameters(plan, program, setting)
    if not needed:
        return
    root, layers = units
    one, zero = plan.mesh.world_size == 1, plan.zero
    # On one rank FSDP does not wrap an adapter's frozen base weights.
    trained = one and zero is None and plan.model.adapter is not None and plan.offload != "parameters"
    sizes = [setting.itemsize * unit.num_elements(trained) for unit in (root, *layers)]
    plain = one and plan.precision == "fp32" and plan.offload == "none"
    if zero.stage == 3 if zero is not None else not plain:
        by_layers = sizes[0] + (1 if one else 2) * max(sizes[1:])  # the message of the next one is there
        time.up(GATHERED, min(sum(sizes), by_layers) if needed <= sum(sizes) else sum(sizes), "writing")
    time.touch(WRITING, needed, "writing")


def _over_prompts(keys: Keys, texts: Texts, blocks: Sequence[Segment]) -> int:
    """Return the peak of the pass over the prompts, in which each layer caches its keys and values."""
    rows = texts.rows * texts.beams
    left = rows * texts.prompt * keys.keys * texts.itemsize
    level = rows * texts.prompt**2 if texts.rows > 1 else 0  # who reads what, where prompts are padded
    highest = 0
    for block in blocks:
        if block.backward or block.kind == "tail":
            continue
        level += left * (block.kind == "layer")
        highest = max(highest, level + block.peak)
        level += block.added
    return highest


def _last_token(keys: Keys, texts: Texts) -> int:
    """Return the peak of computing and choosing the last token."""
    rows, tokens = texts.rows * texts.beams, texts.prompt + texts.new
    layer = rows * tokens * keys.keys * texts.itemsize
    # A layer's keys before and after they grow, and a copy for each query head of a group.
    growing = layer // 2 + rows * tokens * keys.repeated * texts.itemsize * (keys.repeated > keys.keys)
    return keys.layers * layer + max(growing, _logits(keys, texts))


def _beside_encoder(keys: Keys, texts: Texts) -> int:
    """Return the peak of a decoder with cross-attention. It occurs at the first token, when a layer's encoder
    keys and values exist beside the cache, or at the last token, with the full cache of its own."""
    rows = texts.rows * texts.beams
    across, own = (rows * tokens * keys.keys * texts.itemsize for tokens in (texts.prompt, texts.new))
    read = rows * texts.prompt * keys.hidden * texts.itemsize
    last = keys.layers * own + max(own // 2, _logits(keys, texts))
    return read + keys.layers * across + max(across, last)


def _logits(keys: Keys, texts: Texts) -> int:
    """Return the bytes of one position's logits while the next token is chosen."""
    rows = texts.rows * texts.beams
    return rows * keys.vocabulary * (12 if texts.beams > 1 else 4 + texts.itemsize)
