"""Memory of a model that writes: the pass over its prompts, the keys and values that it keeps, a token's logits.

As transformers' `generate` goes (5.23): each beam is a row, keys and values grow by one token a pass and are
copied as they grow, and beam search holds the logits of a pass three times in fp32.
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
    """The sizes of a decoder that decide what it keeps of each token."""

    layers: int
    keys: int
    """Numbers of keys and values of one token in one layer."""
    repeated: int
    """The same, once each query has its own."""
    hidden: int
    vocabulary: int
    across: bool = False
    """Whether its layers keep keys and values of what an encoder read, too."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Keys | None:
        """Return the sizes by a config.json; None where it has no attention heads, as of a state space model."""
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
    """Hold what is written in one pass of a rank."""

    rows: int
    beams: int
    prompt: int
    """Tokens of the longest prompt, or positions of what the encoder read."""
    new: int
    itemsize: int


def settings_of(plan: Plan) -> Generate | None:
    """Return how a plan's model writes while it is measured; None where it does not."""
    set_by_job = plan.evaluation.generate if plan.evaluation is not None else None
    return set_by_job or (Generate() if plan.task == "speech-recognition" else None)


def beams_of(plan: Plan, how: Generate) -> int:
    """Return by how many beams a plan's model writes: where the job leaves it open, as many as the model's own
    generation_config.json says, or a config.json of old, where that is here; else 1."""
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
    """Return the most bytes beside parameters and state while a micro-batch's texts are written; 0 where none
    are.

    setting: of an evaluation's pass. Prompts are as long as samples may be, texts as long as they may be.
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
    # The formulas know nothing of what a CPU takes for a product in half precision: its result in fp32.
    sums = not setting.cuda and setting.itemsize == 2 and isinstance(program, Formulas)
    wide = _first(config, _WIDE) if sums else 0
    over_prompts = _over_prompts(keys, texts, blocks) + sum(batch.lengths) * wide * setting.itemsize
    return max(over_prompts, _last_token(keys, texts))


def write(
    time: Timeline, plan: Plan, program: Program, setting: Setting, units: tuple[Unit, list[Unit]]
) -> None:
    """Count on a timeline, which has parameters and state, what a micro-batch's texts need as they are written.

    Parameters are gathered whole where they take no more than half of what is free, and layer by layer elsewhere
    (`launcher/training/generating.py`). So where writing needs no more than they do, room for a layer at a time
    is enough for both.
    """
    needed = beside_parameters(plan, program, setting)
    if not needed:
        return
    root, layers = units
    one, zero = plan.mesh.world_size == 1, plan.zero
    # On one rank FSDP leaves alone what does not train beside an adapter.
    trained = one and zero is None and plan.model.adapter is not None and plan.offload != "parameters"
    sizes = [setting.itemsize * unit.num_elements(trained) for unit in (root, *layers)]
    plain = one and plan.precision == "fp32" and plan.offload == "none"
    if zero.stage == 3 if zero is not None else not plain:
        by_layers = sizes[0] + (1 if one else 2) * max(sizes[1:])  # the message of the next one is there
        time.up(GATHERED, min(sum(sizes), by_layers) if needed <= sum(sizes) else sum(sizes), "writing")
    time.touch(WRITING, needed, "writing")


def _over_prompts(keys: Keys, texts: Texts, blocks: Sequence[Segment]) -> int:
    """Return the highest level of the pass over the prompts, in which each layer leaves its keys and values."""
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
    """Return the highest level of the pass that writes the last token, and of choosing it."""
    rows, tokens = texts.rows * texts.beams, texts.prompt + texts.new
    layer = rows * tokens * keys.keys * texts.itemsize
    # The keys of a layer before and after they grow; and a copy for each query of its group.
    growing = layer // 2 + rows * tokens * keys.repeated * texts.itemsize * (keys.repeated > keys.keys)
    return keys.layers * layer + max(growing, _logits(keys, texts))


def _beside_encoder(keys: Keys, texts: Texts) -> int:
    """Return the highest level of a decoder that keeps keys and values of what an encoder read: with those of a
    layer before they are put away, as the first token is written, or with all of its own, at the last."""
    rows = texts.rows * texts.beams
    across, own = (rows * tokens * keys.keys * texts.itemsize for tokens in (texts.prompt, texts.new))
    read = rows * texts.prompt * keys.hidden * texts.itemsize
    last = keys.layers * own + max(own // 2, _logits(keys, texts))
    return read + keys.layers * across + max(across, last)


def _logits(keys: Keys, texts: Texts) -> int:
    """Return the bytes of the logits of one token as the next is chosen."""
    rows = texts.rows * texts.beams
    return rows * keys.vocabulary * (12 if texts.beams > 1 else 4 + texts.itemsize)
