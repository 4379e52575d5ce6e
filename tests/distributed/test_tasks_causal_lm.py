from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast, XGLMTokenizer

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Data, Source
from launcher.errors import ConfigurationError
from launcher.tasks.causal_lm import CausalColumns
from launcher.tasks.encoding import Around, around
from launcher.tasks.generation import Evaluation, Generate
from launcher.tasks.task import Output, Sample, Task
from launcher.tasks.writing import from_bytes
from tests.distributed.data_world import MARKED, byte_tokenizer, plan_of
from tests.encoding import arrays_of

TRAIN = Source(path="unused.jsonl")
TEXT = CausalColumns(train=TRAIN, text="text")
PROMPTED = CausalColumns(train=TRAIN, prompt="question", completion="answer")
CHAT = CausalColumns(train=TRAIN, messages="messages")
TOKENIZER = byte_tokenizer()


def task_of(data: Data, tokenizer: Any = TOKENIZER) -> Task:
    return tasks.build(plan_of(data), tokenizer)


def learned(arrays: dict[str, np.ndarray], tokenizer: Any = TOKENIZER) -> str:
    """The text of the supervised tokens."""
    return str(tokenizer.decode(arrays["targets"][arrays["targets"] >= 0].tolist()))


def check_shift(arrays: dict[str, np.ndarray]) -> None:
    ids, targets = arrays["input_ids"], arrays["targets"]
    assert ids.dtype == targets.dtype == np.int32
    assert len(ids) == len(targets)
    assert targets[-1] == -100
    given = targets[:-1] >= 0
    assert np.array_equal(targets[:-1][given], ids[1:][given])


def test_text_is_learned_whole_and_ends() -> None:
    arrays = arrays_of(task_of(TEXT), {"text": "the cat sat"}, TOKENIZER)
    check_shift(arrays)
    assert TOKENIZER.decode(arrays["input_ids"].tolist()) == "the cat sat<|im_end|>"
    assert (arrays["targets"][:-1] >= 0).all()


def test_a_tokenizer_that_begins_texts_does_so_once() -> None:
    tokenizer = byte_tokenizer(bos=True)
    arrays = arrays_of(task_of(PROMPTED, tokenizer), {"question": "the cat", "answer": " sat"}, tokenizer)
    assert tokenizer.decode(arrays["input_ids"].tolist()) == "<s>the cat sat<|im_end|>"
    assert learned(arrays, tokenizer) == " sat<|im_end|>"


def test_a_text_begins_with_what_the_tokenizer_puts_there_though_it_is_no_beginning_token() -> None:
    """XGLM's has `<s>`, and begins every text with `</s>`."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581the", "\u2581cat", "\u2581sat"]
    tokenizer = XGLMTokenizer(vocab=[(piece, -float(number)) for number, piece in enumerate(pieces)])
    begin, end = tokenizer.eos_token_id, tokenizer.eos_token_id
    assert tokenizer("the cat")["input_ids"] == [begin, 4, 5] and tokenizer.bos_token_id != begin
    arrays = arrays_of(task_of(TEXT, tokenizer), {"text": "the cat"}, tokenizer)
    assert arrays["input_ids"].tolist() == [*tokenizer("the cat")["input_ids"], end]
    task, row = task_of(PROMPTED, tokenizer), {"question": "the cat", "answer": " sat"}
    arrays = arrays_of(task, row, tokenizer)
    assert arrays["input_ids"].tolist() == [*tokenizer("the cat sat")["input_ids"], end]
    assert arrays["targets"].tolist() == [-100, -100, 6, end, -100]
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=1))
    task.for_prediction = True
    assert arrays_of(task, row, tokenizer)["input_ids"].tolist() == tokenizer("the cat")["input_ids"]


def test_what_stands_around_a_text_is_found_without_a_letter_to_try_it_with() -> None:
    """A tokenizer of bases alone, which has no `a` and no unknown token."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "C", "G"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    named = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=named)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a")["input_ids"] == [0, 1]
    assert around(tokenizer) == Around((0,), (1,))
    arrays = arrays_of(task_of(TEXT, tokenizer), {"text": "CG"}, tokenizer)
    assert arrays["input_ids"].tolist() == [0, 2, 3, 1]


def test_a_text_that_ends_with_the_end_token_gets_no_second_one() -> None:
    whole = arrays_of(task_of(TEXT), {"text": "the cat sat<|im_end|>"}, TOKENIZER)
    assert whole["input_ids"].tolist() == TOKENIZER("the cat sat<|im_end|>")["input_ids"]
    for answer in (" sat", " sat<|im_end|>"):
        arrays = arrays_of(task_of(PROMPTED), {"question": "the cat", "answer": answer}, TOKENIZER)
        assert TOKENIZER.decode(arrays["input_ids"].tolist()) == "the cat sat<|im_end|>"
        assert learned(arrays) == " sat<|im_end|>"


def test_of_prompt_and_completion_the_completion_is_learned() -> None:
    arrays = arrays_of(task_of(PROMPTED), {"question": "the ca", "answer": "t sat"}, TOKENIZER)
    check_shift(arrays)
    assert learned(arrays) == "t sat<|im_end|>"
    # No token spans the border, though "the cat" together has a token that would.
    apart = TOKENIZER("the ca", add_special_tokens=False)["input_ids"]
    assert arrays["input_ids"].tolist()[: len(apart)] == apart
    assert TOKENIZER("the cat", add_special_tokens=False)["input_ids"][: len(apart)] != apart


@pytest.mark.parametrize(
    "row", [{"question": "x"}, {"question": " ", "answer": "y"}, {"question": "x", "answer": None}]
)
def test_prompt_and_completion_both_need_text(row: dict[str, Any]) -> None:
    with pytest.raises(RowProblem, match=r"missing key|empty"):
        arrays_of(task_of(PROMPTED), row, TOKENIZER)


def test_a_prompt_that_fills_the_sample_leaves_nothing_to_learn() -> None:
    data = PROMPTED.model_copy(update={"max_length": 8})
    with pytest.raises(RowProblem, match="nothing left to learn: what is not learned fills max_length = 8"):
        arrays_of(task_of(data), {"question": "xyz" * 20, "answer": "y"}, TOKENIZER)


def test_a_cut_sample_stays_shifted() -> None:
    data = PROMPTED.model_copy(update={"max_length": 8})
    arrays = arrays_of(task_of(data), {"question": "xq", "answer": "zyx" * 9}, TOKENIZER)
    check_shift(arrays)
    assert len(arrays["input_ids"]) == 8
    assert learned(arrays) == "zyxzyx"


TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "a dog <|im_end"},
]


def test_of_a_chat_the_assistants_turns_are_learned() -> None:
    arrays = arrays_of(task_of(CHAT), {"messages": TALK}, TOKENIZER)
    check_shift(arrays)
    assert learned(arrays) == "the cat<|im_end|>a dog <|im_end<|im_end|>"
    whole = TOKENIZER.apply_chat_template(TALK, tokenize=False)
    assert TOKENIZER.decode(arrays["input_ids"].tolist()) == whole
    # What the model reads before its turn is what it will read when it is asked.
    prompt = TOKENIZER(TOKENIZER.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True))[
        "input_ids"
    ]
    assert arrays["input_ids"].tolist()[: len(prompt)] == prompt


def test_a_template_that_marks_turns_learns_the_same() -> None:
    marked = byte_tokenizer(MARKED)
    ours, theirs = (
        arrays_of(task_of(CHAT), {"messages": TALK}, TOKENIZER),
        arrays_of(task_of(CHAT, marked), {"messages": TALK}, marked),
    )
    assert learned(ours) == learned(theirs, marked)
    assert TOKENIZER.decode(ours["input_ids"].tolist()) == marked.decode(theirs["input_ids"].tolist())


def test_a_template_that_rewrites_earlier_turns() -> None:
    # As reasoning models do: only the last turn keeps its thoughts.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}{{ m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    arrays = arrays_of(
        task_of(CHAT, tokenizer),
        {"messages": [*TALK[:4], {"role": "assistant", "content": "a dog"}]},
        tokenizer,
    )
    assert learned(arrays, tokenizer) == "the cat<|im_end|>(thought)a dog<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "depends on what messages say"),
        (
            "{% for m in messages %}{{ m['content'][:3] }}{{ messages[-1]['content'][3:] }}{% endfor %}",
            "writes message 5 among others",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            "leaves out what message 3 says",
        ),
    ],
)
def test_a_template_whose_turns_cannot_be_told(template: str, message: str) -> None:
    tokenizer = byte_tokenizer(template)
    with pytest.raises(RowProblem, match=message):
        arrays_of(task_of(CHAT, tokenizer), {"messages": TALK}, tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "missing key"),
        ("hi", "not a list of messages"),
        ([{"content": "x"}], "not a list of messages"),
        ([], "empty"),
        (TALK[:2], "no message has the role 'assistant'"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}],
            "the content of message 2 is a int, not text",
        ),
        ([{"role": "assistant", "content": {"a": "b"}}], "the content of message 1 is a dict, not text"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "message 1 has a part of type 'image'"),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": 3}]}],
            "message 1 has a part of type 'text'",
        ),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "weight of message 1 is 0.5"),
        ([{"role": "assistant", "content": "x", "train": "no"}], "train of message 1 is 'no'"),
        (
            [{"role": "assistant", "content": "x", "weight": 0}],
            "every assistant message has weight 0 or train false",
        ),
        ([{"role": "assistant"}], "the chat template cannot write"),
        ([{"role": "assistant", "content": "x"}] * 1023, "1,023 messages; a chat may have 1,022"),
        ([{"role": "assistant", "content": "\ud800"}], "not UTF-8"),
    ],
)
def test_chats_that_cannot_be_used(messages: Any, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        arrays_of(task_of(CHAT), {"messages": messages}, TOKENIZER)


def test_none_in_a_message_is_an_absent_key() -> None:
    plain = arrays_of(task_of(CHAT), {"messages": TALK}, TOKENIZER)
    padded = arrays_of(
        task_of(CHAT), {"messages": [{**message, "tool_calls": None} for message in TALK]}, TOKENIZER
    )
    assert np.array_equal(plain["input_ids"], padded["input_ids"])


def test_a_batch_gives_what_single_rows_give() -> None:
    rows = [{"text": "the cat"}, {"text": ""}, {"text": "a dog ran"}]
    task = task_of(TEXT)
    one, problem, other = task.encode(rows, TOKENIZER)
    assert isinstance(problem, RowProblem)
    for row, result in ((rows[0], one), (rows[2], other)):
        assert not isinstance(result, RowProblem)
        assert np.array_equal(result.arrays["input_ids"], arrays_of(task, row, TOKENIZER)["input_ids"])


def test_tokenizers_that_cannot_serve() -> None:
    without = byte_tokenizer()
    without.eos_token = None
    with pytest.raises(ConfigurationError, match="no end-of-text token"):
        task_of(TEXT, without)
    with pytest.raises(ConfigurationError, match="a chat template"):
        task_of(CHAT, byte_tokenizer(template=None))
    with pytest.raises(
        ConfigurationError,
        match=r"no such task; there are audio-classification, causal-lm, .*the nearest is image-classification",
    ):
        tasks.build(plan_of(TEXT).model_copy(update={"task": "vision"}), TOKENIZER)


def sample(*ids: int) -> Sample:
    array = np.array(ids, dtype=np.int32)
    arrays = {"input_ids": array, "targets": np.append(array[1:], -100).astype(np.int32)}
    return Sample(arrays, id=0, length=len(ids))


def test_collating_joins_samples_end_to_end() -> None:
    batch = task_of(TEXT).collate([[sample(1, 2, 3), sample(4)], [sample(5, 6).as_filler()]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["targets"].tolist() == [2, 3, -100, -100, -100, -100]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 4, 6]
    assert (batch["max_length"], batch["lengths"]) == (3, [3, 1, 2])
    assert {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "targets": torch.int64,
        "cu_seq_lens": torch.int32,
    }


def test_collating_pads_on_the_right_where_samples_cannot_be_joined() -> None:
    task = task_of(TEXT)
    task.layout = "padded"
    batch = task.collate([[sample(1, 2, 3), sample(4)], [sample(5, 6).as_filler()]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["targets"].tolist() == [2, 3, -100, -100, -100, -100, -100, -100, -100]
    assert batch["lengths"] == [3, 1, 2]
    assert "position_ids" not in batch and "cu_seq_lens" not in batch
    assert "attention_mask" not in task.collate([[sample(1, 2)], [sample(3, 4)]])


def test_an_example_is_collated_like_any_sample() -> None:
    task = task_of(TEXT)
    batch = task.collate([[task.example(3)], [task.example(2)]])
    assert batch["lengths"] == [3, 2] and batch["targets"].shape == (5,)


def seen(
    loss_sum: float, num_correct: float, num_supervised: int, router_loss_sum: float | None = None
) -> list[np.ndarray]:
    """What an evaluation of one micro-batch leaves on a rank; as many positions again are not supervised."""
    evaluator = task_of(TEXT).evaluator()
    router = None if router_loss_sum is None else torch.tensor(router_loss_sum)
    output = Output(torch.tensor(loss_sum), torch.tensor(num_correct), None, router)
    evaluator.update(output, {"targets": torch.tensor([7] * num_supervised + [-100] * num_supervised)})
    return evaluator.state()


def test_metrics() -> None:
    compute = task_of(TEXT).evaluator().compute
    expected = {"loss": 2.0, "perplexity": math.exp(2.0), "accuracy": 0.4}
    assert compute([seen(20.0, 4, 10)]) == expected
    assert compute([seen(15.0, 1, 4), seen(5.0, 3, 6)]) == expected, "over two ranks"
    assert compute([seen(1e6, 4, 10)])["perplexity"] == math.inf
    # The routers' loss is part of the loss, and says nothing of how well tokens are foreseen.
    assert compute([seen(20.0, 4, 10, 5.0)])["perplexity"] == math.exp(1.5)


def writing(data: Data, **keys: Any) -> Any:
    task = task_of(data)
    task.evaluation = Evaluation(generate=Generate(**keys))
    return task


def asked(task: Any, row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What is asked of a row, and what the answer is held to; another row beside it is longer."""
    longer = {"question": "a dog ran in the park ?" * 3, "answer": "x", "messages": [*TALK[:3], *TALK[1:]]}
    rows = [Sample(arrays_of(task, one, TOKENIZER), number, 0) for number, one in enumerate((row, longer))]
    for sample in rows:
        sample.length = len(sample["input_ids"])
    prompts = task.prompts(rows)
    assert prompts["attention_mask"][1].all() and not prompts["attention_mask"][0].all()
    assert (prompts["input_ids"][0][-1:] != task.generation.arguments["pad_token_id"]).all(), (
        "padded on the left"
    )
    texts = [
        TOKENIZER.decode(ids[mask.bool()].tolist())
        for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
    ]
    return texts, task.collate([[one] for one in rows])["aside"]["references"]


def test_the_model_writes_behind_a_prompt() -> None:
    texts, references = asked(writing(PROMPTED), {"question": "the ca", "answer": "t sat"})
    assert texts[0] == "the ca" and references[0] == ["t sat"]


def test_of_a_chat_the_last_turn_is_written() -> None:
    task = writing(CHAT)
    texts, references = asked(task, {"messages": TALK})
    last = max(number for number, message in enumerate(TALK) if message["role"] == "assistant")
    assert texts[0] == TOKENIZER.apply_chat_template(TALK[:last], tokenize=False, add_generation_prompt=True)
    assert references[0] == [TALK[last]["content"]]
    assert TOKENIZER.convert_tokens_to_ids("<|im_end|>") in task.generation.arguments["eos_token_id"]


def test_a_reference_is_whole_though_its_sample_is_cut() -> None:
    task = writing(PROMPTED.model_copy(update={"max_length": 12}))
    [encoded] = task.encode([{"question": "the cat", "answer": "a dog ran in the park " * 4}], TOKENIZER)
    assert encoded.cut and from_bytes(encoded.arrays["references"]) == [
        ("a dog ran in the park " * 4).strip()
    ]


def test_rows_that_are_asked_need_no_answer() -> None:
    task, chat = writing(PROMPTED), writing(CHAT)
    for one in (task, chat):
        one.for_prediction = True
    ids = arrays_of(task, {"question": "the cat"}, TOKENIZER)["input_ids"]
    assert TOKENIZER.decode(ids.tolist()) == "the cat"
    for messages in (TALK[:2], TALK[:3]):
        ids = arrays_of(chat, {"messages": messages}, TOKENIZER)["input_ids"]
        expected = TOKENIZER.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
        assert TOKENIZER.decode(ids.tolist()) == expected, "an answer that is there already is left out"
    with pytest.raises(RowProblem, match="no message that the assistant could answer"):
        arrays_of(chat, {"messages": [{"role": "assistant", "content": "x"}]}, TOKENIZER)
    with pytest.raises(RowProblem, match="too long"):
        arrays_of(task, {"question": "the cat " * 2000}, TOKENIZER)


def test_plain_text_asks_nothing() -> None:
    found = [one.problem for one in writing(TEXT.model_copy(update={"evaluation": TRAIN})).checks()]
    assert [problem.key for problem in found] == ["evaluation.generate"] and "plain text" in found[0].reason
