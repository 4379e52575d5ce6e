from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.errors import ConfigurationError
from launcher.tasks.masked_lm import MaskedColumns, MaskedLM
from launcher.tasks.task import AnswerOptions, Draws, Encoded, Sample
from launcher.training.model import attention
from tests.distributed.data_world import plan_of, word_tokenizer
from tests.distributed.test_tasks_token_classification import TOKENIZER

MASK = TOKENIZER.mask_token_id
TEXT = "some words that are hidden, 12 of them and more than that"
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def task_of(tokenizer: Any = TOKENIZER, **settings: Any) -> MaskedLM:
    data = MaskedColumns(
        **{"train": Source(path="unused.jsonl"), "text": "text", "max_length": 64, **settings}
    )
    task = tasks.build(plan_of(data, "masked-lm"), tokenizer)
    assert isinstance(task, MaskedLM)
    task.configure(BertConfig(**SIZES))
    task.layout = "padded"
    return task


def pieces_of(task: MaskedLM, row: dict[str, Any]) -> tuple[Encoded, ...]:
    [found] = task.encode([row], TOKENIZER)
    if isinstance(found, RowProblem):
        raise found
    return found


def samples_of(task: MaskedLM, *texts: str) -> list[Sample]:
    rows = [pieces_of(task, {"text": text}) for text in texts]
    return [Sample(part.arrays, number, part.length) for number, parts in enumerate(rows) for part in parts]


def test_a_text_is_as_the_tokenizer_has_it() -> None:
    [piece] = pieces_of(task_of(), {"text": TEXT})
    assert piece.arrays["input_ids"].tolist() == TOKENIZER(TEXT)["input_ids"]
    assert piece.arrays["units"].tolist() == [-1, *range(piece.length - 2), -1]
    assert piece.num_supervised == round(0.15 * (piece.length - 2))
    [whole] = pieces_of(task_of(mask_whole_words=True), {"text": "some words"})
    assert whole.arrays["units"].tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]


def test_of_a_long_text_nothing_is_lost() -> None:
    pieces = pieces_of(task_of(max_length=16), {"text": TEXT})
    assert len(pieces) == 4 and max(piece.length for piece in pieces) == 16
    joined = [token for piece in pieces for token in piece.arrays["input_ids"].tolist()[1:-1]]
    assert joined == TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    assert not any(piece.cut for piece in pieces)
    [first] = pieces_of(task_of(max_length=16, long_texts="first"), {"text": TEXT})
    assert first.cut and first.arrays["input_ids"].tolist() == pieces[0].arrays["input_ids"].tolist()
    with pytest.raises(RowProblem, match="too long: 48 tokens, and max_length is 16"):
        pieces_of(task_of(max_length=16, too_long="drop"), {"text": TEXT})


def test_several_columns_are_one_text() -> None:
    task = task_of(text=("title", "body"))
    assert task.columns == ("title", "body")
    assert task.texts({"title": "a", "body": "b"}) == ["a\nb"]
    with pytest.raises(RowProblem, match="missing key: no 'body'"):
        pieces_of(task, {"title": "a"})


@pytest.mark.parametrize(
    "row", [{"text": None}, {"text": " "}, {"text": ["a"]}, {"text": "[MASK] [SEP]"}, {"text": "\ufe0f"}]
)
def test_rows_that_cannot_be_used(row: dict[str, Any]) -> None:
    with pytest.raises(
        RowProblem,
        match=r"missing key|empty|value that cannot be used|nothing left to learn: it has special tokens alone",
    ):
        pieces_of(task_of(), row)


def test_a_tokenizer_without_a_mask_and_models_that_cannot_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="its tokenizer has no mask token"):
        task_of(word_tokenizer())
    slow = types.SimpleNamespace(is_fast=False, mask_token_id=4, name_or_path="some/model")
    with pytest.raises(ConfigurationError, match=r"write data\.mask_whole_words: false"):
        task_of(slow, mask_whole_words=True)
    with pytest.raises(ConfigurationError, match="a t5 model reads one sequence and writes another"):
        task_of().adopt(T5Config())
    with pytest.raises(
        ConfigurationError,
        match=r"its mask is token 4, and its embedding has 4 rows; write model\.resize_embeddings",
    ):
        task_of().adopt(BertConfig(vocab_size=4))
    [problem] = MaskedLM(MaskedColumns(train=Source(path="t.jsonl"))).checks()
    assert str(problem.problem) == "data.text: is missing: masked-lm reads a column of text, or several"


def test_masks_hang_on_seed_step_and_sample_alone() -> None:
    task = task_of()
    one, two = samples_of(task, TEXT, TEXT)
    first = task.hidden(one, Draws(0, 3))
    again = task.collate([[two], [one]], Draws(0, 3))
    assert again["input_ids"][1].tolist() == first[0].tolist(), "beside whatever it stands"
    assert again["targets"].reshape(2, -1)[1].tolist() == first[1].tolist()
    others = [task.hidden(two, Draws(0, 3)), task.hidden(one, Draws(0, 4)), task.hidden(one, Draws(1, 3))]
    assert all(first[1].tolist() != other[1].tolist() for other in others)
    fixed = [task.collate([[one]], draws)["targets"].tolist() for draws in (None, Draws(0, 0), None)]
    assert fixed[0] == fixed[1] == fixed[2], "where nothing may be random, they stay"


@pytest.mark.parametrize("whole_words", [False, True])
def test_as_many_tokens_are_learned_as_was_said_and_hidden_80_10_10(whole_words: bool) -> None:
    task = task_of(mask_whole_words=whole_words, mask_probability=0.3)
    text = "abc de f ghij " * 3
    [sample] = samples_of(task, text)
    [piece] = pieces_of(task, {"text": text})
    ordinary = np.flatnonzero(sample["units"] >= 0)
    masked = changed = learned = hidden = 0
    counts = np.zeros(sample.length)
    for step in range(400):
        ids, targets = task.hidden(sample, Draws(0, step))
        where = np.flatnonzero(targets >= 0)
        assert len(where) == piece.num_supervised
        assert (targets[where] == sample["input_ids"][where]).all() and set(where) <= set(ordinary)
        counts[where] += 1
        learned += len(where)
        differs = np.flatnonzero(ids != sample["input_ids"])
        masked, changed = masked + (ids == MASK).sum(), changed + (ids[differs] != MASK).sum()
        if whole_words:
            units = sample["units"]
            touched = set(units[where])
            hidden += sum((units == unit).sum() for unit in touched)
            assert set(units[differs]) <= touched
            partly = [unit for unit in touched if set(np.flatnonzero(units == unit)) - set(where)]
            assert len(partly) <= 1, "all pieces of a word are learned but of the last that was drawn"
        else:
            hidden += len(where)
            assert set(differs) <= set(where)
        assert not set(np.unique(ids[differs])) & ({*TOKENIZER.all_special_ids} - {MASK})
    assert masked / hidden == pytest.approx(0.8, abs=0.02)
    assert changed / hidden == pytest.approx(0.1, abs=0.02)
    assert counts[ordinary].min() > 0.1 * 400


def test_filler_is_not_hidden() -> None:
    task = task_of()
    sample, other = samples_of(task, TEXT, "a b c")
    batch = task.collate([[sample], [other.as_filler()]])
    assert (batch["targets"].reshape(2, -1)[1] == -100).all()
    assert int((batch["targets"] >= 0).sum()) == pieces_of(task, {"text": TEXT})[0].num_supervised


MODELS = {
    "bert": (BertForMaskedLM, BertConfig(**SIZES, initializer_range=0.3)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**SIZES, initializer_range=0.3, pad_token_id=0)),
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig(
            **SIZES,
            initializer_range=0.3,
            local_attention=16,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
    ),
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_transformers(kind: str, layout: str) -> None:
    """Of a padded batch of the same tokens, whichever way samples share a pass here."""
    task = task_of(mask_probability=0.3, max_length=64)
    task.layout = layout  # type: ignore[assignment]
    build, config = MODELS[kind]
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = build(config).eval()
    task.configure(config)
    samples = samples_of(task, TEXT, "a few more words", "one")
    ready = [task.hidden(sample, Draws(0, 1)) for sample in samples]
    longest = max(sample.length for sample in samples)
    ids, labels = (np.full((3, longest), fill) for fill in (0, -100))
    for number, (tokens, targets) in enumerate(ready):
        ids[number, : len(tokens)], labels[number, : len(tokens)] = tokens, targets
    mask = np.arange(longest) < np.array([[sample.length] for sample in samples])
    own = model(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long(), labels=torch.tensor(labels)
    )
    model.set_attn_implementation(attention.register("packed" if layout == "packed" else "sdpa"))
    batch = task.collate([[sample] for sample in samples], Draws(0, 1))
    num_learned = int((batch["targets"] >= 0).sum())
    assert num_learned == (labels >= 0).sum()
    output = task.loss(model, batch)
    assert float(output.loss_sum.detach()) / num_learned == pytest.approx(float(own.loss.detach()), rel=1e-6)
    predicted = own.logits.argmax(dim=-1).numpy()
    assert int(output.num_correct) == ((predicted == labels) & (labels >= 0)).sum()


def test_a_pass_of_filler_alone_has_a_gradient_of_zero() -> None:
    """Every rank has to go backward, or the others would wait for it; and through its head, too."""
    task, model = task_of(), BertForMaskedLM(BertConfig(**SIZES))
    [sample] = samples_of(task, TEXT)
    output = task.loss(model, task.collate([[sample.as_filler()]]))
    output.loss_sum.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "pooler" not in name]
    assert float(output.loss_sum.detach()) == 0 and float(output.num_correct) == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_metrics() -> None:
    task, model = task_of(mask_probability=0.5), BertForMaskedLM(BertConfig(**SIZES)).eval()
    evaluators = [task.evaluator(), task.evaluator()]
    total = count = 0.0
    for number, sample in enumerate(samples_of(task, TEXT, "a few more words", "one")):
        batch = task.collate([[sample]])
        with torch.no_grad():
            output = task.loss(model, batch)
        evaluators[number % 2].update(output, batch)
        total, count = total + float(output.loss_sum), count + int((batch["targets"] >= 0).sum())
    found = evaluators[0].compute([evaluator.state() for evaluator in evaluators])
    assert found["loss"] == pytest.approx(total / count)
    assert found["perplexity"] == pytest.approx(np.exp(total / count)) and set(found) == set(task.metrics)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_masks_of_a_row_are_filled_with_the_likeliest_tokens(layout: str) -> None:
    task = task_of(max_length=16)
    task.layout, task.for_prediction = layout, True  # type: ignore[assignment]
    model = BertForMaskedLM(BertConfig(**SIZES, initializer_range=0.3)).eval()
    model.set_attn_implementation(attention.register("packed" if layout == "packed" else "sdpa"))
    rows = [{"text": "ab [MASK] cd [MASK] ef and so on"}, {"text": "one [MASK]"}]
    encoded = [pieces_of(task, row) for row in rows]
    assert [len(pieces) for pieces in encoded] == [1, 1], "a piece without a mask is not asked for"
    samples = [Sample(pieces[0].arrays, number, pieces[0].length) for number, pieces in enumerate(encoded)]
    order = [samples[1], samples[0].as_filler(), samples[0]]
    batch = task.collate([[sample] for sample in order])
    with torch.no_grad():
        output = task.loss(model, batch)
    parts = task.answers(output, batch, order, AnswerOptions(top_k=3))
    answers = [task.answer(rows[0], [parts[2]]), task.answer(rows[1], [parts[0]])]
    model.set_attn_implementation("eager")
    for sample, answer in zip(samples, answers, strict=True):
        ids = torch.tensor(sample["input_ids"][None].astype(np.int64))
        shares = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(dim=-1)[ids == MASK]
        for share, told in zip(shares, answer["masks"], strict=True):
            best = share.topk(3)
            assert [one["token"] for one in told] == [TOKENIZER.decode([k]).strip() for k in best.indices]
            assert [one["probability"] for one in told] == pytest.approx(best.values.tolist(), rel=1e-4)
    first, second = (mask[0]["token"] for mask in answers[0]["masks"])
    assert answers[0]["text"] == f"ab {first} cd {second} ef and so on"
    with pytest.raises(ConfigurationError, match="--top-k = 101: masked-lm tells 100 tokens at most"):
        task.answers(output, batch, order, AnswerOptions(top_k=101))
    with pytest.raises(RowProblem, match=r"nothing left to learn: it has no \[MASK\] to fill"):
        pieces_of(task, {"text": "none"})


def test_of_a_learned_row_the_hidden_tokens_are_told() -> None:
    task, model = task_of(), BertForMaskedLM(BertConfig(**SIZES)).eval()
    [sample] = samples_of(task, TEXT)
    batch = task.collate([[sample]])
    with torch.no_grad():
        output = task.loss(model, batch)
    own = task.loss(model, task.collate([[sample]], Draws(0, 0)))
    torch.testing.assert_close(output.loss_sum, own.loss_sum)
    assert own.predictions is None and output.num_correct == own.num_correct
    answer = task.answer({"text": TEXT}, task.answers(output, batch, [sample], AnswerOptions()))
    assert len(answer["hidden"]) == len(answer["told"]) == pieces_of(task, {"text": TEXT})[0].num_supervised
