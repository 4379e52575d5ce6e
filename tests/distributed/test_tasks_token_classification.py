from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from seqeval import metrics as seqeval
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from launcher import tasks
from launcher.data.rows import Row, RowProblem
from launcher.data.section import Source
from launcher.errors import ConfigurationError, DataError
from launcher.tasks import tag_scores
from launcher.tasks.tagged_rows import TaggedColumns
from launcher.tasks.task import AnswerOptions, Encoded, Output, Sample, Task
from launcher.tasks.token_classification import TokenClassification
from tests.distributed.data_world import byte_tokenizer, plan_of

TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]


def piece_tokenizer() -> Any:
    """WordPiece with a piece for each letter: of `abc` it makes a, ##b, ##c; of a variation selector,
    nothing."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    backend = Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {
        name: f"[{name[:-6].upper()}]"
        for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


TOKENIZER = piece_tokenizer()


def task_of(
    labels: list[str] | None = TAGS, tokenizer: Any = TOKENIZER, **settings: Any
) -> TokenClassification:
    ways = {} if "text" in settings else {"words": "words", "tags": "tags"}
    data = TaggedColumns(**{"train": Source(path="unused.jsonl"), "max_length": 32, **ways, **settings})
    task = tasks.build(plan_of(data, "token-classification"), tokenizer, labels)
    assert isinstance(task, TokenClassification)
    return task


def encoded(task: TokenClassification, row: dict[str, Any]) -> tuple[Encoded, ...]:
    [found] = task.encode([row], TOKENIZER)
    if isinstance(found, RowProblem):
        raise found
    assert isinstance(found, tuple)
    return found


def samples_of(task: TokenClassification, rows: list[dict[str, Any]]) -> list[Sample]:
    return [
        Sample(part.arrays, number, part.length)
        for number, row in enumerate(rows)
        for part in encoded(task, row)
    ]


ROW = {
    "words": ["ab", "lives", "in", "new", "york", "."],
    "tags": ["B-person", "O", "O", "B-place", "I-place", "O"],
}


def test_the_first_piece_of_a_word_learns_its_tag() -> None:
    [part] = encoded(task_of(), ROW)
    assert TOKENIZER.convert_ids_to_tokens(part.arrays["input_ids"].tolist()[:4]) == [
        "[CLS]",
        "a",
        "##b",
        "l",
    ]
    assert TOKENIZER("ab lives in new york .")["input_ids"] == part.arrays["input_ids"].tolist()
    assert part.arrays["words"].tolist() == [0, 1, 2, 3, 4, 5]
    assert part.arrays["places"].tolist() == [1, 3, 8, 10, 13, 17]
    assert part.arrays["tags"].tolist() == [1, 0, 0, 3, 4, 0]
    learned = np.flatnonzero(part.arrays["labels"] >= 0)
    assert learned.tolist() == [1, 3, 8, 10, 13, 17] and part.num_supervised == 6
    assert part.arrays["labels"][learned].tolist() == [1, 0, 0, 3, 4, 0]
    assert {array.dtype for array in part.arrays.values()} == {np.dtype(np.int32)}


def test_all_pieces_of_a_word_learn_that_they_are_inside() -> None:
    [part] = encoded(task_of(label_pieces="all"), ROW)
    assert part.arrays["labels"].tolist() == [-100, 1, 2, *[0] * 7, 3, 4, 4, 4, 4, 4, 4, 0, -100]
    assert part.num_supervised == part.length - 2


def test_words_without_pieces_are_kept_and_go_on_with_what_is_before() -> None:
    [part] = encoded(
        task_of(), {"words": ["\ufe0f", "ab", "\ufe0f", "c"], "tags": ["O", "B-person", "I-person", "O"]}
    )
    assert part.arrays["words"].tolist() == [0, 1, 2, 3]
    assert part.arrays["places"].tolist() == [-1, 1, -1, 3]
    assert tag_scores.completed([-1, 1, -1, 0], TAGS) == ["O", "B-person", "I-person", "O"]
    with pytest.raises(RowProblem, match=r"the tokenizer makes nothing of its words|empty: no tokens"):
        encoded(task_of(), {"words": ["\ufe0f"], "tags": ["O"]})


def long_row(num_words: int = 60) -> dict[str, Any]:
    generator = random.Random(3)
    words = ["".join(generator.choices("abcdef", k=generator.randrange(1, 5))) for _ in range(num_words)]
    return {"words": words, "tags": [generator.choice(["O", "B-person", "B-place"]) for _ in words]}


@pytest.mark.parametrize("pieces", ["first", "all"])
def test_windows_together_say_what_one_long_sample_says(pieces: str) -> None:
    row = long_row()
    [whole] = encoded(task_of(max_length=512, label_pieces=pieces), row)
    parts = encoded(task_of(max_length=24, label_pieces=pieces), row)
    assert len(parts) > 5 and max(part.length for part in parts) <= 24
    assert np.concatenate([part.arrays["words"] for part in parts]).tolist() == whole.arrays["words"].tolist()
    assert np.concatenate([part.arrays["tags"] for part in parts]).tolist() == whole.arrays["tags"].tolist()
    assert sum(part.num_supervised for part in parts) == whole.num_supervised, "each word is learned once"
    for part in parts:
        at = part.arrays["places"]
        assert (part.arrays["labels"][at] == part.arrays["tags"]).all()
        assert (
            part.arrays["input_ids"][at]
            == whole.arrays["input_ids"][whole.arrays["places"][part.arrays["words"]]]
        ).all()
    short = {"words": row["words"][:5], "tags": row["tags"][:5]}
    [one] = encoded(task_of(max_length=24), short)
    [same] = encoded(task_of(max_length=512), short)
    assert all((one.arrays[name] == same.arrays[name]).all() for name in same.arrays)


def test_long_texts_are_cut_dropped_or_refused_where_the_job_says_so() -> None:
    row = long_row()
    [part] = encoded(task_of(max_length=24, long_texts="first"), row)
    assert part.cut and part.length == 24
    assert part.arrays["words"].tolist() == list(range(60)), "words behind the end count as not found"
    assert (part.arrays["places"] == tag_scores.NOT_SEEN).sum() > 40
    with pytest.raises(RowProblem, match=r"too long: .* tokens, and max_length is 24"):
        encoded(task_of(max_length=24, too_long="drop"), row)


def test_a_tag_that_the_training_rows_do_not_have() -> None:
    with pytest.raises(
        RowProblem, match="label that cannot be used: 'B-thing' is not among the 5 tags of the training rows"
    ):
        encoded(task_of(), {"words": ["a"], "tags": ["B-thing"]})


def rows_of(*tags: list[str]) -> list[Row]:
    return [
        Row(number, "a.jsonl", number + 1, {"words": ["a"] * len(one), "tags": one})
        for number, one in enumerate(tags)
    ]


def test_the_tags_of_the_rows() -> None:
    task = task_of(None)
    task.fit(
        [
            *rows_of(["B-place", "O"], ["B-person"], ["I-person"]),
            Row(9, "a.jsonl", 9, RowProblem("not readable")),
        ]
    )
    assert task.labels == TAGS, "every tag of the types that occur, and none of a row that cannot be used"
    task = task_of(None, scheme="none")
    task.fit(rows_of(["VERB", "NOUN"]))
    assert task.labels == ["NOUN", "VERB"]
    with pytest.raises(
        DataError, match=r"data\.tags = 'tags': the training rows have only 'O'; at least two are needed"
    ):
        task_of(None).fit(rows_of(["O"]))


def test_a_models_own_tags_keep_their_order_and_others_make_a_new_head() -> None:
    config = BertConfig(
        id2label=dict(enumerate(["B-place", "O", "I-place"])), architectures=["BertForTokenClassification"]
    )
    task = task_of(None)
    task.adopt(config)
    task.fit(rows_of(["B-place", "O"]))
    assert task.labels == ["B-place", "O", "I-place"] and not task.remarks
    task.fit(rows_of(["B-person", "O"]))
    assert task.labels == ["O", "B-person", "I-person"]
    assert "of 2 it does not have 'B-person'" in task.remarks[0]
    task.labels = task.own_labels
    with pytest.raises(
        ConfigurationError,
        match=r"data\.tags = 'tags': the rows have 1 tags that the model does not know \('B-thing'\)",
    ):
        task.refuse_unknown(rows_of(["B-thing", "O"]))
    other = task_of(None)
    other.adopt(BertConfig(id2label={0: "a", 1: "b"}, architectures=["BertForSequenceClassification"]))
    assert other.own_labels is None, "a head for whole texts is none for words"
    with pytest.raises(ConfigurationError, match="no head for tags; train it first"):
        other.adopt(BertConfig(architectures=["BertModel"]), as_it_stands=True)
    written = BertConfig()
    task_of().configure(written)
    assert written.num_labels == 5 and written.id2label[1] == "B-person" and written.label2id["I-place"] == 4


def test_a_tokenizer_that_does_not_say_where_its_pieces_stand_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(
        ConfigurationError,
        match=r"model\.name = 'some/model': its tokenizer does not say where its pieces stand",
    ):
        task_of(tokenizer=Slow())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": None, "tags": None}, "reads words [+] tags, or text [+] spans; there is none"),
        ({"tags": None}, "there is words"),
        ({"text": "text"}, "there is words and tags and text"),
        (
            {"words": None, "tags": None, "text": "t", "spans": "s", "scheme": "none"},
            "data.scheme = 'none': spans are entities",
        ),
        (
            {"words": None, "tags": None, "text": "t", "spans": "s", "rows_scheme": "IO"},
            "spans are written in no scheme",
        ),
        ({"rows_scheme": "none"}, "data.rows_scheme = 'none': cannot be converted to BIO"),
        ({"window_overlap": 17}, "data.window_overlap = 17: write 0 to 16, half of data.max_length"),
        ({"packing": True}, "data.packing = True: only language models pack"),
    ],
)
def test_keys_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    import re

    data = TaggedColumns(
        **{"train": Source(path="t.jsonl"), "max_length": 32, "words": "words", "tags": "tags", **settings}
    )
    found = [str(one.problem) for one in TokenClassification(data).checks()]
    assert any(re.search(message, text) for text in found), found


def model(num_tags: int = 5) -> BertForTokenClassification:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    return BertForTokenClassification(BertConfig(**sizes, num_labels=num_tags, initializer_range=0.3)).eval()


@pytest.mark.parametrize("pieces", ["first", "all"])
def test_the_loss_is_that_of_transformers(pieces: str) -> None:
    task, net = task_of(label_pieces=pieces), model()
    samples = samples_of(task, [ROW, {"words": ["cd", "ef"], "tags": ["B-person", "O"]}])
    batch = task.collate([[sample] for sample in samples])
    output = task.loss(net, batch)
    own = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    num_learned = int((batch["labels"] >= 0).sum())
    assert float(output.loss_sum.detach()) / num_learned == pytest.approx(float(own.loss.detach()), rel=1e-6)
    assert output.predictions is not None and output.predictions.shape == (8, 5)
    ready = TOKENIZER(" ".join(ROW["words"]), return_tensors="pt")
    torch.testing.assert_close(
        output.predictions[:6], net(**ready).logits[0, samples[0]["places"]], rtol=1e-5, atol=1e-5
    )


def test_filler_counts_for_nothing() -> None:
    task, net = task_of(), model()
    samples = samples_of(task, [ROW, {"words": ["cd", "ef"], "tags": ["B-person", "O"]}])
    alone, beside = task.collate([[samples[0]]]), task.collate([[samples[0]], [samples[1].as_filler()]])
    first, second = task.loss(net, alone), task.loss(net, beside)
    torch.testing.assert_close(first.loss_sum, second.loss_sum)
    assert (
        first.predictions is not None
        and second.predictions is not None
        and first.predictions.shape == second.predictions.shape
    )
    assert len(beside["aside"]["words"]) == 6
    only = task.loss(net, task.collate([[samples[0].as_filler()]]))
    assert float(only.loss_sum.detach()) == 0 and only.loss_sum.requires_grad


def as_seqeval(gold: list[list[str]], predicted: list[list[str]]) -> tuple[dict[str, float], dict[str, Any]]:
    """What seqeval says of all entities, and of each type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = seqeval.classification_report(gold, predicted, output_dict=True, zero_division=0)
        scores = {
            "precision": seqeval.precision_score(gold, predicted),
            "f1": seqeval.f1_score(gold, predicted),
        }
        scores |= {
            "recall": seqeval.recall_score(gold, predicted),
            "accuracy": seqeval.accuracy_score(gold, predicted),
        }
    names = {"precision": "precision", "recall": "recall", "f1-score": "f1", "support": "num_entities"}
    kinds = {kind: values for kind, values in report.items() if not kind.endswith(" avg")}
    types = {kind: {names[key]: value for key, value in values.items()} for kind, values in kinds.items()}
    return scores | {f"f1_{kind}": values["f1"] for kind, values in types.items()}, types


def tagged(task: Task, gold: list[list[str]], predicted: list[list[str]], ranks: int = 1) -> dict[str, float]:
    """The metrics of these predictions, each row on one of some ranks."""
    evaluators = [task.evaluator() for _ in range(ranks)]
    for row, (wanted, given) in enumerate(zip(gold, predicted, strict=True)):
        ids = [[TAGS.index(name) for name in tags] for tags in (wanted, given)]
        words = np.array(
            [[row, number, tag, 0] for number, tag in enumerate(ids[0])], dtype=np.int64
        ).reshape(-1, 4)
        logits = torch.nn.functional.one_hot(torch.tensor(ids[1], dtype=torch.int64), len(TAGS)).float()
        batch = {"labels": torch.tensor([ids[0]]), "aside": {"words": words}}
        evaluators[row % ranks].update(Output(torch.tensor(1.0), torch.tensor(0.0), logits), batch)
    metrics = evaluators[0].compute([evaluator.state() for evaluator in evaluators])
    return metrics, evaluators[0].details().get("types", {})


def test_scores_are_those_of_seqeval() -> None:
    generator = random.Random(1)
    for trial in range(60):
        lengths = [generator.randrange(1, 12) for _ in range(generator.randrange(1, 9))]
        # Any order of tags: a model is not held to the scheme.
        gold, predicted = ([generator.choices(TAGS[: 1 + trial % 5], k=n) for n in lengths] for _ in range(2))
        found, found_types = tagged(task_of(), gold, predicted, ranks=1 + trial % 3)
        expected, types = as_seqeval(gold, predicted)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert set(found) == {*expected, "loss"}
        assert found_types == types


def test_scores_of_odd_evaluations() -> None:
    task = task_of()
    assert tagged(task, [], []) == ({"loss": 0.0}, {})
    assert task.evaluator().compute([task.evaluator().state(), task.evaluator().state()]) == {"loss": 0.0}
    nothing, types = tagged(task, [["O", "O"]], [["O", "O"]])
    assert not types
    assert (nothing["f1"], nothing["accuracy"]) == (0.0, 1.0), "where there is no entity, seqeval's F1 is 0"
    plain = task_of(["NOUN", "VERB"], scheme="none")
    evaluator = plain.evaluator()
    # As in transformers' run_ner a word without a piece is left out; one behind what was read is wrong.
    words = np.array([[0, 0, 0, 1], [0, 1, 1, 2], [0, 2, 1, -1], [0, 3, 1, -2]])
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    evaluator.update(
        Output(torch.tensor(3.0), torch.tensor(0.0), logits),
        {"labels": torch.tensor([[0, 1]]), "aside": {"words": words}},
    )
    assert evaluator.compute([evaluator.state()]) == pytest.approx(
        {"loss": 1.5, "accuracy": 2 / 3, "f1_macro": (1 + 2 / 3) / 2}
    )


def test_windows_on_any_ranks_are_one_row_again() -> None:
    row = long_row()
    whole, cut = task_of(max_length=512), task_of(max_length=24)
    generator = random.Random(2)
    said = [generator.randrange(5) for _ in row["words"]]
    metrics = []
    for task, ranks in ((whole, 1), (cut, 1), (cut, 3)):
        evaluators = [task.evaluator() for _ in range(ranks)]
        for number, sample in enumerate(samples_of(task, [row])):
            batch = task.collate([[sample]])
            logits = torch.nn.functional.one_hot(
                torch.tensor([said[word] for word in sample["words"]]), 5
            ).float()
            evaluators[-1 - number % ranks].update(
                Output(torch.tensor(1.0), torch.tensor(0.0), logits), batch
            )
        found = evaluators[0].compute([evaluator.state() for evaluator in evaluators])
        metrics.append({name: value for name, value in found.items() if name != "loss"})
    assert metrics[0] == metrics[1] == metrics[2]


def test_a_byte_level_tokenizer_serves_too() -> None:
    tokenizer = byte_tokenizer()
    task = task_of(tokenizer=tokenizer)
    [[part]] = task.encode([{"words": ["the", "cat"], "tags": ["O", "B-person"]}], tokenizer)
    assert tokenizer.decode(part.arrays["input_ids"]) == "the cat"
    assert part.arrays["places"].tolist() == [0, 1]


def asked(
    task: TokenClassification, net: BertForTokenClassification, row: dict[str, Any], options: AnswerOptions
) -> dict[str, Any]:
    samples = samples_of(task, [row])
    batch = task.collate([[sample] for sample in [samples[0].as_filler(), *samples]])
    with torch.no_grad():
        output = task.loss(net, batch)
    parts = task.answers(output, batch, [samples[0].as_filler(), *samples], options)[1:]
    return task.answer(row, parts)


def test_answers_are_entities_with_text_place_and_probability() -> None:
    task, net = task_of(words=None, tags=None, text="text", spans="spans"), model()
    task.for_prediction = True
    assert task.columns == ("text",)
    row = {"text": "ab, lives in new york."}
    answer = asked(task, net, row, AnswerOptions(probabilities=True, top_k=2))
    ready = TOKENIZER(row["text"], return_tensors="pt")
    shares = net(**ready).logits.detach()[0].softmax(dim=-1)[[1, 3, 4, 9, 11, 14, 18]]
    assert answer["tags"] == [TAGS[number] for number in shares.argmax(dim=-1)]
    assert answer["probabilities"] == pytest.approx(shares.max(dim=-1).values.tolist(), rel=1e-4)
    assert [len(one) for one in answer["likeliest"]] == [2] * 7
    entities = seqeval.sequence_labeling.get_entities(answer["tags"])
    assert [(one["type"], one["words"]) for one in answer["entities"]] == [
        (k, [a, b + 1]) for k, a, b in entities
    ]
    for entity in answer["entities"]:
        assert row["text"][entity["start"] : entity["end"]] == entity["text"]
        first, behind = entity["words"]
        assert entity["probability"] == pytest.approx(np.mean(answer["probabilities"][first:behind]))
    assert set(asked(task, net, row, AnswerOptions())) == {"tags", "entities"}


def test_answers_of_windows_are_those_of_the_row() -> None:
    row = {"words": [*long_row()["words"], "\ufe0f"]}
    task = task_of(max_length=24, label_pieces="all")
    task.for_prediction = True
    answer = asked(task, model(), row, AnswerOptions(probabilities=True))
    assert len(answer["tags"]) == len(answer["probabilities"]) == 61
    assert answer["probabilities"][-1] is None
    text = " ".join(row["words"])
    assert all(text[one["start"] : one["end"]] == one["text"] for one in answer["entities"])
    plain = task_of(["NOUN", "VERB"], scheme="none")
    plain.for_prediction = True
    answer = asked(plain, model(2), {"words": ["a", "\ufe0f"]}, AnswerOptions())
    assert set(answer) == {"tags"} and answer["tags"][0] in plain.labels and answer["tags"][1] is None


def test_a_row_that_is_drawn_twice_counts_twice() -> None:
    task = task_of()
    evaluator = task.evaluator()
    words = np.array([[3, 0, 1, 1]])
    batch = {"labels": torch.tensor([[1]]), "aside": {"words": words}}
    evaluator.update(Output(torch.tensor(1.0), torch.tensor(0.0), torch.eye(5)[1:2]), batch)
    state = evaluator.state()
    states = [evaluator.as_copy(state, copy) for copy in (0, 1)]
    assert evaluator.compute(states)["loss"] == 1.0
    assert evaluator.details()["types"]["person"]["num_entities"] == 2
    assert evaluator.details()["groups"] == {"words of the row": {"1": {"f1": 1.0, "num_rows": 2}}}


@pytest.mark.parametrize(("scheme", "metric", "wanted"), [("BIO", "f1", 0.0), ("none", "accuracy", 0.75)])
def test_rows_of_like_lengths_are_scored_together(scheme: str, metric: str, wanted: float) -> None:
    """A group without any entity has an F1 of 0, as all of seqeval's shares of nothing."""
    evaluator = task_of(scheme=scheme).evaluator()
    plain, entities = np.zeros((4, 4), dtype=np.int64), np.ones((9, 4), dtype=np.int64)
    plain[:, 1], entities[:, 1] = np.arange(4), np.arange(9)
    plain[3, 3] = 0 if scheme == "BIO" else 1
    evaluator.compute([[np.zeros(2), plain], [np.zeros(2), entities]])
    found = evaluator.details()["groups"]["words of the row"]
    assert found == {"3 to 4": {metric: wanted, "num_rows": 1}, "9 to 16": {metric: 1.0, "num_rows": 1}}
