"""Chat templates re-made in the manner of widely used models, tokenizers that have their tokens, and chats."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launcher.training.demo.models import PACKAGES, _find

TEMPLATES = Path(__file__).parent / "chat_templates"
DOCS = Path(__file__).parents[2] / "docs"
CHATML = "<|im_start|> <|im_end|> <tool_call> </tool_call> <tool_response> </tool_response> <think> </think>"
DEEPSEEK = (
    "<|User|> <|Assistant|> <|end_of_sentence|> <|tool_calls_begin|> <|tool_calls_end|> "
    "<|tool_call_begin|> <|tool_call_end|> <|tool_sep|>"
)
TOKENS = {
    "chatml": CHATML,
    "llama-2": "<s> </s>",
    "llama-3.2": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "mistral-v0.1": "<s> </s>",
    "mistral-nemo": "<s> </s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] "
    "[/AVAILABLE_TOOLS]",
    "qwen2.5": CHATML,
    "qwen3": CHATML,
    "qwen3-thinking": CHATML,
    "deepseek-v3": f"<|begin_of_sentence|> {DEEPSEEK} <|tool_outputs_begin|> <|tool_outputs_end|>"
    " <|tool_output_begin|> <|tool_output_end|>",
    "deepseek-r1": f"<|begin_of_sentence|> {DEEPSEEK} <think> </think>",
    "gemma-3": "<bos> <start_of_turn> <end_of_turn> <start_of_image>",
    "phi-3": "<|user|> <|assistant|> <|system|> <|end|> <|endoftext|>",
    "phi-4": "<|im_start|> <|im_sep|> <|im_end|>",
    "zephyr": "<s> </s>",
    "command-r": "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|>"
    " <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|> <|START_ACTION|> <|END_ACTION|>"
    " <|START_TOOL_RESULT|> <|END_TOOL_RESULT|>",
    "gpt-oss": "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
    "smollm3": CHATML,
    "granite-3": "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|tool_call|>",
    "olmo-2": "<|endoftext|>",
    "falcon": "<|endoftext|>",
    "vicuna": "<s> </s>",
    "nemotron-4": "<extra_id_0> <extra_id_1> <s> </s>",
    "glm-4": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>",
    "hermes-2-pro": CHATML,
}
"""The tokens that each has for its template."""
BEGINNINGS = {
    "llama-3.2": "<|begin_of_text|>",
    "deepseek-v3": "<|begin_of_sentence|>",
    "deepseek-r1": "<|begin_of_sentence|>",
    "gemma-3": "<bos>",
    "command-r": "<BOS_TOKEN>",
    "olmo-2": "<|endoftext|>",
}
ENDS = {
    "llama-3.2": "<|eot_id|>",
    "deepseek-v3": "<|end_of_sentence|>",
    "deepseek-r1": "<|end_of_sentence|>",
    "gemma-3": "<end_of_turn>",
    "phi-4": "<|im_end|>",
    "command-r": "<|END_OF_TURN_TOKEN|>",
    "gpt-oss": "<|return|>",
    "granite-3": "<|end_of_text|>",
} | dict.fromkeys(("phi-3", "olmo-2", "falcon", "glm-4"), "<|endoftext|>")
"""The end token of each; of those that are not here `</s>`, or of ChatML's kind `<|im_end|>`."""


def template(name: str) -> Any:
    """A chat template, or templates by their names."""
    if (path := TEMPLATES / f"{name}.jinja").is_file():
        return path.read_text(encoding="utf-8")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((TEMPLATES / name).iterdir())}


@functools.cache
def smollm2() -> Any:
    """SmolLM2's byte-level tokenizer, as of no directory; the model itself is not unpacked, which takes
    longer."""
    file = _find("smollm2-135m", PACKAGES["smollm2-135m"])
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.name_or_path = ""
    return tokenizer


@functools.cache
def llama() -> Any:
    """A tokenizer as Llama 2's: BPE over characters, bytes for others, a space before a text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    lines = [
        "▁the▁weather▁in▁Oslo▁is▁fine▁.",
        "▁Hello▁!▁How▁are▁you▁?",
        "▁a▁user▁and▁an▁assistant▁talk",
        "▁ask▁,▁think▁and▁answer",
    ] * 4
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # Bytes are no tokens that a text is cut at.
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}],
    }
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_template(tokenizer: Any, name: str) -> Any:
    """A copy of a tokenizer with the template `name`, and the tokens that it writes."""
    tokenizer = copy.deepcopy(tokenizer)
    tokens = TOKENS[name].split()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [token for token in tokens if token not in ("<s>", "</s>")]}
    )
    tokenizer.add_special_tokens({"bos_token": BEGINNINGS.get(name, "<s>")})
    tokenizer.add_special_tokens(
        {"eos_token": ENDS.get(name, "<|im_end|>" if "<|im_end|>" in tokens else "</s>")}
    )
    tokenizer.chat_template = template(name)
    return tokenizer


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """The text of some tokens, to the last space."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids("<0x0A>") or 0) != "<0x0A>":
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return "".join(
        chr(int(token[3:5], 16)) if token.startswith("<0x") else token.replace("▁", " ") for token in tokens
    )


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | others


def called(**arguments: Any) -> dict[str, Any]:
    """A call of the tool below."""
    return {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Ask.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SINGLE = [user("Hi there"), assistant("Hello!")]
MULTI = [*SINGLE, user("How are you?"), assistant("Fine.")]
CHATS: dict[str, dict[str, Any]] = {
    "single": {"messages": SINGLE},
    "multi": {"messages": MULTI},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *MULTI]},
    "tools": {
        "messages": [
            user("Weather in Oslo?"),
            {"role": "assistant", "tool_calls": [called(city="Oslo")]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "12 degrees"},
            assistant("Mild."),
        ],
        "tools": [WEATHER],
    },
    "thinking": {
        "messages": [
            user("2+2?"),
            assistant("4", reasoning_content="That is easy."),
            user("3+3?"),
            assistant("6", reasoning_content="Easy too."),
        ]
    },
}
