"""What the sweep found, as the planner reads it (launcher/planner/model_support.json) and as people do
(docs/models.md).

python -m tests.families.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from launcher.planner.model.model_support import TABLE
from tests.families.causal import CANDIDATES, HEADS
from tests.families.encoders import KINDS
from tests.families.numbers import is_ok
from tests.families.sweep import RAW, as_lines
from tests.families.tiny import (
    AUDIO_CLASSIFICATION,
    CAUSAL_LM,
    IMAGE_CLASSIFICATION,
    IMAGE_TEXT_TO_TEXT,
    IMAGE_TO_TEXT,
    MASKED_LM,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    SEQUENCE_TO_SEQUENCE,
    SPEECH_RECOGNITION,
    TOKEN_CLASSIFICATION,
)

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_NOT_ITS_OWN = "its class adds to the loss what launcher does not compute"
_ALIKE = 40
"""Types that are refused for one reason, above which they stand in one line."""
_NOT_CAUSAL = "in its class tokens see those that come after them, so that it is no causal LM"


def table_of(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the planner's table: by task and model_type the ways that are right, the fastest first, or why
    there is none."""
    made: dict[str, Any] = {"versions": raw["versions"], "types": sorted(CONFIG_MAPPING_NAMES)}
    entries = {
        CAUSAL_LM: _causal,
        SEQUENCE_CLASSIFICATION: _classifier,
        **dict.fromkeys((*KINDS, IMAGE_CLASSIFICATION, IMAGE_TEXT_TO_TEXT), _other),
    }
    for task, entry in entries.items():
        made[task] = {kind: entry(found) for kind, found in sorted(raw[task].items()) if "+" not in kind}
    for task in (AUDIO_CLASSIFICATION, SPEECH_RECOGNITION):
        sounds = raw[task]
        made[task] = {kind: _audio(sounds, kind) for kind in sorted(sounds) if "+" not in kind}
    captions = raw[IMAGE_TO_TEXT]
    made[IMAGE_TO_TEXT] = {kind: _caption(captions, kind) for kind in sorted(captions) if "+" not in kind}
    return made


def _causal(found: dict[str, Any]) -> dict[str, Any]:
    if "tried" not in found:
        return {"refused": _plain(found["reason"])}
    if not found["causal"]:
        return {"refused": _NOT_CAUSAL}
    if not found["own_loss_is_cross_entropy"] and not found.get("own_loss_is_unshifted"):
        return {"refused": _NOT_ITS_OWN}
    ways = []
    for layout, attention in CANDIDATES:
        head = next(
            (head for head in HEADS if is_ok(found["tried"].get(f"{layout}/{attention}/{head}"))), None
        )
        if head is not None:
            ways.append(f"{layout} {attention} {head}")
    entry: dict[str, Any] = {"ways": ways} if ways else {"refused": "no way gives its own loss"}
    return entry | ({"encoder": True} if found.get("causal_without_is_decoder") is False else {})


def _classifier(found: dict[str, Any]) -> dict[str, Any]:
    right = [
        name.split("/") for name, said in found.get("tried", {}).items() if is_ok(said) and "left" not in name
    ]
    padded = [f"{layout} {attention}" for layout, attention in right if layout == "padded"]
    ways = padded or [f"{layout} {attention}" for layout, attention in right]
    return {"ways": ways} if ways else {"refused": _plain(found["reason"])}


def _other(found: dict[str, Any]) -> dict[str, Any]:
    ways: dict[str, str] = {}
    for name, said in found.get("tried", {}).items():
        layout, attention, head = name.split("/")
        if is_ok(said):
            ways.setdefault(f"{layout} {attention}", head)
    if not ways:
        return {"refused": _plain(found["reason"])}
    return {"ways": [way if head == "chunked" else f"{way} {head}" for way, head in ways.items()]}


def _audio(raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what is right of clips of any length, of a layer norm in place of a group norm, and of one length."""
    if "tried" not in raw[kind]:
        return {"refused": raw[kind]["reason"]}
    variant = f"{kind}+layer"
    others = {"layer": _among(raw[variant], "padded", "single")} if variant in raw else {}
    others["one_length"] = _among(raw[kind], "equal")
    entry: dict[str, Any] = {"ways": _among(raw[kind], "padded", "single")}
    return entry | {name: ways for name, ways in others.items() if ways != entry["ways"]}


def _caption(raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what is right of a model, and of each type that its encoder or decoder may be."""
    parts = {
        name.partition("+")[2]: _other(found)["ways"]
        for name, found in sorted(raw.items())
        if name.startswith(f"{kind}+")
    }
    return _other(raw[kind]) | ({"parts": parts} if parts else {})


def _among(found: dict[str, Any], *layouts: str) -> list[str]:
    """Return the ways of the first of these layouts that is right in any."""
    right = [name.split("/")[:2] for name, said in found["tried"].items() if is_ok(said)]
    for layout in layouts:
        if ways := [
            f"{_NAMES.get(layout, layout)} {attention}" for name, attention in right if name == layout
        ]:
            return ways
    return []


_NAMES = {"equal": "padded"}
"""What a layout of the sweep is called elsewhere."""


def _plain(reason: str) -> str:
    """The first line of a reason, without the Python error behind it."""
    return reason.partition(": ")[0] if ": " in reason else reason


def page_of(table: dict[str, Any]) -> str:
    """Return docs/models.md."""
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    lines = [
        HEAD.format(versions=versions),
        _section("Causal LMs", table[CAUSAL_LM]),
        _section("Classifiers", table[SEQUENCE_CLASSIFICATION]),
        _section("Masked LMs", table[MASKED_LM]),
        _section("Tags of words", table[TOKEN_CLASSIFICATION]),
        _section("Answers in a text", table[QUESTION_ANSWERING]),
        _section("Encoder-decoders", table[SEQUENCE_TO_SEQUENCE], "chunked"),
        _section("Classifiers of images", table[IMAGE_CLASSIFICATION]),
        _section("Images to text", table[IMAGE_TO_TEXT], "chunked"),
        _parts_of_images(table[IMAGE_TO_TEXT]["vision-encoder-decoder"]["parts"]),
        _section("Chats with images", table[IMAGE_TEXT_TO_TEXT], "chunked"),
        _section("Classifiers of sounds", table[AUDIO_CLASSIFICATION]),
        _more_of_sounds(table[AUDIO_CLASSIFICATION]),
        _section("Speech recognition", table[SPEECH_RECOGNITION]),
        _more_of_sounds(table[SPEECH_RECOGNITION]),
    ]
    return "\n".join(lines)


def _section(title: str, entries: dict[str, Any], loss: str = "forward") -> str:
    good = {kind: entry for kind, entry in entries.items() if "ways" in entry}
    refused = {kind: entry for kind, entry in entries.items() if "refused" in entry}
    lines = [
        f"## {title}",
        "",
        f"{len(good)} of {len(entries)} model types.",
        "",
        "| model_type | layout | attention | others | loss |",
        "|---|---|---|---|---|",
    ]
    for kind, entry in good.items():
        layout, attention, *head = entry["ways"][0].split()
        others = (
            ", ".join(
                dict.fromkeys(_attention(way) for way in entry["ways"][1:] if _attention(way) != attention)
            )
            or "-"
        )
        note = " (with `is_decoder: true`)" if entry.get("encoder") else ""
        lines.append(
            f"| `{kind}`{note} | {layout} | {attention} | {others} | {_LOSS[head[0] if head else loss]} |"
        )
    if refused:
        lines += ["", "Refused by `launcher plan`:", "", "| model_type | why |", "|---|---|"]
    reasons = [entry["refused"] for entry in refused.values()]
    alike = {reason: [kind for kind in refused if refused[kind]["refused"] == reason] for reason in reasons}
    for kind, entry in refused.items():
        others = alike[entry["refused"]]
        if len(others) <= _ALIKE:
            lines.append(f"| `{kind}` | {entry['refused']} |")
    for reason, kinds in alike.items():
        if len(kinds) > _ALIKE:
            lines += ["", f"And for one reason ({reason}): {', '.join(f'`{name}`' for name in kinds)}."]
    return "\n".join([*lines, ""])


def _more_of_sounds(entries: dict[str, Any]) -> str:
    """Return the layouts of sounds that hang on more than the type."""
    lines = [
        OTHER_SOUNDS,
        "| model_type | `feat_extract_norm: layer` | `pad_to_seconds: true` |",
        "|---|---|---|",
    ]
    for kind, entry in entries.items():
        if len(entry) > 1:
            ways = [entry.get(key, entry["ways"])[0].replace(" ", ", ") for key in ("layer", "one_length")]
            lines.append(f"| `{kind}` | {' | '.join(ways)} |")
    return "\n".join([*lines, ""])


def _parts_of_images(parts: dict[str, list[str]]) -> str:
    """Return which attentions are right of each type that an encoder or a decoder may be."""
    lines = [PARTS, "| its encoder or decoder | attention |", "|---|---|"]
    lines += [f"| `{kind}` | {', '.join(way.split()[1] for way in ways)} |" for kind, ways in parts.items()]
    return "\n".join([*lines, ""])


def _attention(way: str) -> str:
    layout, attention, *_ = way.split()
    return attention if layout == "packed" or attention == "packed" else f"{attention} ({layout})"


_LOSS = {
    "chunked": "chunks of the output matrix",
    "model": "chunks of its own head",
    "forward": "its own forward",
}
PARTS = """A vision-encoder-decoder model is made of two others. These were tried, the encoders with GPT-2 and the
decoders with ViT; another encoder, or another decoder that reads an encoder's output, is tried after loading, with
eager attention:
"""
OTHER_SOUNDS = """Of clips, two more settings change the layout. A feature encoder with a group norm
(`feat_extract_norm: group` in the config, the usual one) goes by all of a clip, and so by what is padded behind it; one
with layer norms does not. And with `data.pad_to_seconds` all clips are of one length:
"""
HEAD = """# Models

Every model type of transformers for each task that can be built small, with its layout: how its samples share a pass.
The layout is such that the loss is the one that the model's own class computes for each sample alone. The terms are
explained [with the data](guide-data.md#how-samples-share-a-pass). `attention` is what `auto` takes, `others` what
`model.attention` may ask for instead.

Made by `python -m tests.families.sweep` and `python -m tests.families.table`
with {versions}. For each type a tiny
model with random weights is built in fp32. The loss of 16 samples of 1 to 40 tokens, and the norm of its gradient, are
compared with those of each sample alone, by the class's own forward (of the tables after the second, 12 samples of 2
to 40 tokens; of images 4;
of sounds 3 clips of 0.3 to 0.41 s). The tolerances are 1e-5 and 1e-4, relative; where
rounding comes near to that, fp64 is used. Sliding windows, soft caps, multipliers, routers' losses and every kind of
layer of a hybrid are in these models.

Four settings in a config change which layout is right, and the planner looks for them:

- `rope_type: longrope` or `dynamic`: one sample a pass, where samples may be longer than the positions that the model
  began with;
- `alibi: true` of Falcon: eager attention;
- `is_decoder: false` of an encoder: refused as a causal LM;
- settings that let tokens see later ones (`is_causal: false`, `use_bidirectional_attention: true`): refused as a causal
  LM.

The first of them was tried with `token-classification` as well, and holds for every task.

The check after loading compares the effect of everything else in a config.

Nothing here was run on a GPU.
"""


def main() -> None:
    """Write both."""
    table = table_of(json.loads(RAW.read_text(encoding="utf-8")))
    TABLE.write_text(as_lines(table), encoding="utf-8")
    PAGE.write_text(page_of(table), encoding="utf-8")


if __name__ == "__main__":
    main()
