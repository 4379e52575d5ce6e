"""Chats as templates in the manner of 24 widely used models write them: the tokens are those of
`apply_chat_template`, and what is learned is what a reader would mark."""

from __future__ import annotations

import datetime
import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from tests.training.chat_world import CHATS, DOCS, TEMPLATES, TOKENS, llama, smollm2, spelled, with_template

DATA = CausalColumns(train=Source(path="unused.jsonl"), messages="messages", date="2026-02-03")


class Refused(str):
    """What is said of a chat that the template does not take."""


LEAVES_OUT = Refused("leaves out what message 2 says")
ALTERNATE = Refused("cannot write .* alternate")
NO_CONTENT = Refused("cannot write .* 'content'")


def turns(end: str, before: str = "", last: str | None = None) -> dict[str, Any]:
    """What is learned by a template that writes the same around every turn, the `last` aside, and no
    thoughts."""
    ends = (end, end if last is None else last)
    two = [f"{before}Hello!{ends[0]}", f"{before}Fine.{ends[1]}"]
    return {
        "single": [f"{before}Hello!{ends[1]}"],
        "multi": two,
        "system": two,
        "tools": LEAVES_OUT,
        "thinking": [f"{before}4{ends[0]}", f"{before}6{ends[1]}"],
    }


QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
EXPECTED: dict[str, dict[str, Any]] = {
    "chatml": turns("<|im_end|>"),
    "llama-2": turns(" </s>", " ") | {"tools": NO_CONTENT},
    "llama-3.2": turns("<|eot_id|>")
    | {"tools": ['{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "Mild.<|eot_id|>"]},
    "mistral-v0.1": turns("</s>") | {"system": ALTERNATE, "tools": ALTERNATE},
    # The system prompt stands before the last user's turn, so that earlier turns were written otherwise when
    # they were the last.
    "mistral-nemo": turns("</s>")
    | {
        "tools": [
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>',
            "Mild.</s>",
        ]
    },
    "qwen2.5": turns("<|im_end|>") | {"tools": [QWEN_CALL, "Mild.<|im_end|>"]},
    # Thoughts stand in the last turns alone; a prompt that lets the model think has none of them, so that
    # empty ones are its own as well.
    "qwen3": {
        "single": ["<think>\n\n</think>\n\nHello!<|im_end|>"],
        "multi": ["Hello!<|im_end|>", "<think>\n\n</think>\n\nFine.<|im_end|>"],
        "system": ["Hello!<|im_end|>", "<think>\n\n</think>\n\nFine.<|im_end|>"],
        "tools": [QWEN_CALL, "<think>\n\n</think>\n\nMild.<|im_end|>"],
        "thinking": ["4<|im_end|>", "<think>\nEasy too.\n</think>\n\n6<|im_end|>"],
    },
    # The prompt opens the thoughts.
    "qwen3-thinking": turns("<|im_end|>")
    | {
        "tools": [QWEN_CALL, "Mild.<|im_end|>"],
        "thinking": ["4<|im_end|>", "Easy too.\n</think>\n\n6<|im_end|>"],
    },
    "deepseek-v3": turns("<|end_of_sentence|>")
    | {
        "tools": [
            '<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json\n{"city": '
            '"Oslo"}\n```<|tool_call_end|>'
            "<|tool_calls_end|><|end_of_sentence|>",
            "Mild.<|end_of_sentence|>",
        ]
    },
    "deepseek-r1": turns("<|end_of_sentence|>"),
    "gemma-3": turns("<end_of_turn>") | {"tools": ALTERNATE},
    "phi-3": turns("<|end|>"),
    "phi-4": turns("<|im_end|>"),
    "zephyr": turns("</s>"),
    "command-r": turns("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>")
    | {
        "tools": [
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": '
            '"Oslo"}}]<|END_ACTION|>'
            "<|END_OF_TURN_TOKEN|>",
            "<|START_RESPONSE|>Mild.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ]
    },
    # A turn in the middle ends otherwise than the last one, and a call otherwise than both.
    "gpt-oss": turns("<|end|>", "<|channel|>final<|message|>", "<|return|>")
    | {
        "tools": [
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
            "<|channel|>final<|message|>Mild.<|return|>",
        ],
        "thinking": [
            "<|channel|>final<|message|>4<|end|>",
            "<|channel|>analysis<|message|>Easy "
            "too.<|end|><|start|>assistant<|channel|>final<|message|>6<|return|>",
        ],
    },
    # It marks itself what is generated, and takes the header for that too.
    "smollm3": turns("<|im_end|>\n", "<|im_start|>assistant\n"),
    "granite-3": turns("<|end_of_text|>")
    | {
        "tools": [
            '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]<|end_of_text|>',
            "Mild.<|end_of_text|>",
        ]
    },
    "olmo-2": turns("<|endoftext|>"),
    "falcon": turns("", " "),
    "vicuna": turns("</s>", " "),
    "nemotron-4": turns(""),
    # Nothing but the next turn's first token ends one; that it ends generation, the model's generation config
    # says.
    "glm-4": turns("", "\n") | {"tools": ['weather\n{"city": "Oslo"}', "\nMild."]},
    "hermes-2-pro": turns("<|im_end|>")
    | {
        "tools": [
            '<tool_call>\n{"arguments": {"city": "Oslo"}, "name": "weather"}\n</tool_call><|im_end|>',
            "Mild.<|im_end|>",
        ]
    },
}


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The date of DATA, for transformers' own rendering too."""
    day = datetime.datetime.fromisoformat(str(DATA.date))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: day))


def test_every_template_is_here() -> None:
    assert (
        EXPECTED.keys() == TOKENS.keys() == {path.name.removesuffix(".jinja") for path in TEMPLATES.iterdir()}
    )
    assert len(EXPECTED) >= 20


@pytest.mark.parametrize("base", [smollm2, llama])
@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_are_the_templates_and_the_learned_ones_a_readers(name: str, base: Any) -> None:
    tokenizer = with_template(base(), name)
    task = CausalLM(DATA)
    task.prepare(tokenizer)
    for kind, row in CHATS.items():
        [encoded] = task.encode([row], tokenizer)
        if isinstance(expected := EXPECTED[name][kind], Refused):
            assert isinstance(encoded, RowProblem) and re.search(expected, encoded.detail), (kind, encoded)
            continue
        assert not isinstance(encoded, RowProblem), (kind, encoded)
        messages = row["messages"]
        if name == "deepseek-v3" and kind == "tools":  # which takes arguments as text alone
            call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            messages = [messages[0], {"role": "assistant", "tool_calls": [call]}, *messages[2:]]
        whole = tokenizer.apply_chat_template(
            messages, tools=row.get("tools"), tokenize=True, return_dict=True
        )["input_ids"]
        ids, targets = encoded.arrays["input_ids"].tolist(), encoded.arrays["targets"].tolist()
        assert ids == whole, kind
        runs = itertools.groupby(range(len(ids)), key=lambda place: place > 0 and targets[place - 1] >= 0)
        found = [spelled(tokenizer, [ids[place] for place in run]) for learned, run in runs if learned]
        if base is llama:  # which puts a space behind each special token as well
            found, expected = ([text.replace(" ", "") for text in texts] for texts in (found, expected))
        assert found == expected, kind


def test_the_docs_have_them_all() -> None:
    rows = re.findall(
        r"^\| `([\w.-]+)` \|", (DOCS / "chat-templates.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert rows == list(EXPECTED)
