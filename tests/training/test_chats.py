"""Chats in all the forms that rows have them, and texts of tokenizers that put a space before one."""

from __future__ import annotations

import copy
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from launcher.data.rows import RowProblem
from launcher.data.section import Data, Source
from launcher.errors import ConfigurationError
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from launcher.tasks.chat.template import ChatTemplate
from launcher.training.data.cache_key import cache_key
from launcher.training.data.prepare import prepare
from launcher.training.data.sources import open_source
from tests.distributed.data_world import byte_tokenizer, jsonl, plan_of
from tests.encoding import arrays_of
from tests.training.chat_world import (
    CHATS,
    MULTI,
    WEATHER,
    assistant,
    called,
    llama,
    spelled,
    template,
    user,
    with_template,
)

TRAIN = Source(path="unused.jsonl")
DATA = CausalColumns(train=TRAIN, messages="messages", date="2026-02-03")
CALLS = CHATS["tools"]["messages"]


def learned(row: dict[str, Any], tokenizer: Any, data: Data = DATA) -> tuple[str, list[str]]:
    """The whole text of a row, and its learned runs. Raises RowProblem."""
    task = CausalLM(data)
    task.prepare(tokenizer)
    arrays = arrays_of(task, row, tokenizer)
    ids, runs = arrays["input_ids"].tolist(), [[]]
    for token in arrays["targets"].tolist():
        if token >= 0:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return spelled(tokenizer, ids), [spelled(tokenizer, run) for run in runs if run]


def chat_tokenizer(name: str) -> Any:
    return with_template(byte_tokenizer(), name)


QWEN2, QWEN3, GPT_OSS = (chat_tokenizer(name) for name in ("qwen2.5", "qwen3", "gpt-oss"))


@pytest.mark.parametrize("name", ["chatml", "gemma-3", "qwen3", "llama-3.2", "command-r"])
def test_parts_are_the_text_that_they_hold(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in MULTI]
    assert learned({"messages": in_parts}, tokenizer) == learned({"messages": MULTI}, tokenizer)
    several = [
        user(["Hi ", {"type": "text", "text": "there"}]),
        assistant([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]),
    ]
    text, found = learned({"messages": several}, tokenizer)
    whole, expected = learned({"messages": MULTI[:2]}, tokenizer)
    assert (text.replace("Hithere", "Hi there") if name == "gemma-3" else text) == whole, (
        "it takes parts, and strips each"
    )
    assert found == expected


def test_a_template_that_takes_parts_alone_gets_parts() -> None:
    parts = (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' "
        "%}{{ part.text }}{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    text, found = learned({"messages": MULTI}, byte_tokenizer(parts))
    assert found == [" Hello!<|im_end|>", " Fine.<|im_end|>"]
    assert text.startswith("user: Hi there<|im_end|>\n")


def test_tools_of_the_row_go_before_those_of_the_job() -> None:
    other = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    job = DATA.model_copy(update={"tools": (WEATHER,)})
    with_tools = QWEN2.apply_chat_template(MULTI, tools=[WEATHER], tokenize=False)
    assert learned({"messages": MULTI}, QWEN2, job)[0] == with_tools
    for tools in ([WEATHER], json.dumps([WEATHER]), str([WEATHER])):
        assert learned({"messages": MULTI, "tools": tools}, QWEN2)[0] == with_tools
    assert learned({"messages": MULTI, "tools": [other]}, QWEN2, job)[0] == QWEN2.apply_chat_template(
        MULTI, tools=[other], tokenize=False
    )
    without = QWEN2.apply_chat_template(MULTI, tokenize=False)
    for row in ({}, {"tools": None}, {"tools": math.nan}, {"tools": []}, {"tools": " "}, {"tools": "null"}):
        assert learned({"messages": MULTI} | row, QWEN2)[0] == without
    named = DATA.model_copy(update={"tools": "functions"})
    assert (
        learned({"messages": MULTI, "tools": [other], "functions": [WEATHER]}, QWEN2, named)[0] == with_tools
    )


@pytest.mark.parametrize(
    ("row", "tools", "message"),
    [
        ({"tools": "{"}, None, "'tools' is text, and no list of tools as JSON or Python writes one"),
        ({"tools": {"name": "x"}}, None, "'tools' is not a list of tools"),
        ({"tools": ["x"]}, None, "'tools' is not a list of tools"),
        (
            {"tools": [WEATHER]},
            "functions",
            "missing key: no 'functions', which may be null; the row has 'messages', 'tools'",
        ),
    ],
)
def test_tools_that_cannot_be_used(row: dict[str, Any], tools: Any, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        learned({"messages": MULTI} | row, QWEN2, DATA.model_copy(update={"tools": tools}))


def test_tools_for_a_template_that_writes_none_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"data.tools.*writes no tools"):
        CausalLM(DATA.model_copy(update={"tools": "tools"})).prepare(byte_tokenizer())


def with_call(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"messages": [CALLS[0], {"role": "assistant", "tool_calls": [call]}, *CALLS[2:]]}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "qwen2.5",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": '
            "3}}\n</tool_call><|im_end|>",
        ),
        (
            "qwen3",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": '
            "3}}\n</tool_call><|im_end|>",
        ),
        (
            "deepseek-v3",
            '\n```json\n{"city": "Oslo", "days": '
            "3}\n```<|tool_call_end|><|tool_calls_end|><|end_of_sentence|>",
        ),
    ],
)
def test_arguments_are_given_as_the_template_takes_them(name: str, call: str) -> None:
    tokenizer = chat_tokenizer(name)
    arguments = {"city": "Oslo", "days": 3}
    for form in (arguments, json.dumps(arguments)):
        assert learned(with_call(form), tokenizer)[1][0].endswith(call)
    assert learned(with_call({"city": None}), QWEN2)[1][0].startswith(
        '<tool_call>\n{"name": "weather", "arguments": {"city": null}}'
    )


@pytest.mark.parametrize("tokenizer", [QWEN2, QWEN3, GPT_OSS])
@pytest.mark.parametrize("arguments", [{}, {"days": 3}, {"a": 1, "b": 2}, {"text": '"quoted" <b>\n\\'}])
@pytest.mark.parametrize("others", [{}, {"content": ""}, {"reasoning_content": "I must ask."}])
def test_a_call_is_learned_whatever_it_says(
    tokenizer: Any, arguments: dict[str, Any], others: dict[str, Any]
) -> None:
    row = {
        "messages": [
            CALLS[0],
            {"role": "assistant", "tool_calls": [called(**arguments)]} | others,
            *CALLS[2:],
            *MULTI,
        ]
    }
    _, found = learned(row, tokenizer)
    # gpt-oss leaves out thoughts before a later answer; a call ends with its own token.
    assert len(found) == 4
    assert json.dumps(arguments) in found[0] and "weather" in found[0] and "12 degrees" not in found[0]
    assert found[0].endswith("<|call|>" if tokenizer is GPT_OSS else "}\n</tool_call><|im_end|>")


@pytest.mark.parametrize("name", ["chatml", "smollm3", "zephyr"])
@pytest.mark.parametrize("content", ["Let me look.", ""])
def test_a_call_that_a_template_leaves_out_is_not_lost_quietly(name: str, content: str) -> None:
    row = {"messages": [CALLS[0], assistant(content, tool_calls=[called()]), *CALLS[2:]]}
    with pytest.raises(RowProblem, match="leaves out what message 2 says: a call of 'weather'"):
        learned(row, chat_tokenizer(name))


def test_thoughts_and_a_call_without_words_are_both_learned() -> None:
    row = {
        "messages": [
            CALLS[0],
            {"role": "assistant", "thinking": "I must ask.", "tool_calls": [called()]},
            CALLS[2],
        ]
    }
    [found] = learned(row, GPT_OSS)[1]
    assert found.startswith(
        "<|channel|>analysis<|message|>I must ask.<|end|><|start|>assistant to=functions.weather"
    )
    assert found.endswith("{}<|call|>")


def test_an_assistant_that_speaks_first_or_twice_or_not_at_all() -> None:
    tokenizer = byte_tokenizer()
    assert learned({"messages": [assistant("Welcome!"), *MULTI]}, tokenizer)[1][0] == "Welcome!<|im_end|>"
    assert learned({"messages": [assistant("Welcome!"), *MULTI]}, QWEN2)[1][0] == "Welcome!<|im_end|>", (
        "behind a system prompt of its own"
    )
    assert (
        learned({"messages": [assistant("Welcome!"), *MULTI]}, GPT_OSS)[1][0]
        == "<|channel|>final<|message|>Welcome!<|end|>"
    )
    assert learned({"messages": [user("Hi"), assistant([]), *MULTI]}, tokenizer)[1][0] == "<|im_end|>"
    twice = [user("Hi"), assistant("One."), assistant("Two."), assistant(""), user("..."), assistant('"!?"')]
    expected = ["One.<|im_end|>", "Two.<|im_end|>", "<|im_end|>", '"!?"<|im_end|>']
    assert learned({"messages": twice}, tokenizer)[1] == expected
    found = learned({"messages": twice}, GPT_OSS)[1]
    assert found == [
        f"<|channel|>final<|message|>{text}"
        for text in ("One.<|end|>", "Two.<|end|>", "<|end|>", '"!?"<|return|>')
    ]


@pytest.mark.parametrize(
    ("one", "end"),
    [
        ("'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'", "<|im_end|>"),
        ("m.role + ':' + m.content + '\n'", ""),
    ],
)
def test_a_template_without_a_generation_prompt(one: str, end: str) -> None:
    tokenizer = byte_tokenizer(f"{{% for m in messages %}}{{{{ {one} }}}}{{% endfor %}}")
    assert learned({"messages": MULTI}, tokenizer)[1] == [f"Hello!{end}", f"Fine.{end}"]
    assert learned({"messages": MULTI[1:]}, tokenizer)[1] == [f"Hello!{end}", f"Fine.{end}"], (
        "an assistant that speaks first"
    )


@pytest.mark.parametrize(
    "said",
    ["<|im_end|>", "a <|im_end|> b", "<|im_end|><|im_start|>assistant\n", '"', "</think>", " x ", "\n\n"],
)
def test_what_a_template_writes_may_be_said_too(said: str) -> None:
    row = {"messages": [user(said), assistant(said), user(said), assistant(said)]}
    text, found = learned(row, byte_tokenizer())
    assert "".join(found) == 2 * f"{said}<|im_end|>"
    assert text.count("<|im_start|>user\n") == 2


FRAGMENTS = [
    "Hello",
    "1",
    "é",
    "日本",
    "👍",
    "…",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
    "<b>",
    "</b>",
    '"q"',
    "'",
    "\\",
    "{",
    "}",
    "[INST]",
]
FRAGMENTS += ["<|im_end|>", "<|eot_id|>", "</s>", "<think>", "</think>", "/no_think", "user:"]
SAID = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)
RULES: dict[str, Callable[[str, bool], str]] = {
    "chatml": lambda said, last: f"{said}<|im_end|>",
    "llama-3.2": lambda said, last: f"{said.strip()}<|eot_id|>",
    "mistral-nemo": lambda said, last: f"{said}</s>",
    "gemma-3": lambda said, last: f"{said.strip()}<end_of_turn>",
    "gpt-oss": lambda said, last: f"<|channel|>final<|message|>{said}{'<|return|>' if last else '<|end|>'}",
    "vicuna": lambda said, last: f" {said}</s>",
}
"""What is learned of a turn, by what is said in it and whether it is the last."""


@pytest.mark.parametrize("name", RULES)
def test_whatever_is_said(name: str) -> None:
    chat = ChatTemplate(chat_tokenizer(name), DATA)

    @given(said=st.lists(SAID, min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0))
    @settings(max_examples=60, deadline=None, database=None)
    def held(said: list[str]) -> None:
        messages = [user(text) if number % 2 == 0 else assistant(text) for number, text in enumerate(said)]
        written = chat.written({"messages": messages}, "messages")
        expected = [
            RULES[name](text, number == len(said) - 1) for number, text in enumerate(said) if number % 2
        ]
        assert [written.text[start:end] for start, end in written.learned] == expected

    held()


def test_turns_that_are_not_to_be_learned() -> None:
    for tokenizer in (byte_tokenizer(), QWEN3, chat_tokenizer("smollm3")):
        whole, both = learned({"messages": MULTI}, tokenizer)
        for key, value in (("weight", 0), ("train", False)):
            turns = copy.deepcopy(MULTI)
            turns[1][key], turns[0][key] = value, value
            turns[3][key] = not value if key == "train" else 1
            assert learned({"messages": turns}, tokenizer) == (whole, both[1:])


def test_thoughts_that_a_prompt_closes_are_not_learned() -> None:
    # Told not to think, SmolLM3 gets empty thoughts in its prompt; its own marks, which take them, are left
    # aside here.
    text = template("smollm3").replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    tokenizer = with_template(byte_tokenizer(), "smollm3")
    tokenizer.chat_template = text
    row = [{"role": "system", "content": "Be brief. /no_think"}, *MULTI]
    whole, found = learned({"messages": row}, tokenizer)
    assert "<think>\n\n</think>\nHello!" in whole
    assert found == ["Hello!<|im_end|>", "Fine.<|im_end|>"]


def test_what_ends_generation_ends_a_turn(tmp_path: Path) -> None:
    chat_tokenizer("glm-4").save_pretrained(tmp_path)
    ends = [
        AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(token)
        for token in ("<|endoftext|>", "<|user|>", "<|observation|>")
    ]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert learned({"messages": MULTI}, tokenizer)[1] == ["\nHello!<|user|>", "\nFine."]
    assert learned(CHATS["tools"], tokenizer)[1] == ['weather\n{"city": "Oslo"}<|observation|>', "\nMild."]


def test_a_model_that_is_not_here_says_nothing_of_ends() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "nobody/nothing"
    assert learned({"messages": MULTI}, tokenizer)[1] == ["Hello!<|im_end|>", "Fine.<|im_end|>"]


def test_templates_by_name() -> None:
    tokenizer = chat_tokenizer("hermes-2-pro")
    assert "<tools>" in learned(CHATS["tools"], tokenizer)[0]
    assert "<tools>" not in learned({"messages": MULTI}, tokenizer)[0]
    tokenizer.chat_template = {"tool_use": tokenizer.chat_template["tool_use"]}
    assert learned(CHATS["tools"], tokenizer)[1][1] == "Mild.<|im_end|>"
    with pytest.raises(RowProblem, match="multiple chat templates with no default"):
        learned({"messages": MULTI}, tokenizer)
    tokenizer.chat_template = {"rag": "x", "other": "y"}
    with pytest.raises(
        ConfigurationError, match="the chat templates 'rag', 'other', and transformers takes 'default'"
    ):
        CausalLM(DATA).prepare(tokenizer)


def test_a_date_is_that_of_the_plan_and_part_of_the_key_where_it_is_written(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "a.jsonl", [{"messages": MULTI}])

    def keyed(tokenizer: Any, date: str) -> str:
        plan = plan_of(DATA.model_copy(update={"train": rows, "date": date}))
        task = CausalLM(plan.data)
        task.prepare(tokenizer)
        return cache_key(open_source(rows, task.columns), "train", plan, task, tokenizer)

    dated, plain = chat_tokenizer("llama-3.2"), byte_tokenizer()
    assert "Today Date: 03 Feb 2026\n" in learned({"messages": MULTI}, dated)[0]
    assert "Current date: 2026-02-03\n" in learned({"messages": MULTI}, GPT_OSS)[0]

    def today() -> str:
        return datetime.datetime.now().strftime("%d %b %Y")

    before = today()  # midnight may pass meanwhile
    theirs = dated.apply_chat_template(MULTI, tokenize=False)
    assert before in theirs or today() in theirs, "transformers' own clock goes on"
    undated = learned({"messages": MULTI}, dated, DATA.model_copy(update={"date": None}))[0]
    assert before in undated or today() in undated, "as of a plan of before"
    assert keyed(dated, "2026-02-03") != keyed(dated, "2026-02-04")
    assert keyed(plain, "2026-02-03") == keyed(plain, "2026-02-04")


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand() -> None:
    slow = ByT5Tokenizer()
    slow.chat_template = byte_tokenizer().chat_template
    task = CausalLM(DATA)
    task.prepare(slow)
    arrays = arrays_of(task, {"messages": MULTI}, slow)
    assert (
        arrays["input_ids"].tolist()
        == slow.apply_chat_template(MULTI, tokenize=True, return_dict=True)["input_ids"]
    )
    assert (
        slow.decode(arrays["targets"][arrays["targets"] >= 0].tolist()) == "Hello!<|im_end|>Fine.<|im_end|>"
    )


def test_a_slow_tokens_border_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(
        RowProblem, match="one lies across the border of what is learned; take a fast tokenizer"
    ):
        learned({"messages": [user("the c"), assistant("at sat")]}, tokenizer)


def test_parquet_says_what_json_says(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def row(name: str, **arguments: Any) -> dict[str, Any]:
        tool = {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {"properties": {key: {"type": "x"} for key in arguments}},
            },
        }
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "messages": [user("Ask"), {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [tool],
        }

    rows = [row("weather", city="Oslo"), row("add", a=2, b={"c": 3}), {"messages": MULTI, "tools": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": MULTI}]), tmp_path / "b.parquet")
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"a": 2, "b": {"c": 3}}
    found = []
    for name in ("a.parquet", "a.jsonl"):
        source = Source(path=str(tmp_path / name)) if name != "a.jsonl" else jsonl(tmp_path / name, rows)
        plan = plan_of(DATA.model_copy(update={"train": source}))
        found.append(prepare(source, "train", plan, CausalLM(plan.data), QWEN2))
    assert found[0].report.rows_used == found[1].report.rows_used == 3 and not found[0].report.dropped
    for number in range(3):
        one, other = (dataset.item(number)[0] for dataset in found)
        assert np.array_equal(one["input_ids"], other["input_ids"]) and np.array_equal(
            one["targets"], other["targets"]
        )
    several = Source(path=str(tmp_path / "*.parquet"))  # of which one has no tools
    plan = plan_of(DATA.model_copy(update={"train": several}))
    assert prepare(several, "train", plan, CausalLM(plan.data), QWEN2).report.rows_used == 4


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("How are you?", " I am fine."), ("Answer:", " The"), ("Answer:", "The"), ("a", "▁b"), ("H", "ello")],
)
def test_nothing_is_put_between_a_prompt_and_its_completion(prompt: str, completion: str) -> None:
    tokenizer = llama()
    data = CausalColumns(train=TRAIN, prompt="p", completion="c")
    whole, found = learned({"p": prompt, "c": completion}, tokenizer, data)
    assert whole.replace("▁", " ") == f" {prompt}{completion}</s>".replace("▁", " ")
    assert found == [f"{completion}</s>".replace("▁", " ")]
    apart = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    task = CausalLM(data)
    task.prepare(tokenizer)
    assert (
        arrays_of(task, {"p": prompt, "c": completion}, tokenizer)["input_ids"].tolist()[: len(apart)]
        == apart
    )
