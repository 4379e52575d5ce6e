from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BartConfig, BertConfig, LlamaConfig, RobertaConfig, T5Config

from launcher import tasks
from launcher.data.rows import Row, RowProblem
from launcher.data.section import Source
from launcher.errors import ConfigurationError, DataError
from launcher.tasks.label_losses import LabelLoss
from launcher.tasks.sequence_classification import LabelledColumns, SequenceClassification
from launcher.tasks.task import AnswerOptions, Output, Sample, Task
from tests.distributed.data_world import byte_tokenizer, plan_of, word_tokenizer
from tests.encoding import arrays_of

TRAIN = Source(path="unused.jsonl")
TOKENIZER = word_tokenizer()


def task_of(
    labels: list[str] | None = None, tokenizer: Any = TOKENIZER, **settings: Any
) -> SequenceClassification:
    data = LabelledColumns(**{"train": TRAIN, "text": "text", "label": "label", **settings})
    task = tasks.build(plan_of(data, "sequence-classification"), tokenizer, labels)
    assert isinstance(task, SequenceClassification)
    return task


def rows_of(*labels: Any) -> list[Row]:
    return [
        Row(number, "a.jsonl", number + 1, {"text": "the cat", "label": label})
        for number, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 1], ["1", "9", "10"]),
        (["10", "9"], ["9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["false", "true"]),
        (["a", 1], ["1", "a"]),
        (["01", "1"], ["01", "1"]),
        (["-1", "1", "0"], ["-1", "0", "1"]),
        ([" a ", "a", "b", None, 0.5, []], ["a", "b"]),
    ],
)
def test_classes_are_in_order(labels: list[Any], expected: list[str]) -> None:
    task = task_of()
    task.fit([*rows_of(*labels), Row(99, "a.jsonl", 100, RowProblem("not readable"))])
    assert task.labels == expected


@pytest.mark.parametrize(("labels", "message"), [([], "no label"), (["a", "a"], "only 'a'")])
def test_fewer_than_two_classes_are_refused(labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.label = 'label': the training rows have {message}"):
        task_of().fit(rows_of(*labels))


def test_a_text() -> None:
    arrays = arrays_of(task_of(["no", "yes"]), {"text": "the cat", "label": "yes"}, TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(arrays["input_ids"].tolist()) == ["[CLS]", "the", "cat", "[SEP]"]
    assert arrays["label"].tolist() == [1]
    assert {name: array.dtype for name, array in arrays.items()} == {
        "input_ids": np.int32,
        "token_type_ids": np.int32,
        "label": np.int64,
    }


def test_a_pair() -> None:
    task = task_of(["no", "yes"], text=("premise", "hypothesis"))
    assert task.columns == ("premise", "hypothesis", "label")
    arrays = arrays_of(task, {"premise": "the cat", "hypothesis": "a dog ran", "label": "no"}, TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(arrays["input_ids"].tolist()) == [
        "[CLS]",
        "the",
        "cat",
        "[SEP]",
        "a",
        "dog",
        "ran",
        "[SEP]",
    ]
    assert arrays["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_of_a_pair_the_longer_text_is_cut() -> None:
    task = task_of(["no", "yes"], text=("premise", "hypothesis"), max_length=8)
    arrays = arrays_of(task, {"premise": "one two", "hypothesis": "the cat " * 9, "label": "no"}, TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(arrays["input_ids"].tolist()) == [
        "[CLS]",
        "one",
        "two",
        "[SEP]",
        "the",
        "cat",
        "the",
        "[SEP]",
    ]
    [result] = task.encode([{"premise": "one", "hypothesis": "a " * 9, "label": "no"}], TOKENIZER)
    assert not isinstance(result, RowProblem)
    assert result.cut


@pytest.mark.parametrize("policy", ["drop", "refuse"])
def test_too_long(policy: str) -> None:
    with pytest.raises(RowProblem, match="too long: 12 tokens, and max_length is 8"):
        arrays_of(
            task_of(["no", "yes"], max_length=8, too_long=policy),
            {"text": "cat " * 10, "label": "no"},
            TOKENIZER,
        )


@pytest.mark.parametrize(
    ("problem", "label", "message"),
    [
        ("single-label", "maybe", "'maybe' is not among the 2 classes"),
        ("single-label", None, "missing key"),
        ("single-label", ["no"], "not the name of a class"),
        ("single-label", " ", "not the name of a class"),
        ("single-label", 0.5, "not the name of a class"),
        ("multi-label", ["no", "maybe"], "'maybe' is not among"),
        ("multi-label", [None], "missing key: a label is missing in the list"),
        ("regression", "much", "'much' is not a number"),
        ("regression", "nan", "is not a number"),
        ("regression", 10**400, "is not a number"),
        ("regression", None, "missing key"),
        ("regression", [1], "is not a number"),
    ],
)
def test_labels_that_cannot_be_used(problem: str, label: Any, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        arrays_of(task_of(["no", "yes"], problem=problem), {"text": "the cat", "label": label}, TOKENIZER)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (["a", "c"], [1, 0, 1]),
        ("a|c", [1, 0, 1]),
        ("c, b", [0, 1, 1]),
        ("b", [0, 1, 0]),
        ([], [0, 0, 0]),
        ("", [0, 0, 0]),
        (["b", "b"], [0, 1, 0]),
    ],
)
def test_several_labels(label: Any, expected: list[int]) -> None:
    arrays = arrays_of(
        task_of(["a", "b", "c"], problem="multi-label"), {"text": "the cat", "label": label}, TOKENIZER
    )
    assert arrays["label"].tolist() == expected
    assert arrays["label"].dtype == np.float32


def test_a_bar_keeps_commas_within_names() -> None:
    task = task_of(problem="multi-label")
    task.fit(rows_of("x, y|z", ["w"]))
    assert task.labels == ["w", "x, y", "z"]


def test_a_models_own_names_are_those_of_the_rows_however_both_are_written() -> None:
    task = task_of(["False", "True", "2.0", "nan"])
    assert [
        arrays_of(task, {"text": "the cat", "label": label}, TOKENIZER)["label"].tolist()
        for label in (True, "false", 2)
    ] == [[1], [0], [2]]
    assert task.labels == ["False", "True", "2.0", "nan"]


def test_a_number() -> None:
    arrays = arrays_of(task_of(problem="regression"), {"text": "the cat", "label": "2.5"}, TOKENIZER)
    assert arrays["label"].tolist() == [2.5]
    assert arrays["label"].dtype == np.float32


def sample(ids: list[int], label: list[Any], types: list[int] | None = None) -> Sample:
    arrays = {"input_ids": np.array(ids, dtype=np.int32), "label": np.array(label)}
    return Sample(
        arrays if types is None else {**arrays, "token_type_ids": np.array(types, dtype=np.int32)},
        0,
        len(ids),
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_collating_pads_to_the_longest(side: str) -> None:
    """On the right, whichever side the tokenizer pads on to generate: learned positions begin at the first
    column."""
    task = task_of(["no", "yes"], tokenizer=word_tokenizer(side))
    pad = TOKENIZER.pad_token_id
    batch = task.collate([[sample([5, 6, 7], [1], [0, 0, 1])], [sample([8], [0], [1]).as_filler()]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["weights"].tolist() == [1, 0]


def test_collated_labels_of_each_problem() -> None:
    several = task_of(["a", "b"], problem="multi-label").collate(
        [[sample([1], [1.0, 0.0])], [sample([2], [0.0, 1.0])]]
    )
    assert several["labels"].tolist() == [[1, 0], [0, 1]]
    number = task_of(problem="regression").collate([[sample([1], [0.5])], [sample([2], [1.5])]])
    assert number["labels"].tolist() == [0.5, 1.5]
    assert "token_type_ids" not in number


def test_the_config_is_told() -> None:
    config = LlamaConfig(pad_token_id=7)
    task_of(["no", "yes"]).configure(config)
    assert config.num_labels == 2
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}
    assert config.problem_type == "single_label_classification"
    assert config.pad_token_id == TOKENIZER.pad_token_id
    task_of(problem="regression").configure(config)
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_a_tokenizer_without_padding_pads_with_its_end_token_or_is_refused() -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(pad_token_id=None)
    task_of(["no", "yes"], tokenizer=tokenizer).configure(config)
    assert config.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="neither a padding nor an end token"):
        task_of(["no", "yes"], tokenizer=tokenizer)


def classifier_config(*names: str, **more: Any) -> LlamaConfig:
    """The config of a model with a head for these classes."""
    return LlamaConfig(
        **({"architectures": ["LlamaForSequenceClassification"], "id2label": dict(enumerate(names))} | more)
    )


@pytest.mark.parametrize(
    ("own", "rows", "expected", "ids"),
    [
        (["neutral", "entailment", "contradiction"], ["contradiction", "entailment", "neutral"], True,
        [2, 1, 0]),
        (["NEGATIVE", "POSITIVE"], ["positive", "Negative"], True, [1, 0]),
        (["not_entailment", "entailment"], ["entailment", "not entailment", "not-entailment"], True,
        [1, 0, 0]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [2, 0], True, [2, 0]),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "label 0"], True, [1, 0]),
        (["neutral", "entailment", "contradiction"], [2, 0, 1], True, [2, 0, 1]),
        (["1", "0"], [0, 1], True, [1, 0]),
        (["a", "b", "c"], ["c", "a"], True, [2, 0]),
        (["a", "b", "c"], ["c"], True, [2]),
        (["Yes", "yes", "no"], ["yes", "Yes", "no"], True, [1, 0, 2]),
        (["a", "b"], ["b", "c"], ["b", "c"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], ["neg", "pos"], [0, 1]),
        (["a", "b"], [1, 2], ["1", "2"], [0, 1]),
        (["1", "2"], [0, 1], ["0", "1"], [0, 1]),
        (["Yes", "yes"], ["YES", "no"], ["YES", "no"], [0, 1]),
    ],
)  # fmt: skip
def test_a_model_keeps_its_classes_where_the_rows_have_them(
    own: list[str], rows: list[Any], expected: Any, ids: list[int]
) -> None:
    task = task_of()
    task.adopt(classifier_config(*own))
    task.fit(rows_of(*rows))
    assert task.labels == (own if expected is True else expected)
    assert [
        arrays_of(task, {"text": "a", "label": label}, TOKENIZER)["label"].tolist() for label in rows
    ] == [[number] for number in ids]
    assert bool(task.remarks) == (
        expected is not True or (own[0] in ("neutral",) and isinstance(rows[0], int))
    )


def test_several_classes_of_a_model_are_kept_too() -> None:
    task = task_of(problem="multi-label")
    task.adopt(classifier_config("Joy", "Anger", "Fear"))
    task.fit(rows_of(["fear", "joy"], "anger"))
    assert task.labels == ["Joy", "Anger", "Fear"]
    assert arrays_of(task, {"text": "a", "label": ["fear", "joy"]}, TOKENIZER)["label"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "config",
    [
        classifier_config("b", "a", architectures=["LlamaForCausalLM"]),
        classifier_config("LABEL_0", "LABEL_1", architectures=None),
        classifier_config("b", "a", architectures=["LlamaForTokenClassification"]),
    ],
)
def test_a_model_without_a_head_has_no_classes(config: LlamaConfig) -> None:
    """Whatever its id2label says, which every config has."""
    task = task_of()
    task.adopt(config)
    task.fit(rows_of("b", "a"))
    assert task.own_labels is None and task.labels == ["a", "b"] and not task.remarks


def test_a_class_of_the_models_own_code_may_have_any_name() -> None:
    task, code = task_of(), {"AutoModelForSequenceClassification": "modeling.Judge"}
    task.adopt(classifier_config("b", "a", architectures=["Judge"], auto_map=code))
    assert task.own_labels == ["b", "a"]


def test_the_head_of_a_number_keeps_its_name() -> None:
    task, config = task_of(problem="regression"), classifier_config("LABEL_0")
    task.adopt(config)
    task.configure(config)
    assert config.id2label == {0: "LABEL_0"} and config.problem_type == "regression"
    task, config = task_of(problem="regression"), classifier_config("a", "b")
    task.adopt(config)
    task.configure(config)
    assert config.id2label == {0: "value"}


def test_the_mean_of_the_numbers_goes_with_the_model_and_not_with_classes() -> None:
    """A new head begins there, in training and where the run's beginning is measured again."""
    task, config = task_of(problem="regression"), classifier_config()
    task.learn_from({"label": np.array([1.0, 2.0, 4.5], dtype=np.float32)}.get)
    task.configure(config)
    assert config.head_bias == [2.5]
    again, other = task_of(problem="regression"), classifier_config()
    again.adopt(config)
    again.configure(other)
    assert other.head_bias == [2.5]
    task_of(["no", "yes"]).configure(config)
    assert "head_bias" not in config.to_dict()
    config.label_mean = 1.5
    again.adopt(config)
    again.configure(config)
    assert config.head_bias == [1.5] and "label_mean" not in config.to_dict(), "as a run of before had it"
    task = task_of(problem="regression", head_bias="zero")
    task.learn_from({"label": np.array([1.0, 2.0], dtype=np.float32)}.get)
    task.configure(other)
    assert "head_bias" not in other.to_dict()


@pytest.mark.parametrize("weights", [None, {"b": 3.0}])
def test_a_head_of_several_classes_begins_where_their_shares_have_the_least_loss(
    weights: dict[str, float] | None,
) -> None:
    """There the loss of all rows, as the task has it, has no slope."""
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]] * 500, dtype=np.float32)
    task = task_of(["a", "b", "c"], problem="multi-label", class_weights=weights)
    task.learn_from({"label": labels.reshape(-1)}.get)
    config = classifier_config("a", "b", "c")
    task.configure(config)
    bias = torch.tensor(config.head_bias, requires_grad=True)
    loss = LabelLoss("multi-label", task._weights).of(bias.expand(len(labels), 3), torch.tensor(labels))
    loss.mean().backward()
    assert bias.grad is not None and bias.grad.abs().max() < 1e-3
    assert config.head_bias[2] < -7, "a class that never occurs has half a sample of 2001"


def test_a_model_that_stands_is_measured_by_its_own_classes() -> None:
    task = task_of()
    task.adopt(classifier_config("yes", "no"), as_it_stands=True)
    assert task.labels == ["yes", "no"] and task.labels_given
    task.refuse_unknown(rows_of("NO", "Yes", 1))
    with pytest.raises(
        ConfigurationError,
        match=r"data\.label.*1 classes that the model does not know \('perhaps'\); its own are 'yes', 'no'",
    ):
        task.refuse_unknown(rows_of("no", "perhaps"))
    with pytest.raises(
        ConfigurationError, match="MODEL: the model has no classification head; train it first"
    ):
        task_of().adopt(classifier_config("yes", "no", architectures=["LlamaModel"]), as_it_stands=True)
    with pytest.raises(
        ConfigurationError, match="MODEL: the model has 2 classes, and a number is one output"
    ):
        task_of(problem="regression").adopt(classifier_config("yes", "no"), as_it_stands=True)


def test_positions_counted_from_the_padding_token_stay_where_they_are() -> None:
    """RoBERTa's first position is behind its padding token's id: filler has that, whatever the tokenizer pads
    with."""
    task, config = task_of(["no", "yes"]), RobertaConfig(pad_token_id=9)
    task.configure(config)
    assert config.pad_token_id == 9 != TOKENIZER.pad_token_id
    batch = task.collate([[sample([5, 6, 7], [0])], [sample([5], [1])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]
    task_of(["no", "yes"]).configure(other := BertConfig(pad_token_id=9))
    assert other.pad_token_id != 9


@pytest.mark.parametrize(
    "config", [BartConfig(), T5Config(), BertConfig()], ids=lambda config: config.model_type
)
def test_an_end_token_in_the_words_of_a_row(config: Any) -> None:
    """BART's and T5's classifiers look at the last of a text, and refuse a pass of texts that have unlike
    numbers of them."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[SEP]"
    task = task_of(["x", "y"], tokenizer)
    task.adopt(config)
    task.prepare(tokenizer)
    plain, other = task.encode(
        [{"text": text, "label": "x"} for text in ("the cat", "the [SEP] cat")], tokenizer
    )
    assert not isinstance(plain, RowProblem)
    assert isinstance(other, RowProblem) == (config.model_type != "bert")
    if isinstance(other, RowProblem):
        assert "holds '[SEP]' as a word" in str(other)
        assert task.key is not None


def seen(task: Task, scores: Any, labels: Any, loss: float = 1.5) -> list[np.ndarray]:
    """What an evaluation of one micro-batch leaves on a rank; filler stands behind the samples."""
    evaluator = task.evaluator()
    scores, labels = (torch.from_numpy(np.concatenate([values, values[:1]])) for values in (scores, labels))
    weights = torch.ones(len(labels))
    weights[-1] = 0
    evaluator.update(
        Output(torch.tensor(loss * (len(labels) - 1)), torch.tensor(0.0), scores),
        {"labels": labels, "weights": weights},
    )
    return evaluator.state()


def measured(task: Task, scores: Any, labels: Any) -> dict[str, float]:
    return task.evaluator().compute([seen(task, scores, labels)])


def test_metrics_over_two_ranks_are_those_of_one() -> None:
    task, scores, labels = task_of(["no", "yes"]), np.eye(2)[[0, 1, 1, 0, 1]], np.array([0, 1, 0, 0, 1])
    apart = [seen(task, scores[:3], labels[:3]), seen(task, scores[3:], labels[3:])]
    assert task.evaluator().compute(apart) == measured(task, scores, labels)


def test_a_rank_without_a_batch_counts_for_nothing() -> None:
    task, scores, labels = task_of(["no", "yes"]), np.eye(2)[[0, 1]], np.array([0, 0])
    assert task.evaluator().compute([seen(task, scores, labels), task.evaluator().state()]) == measured(
        task, scores, labels
    )


def test_metrics_of_two_classes() -> None:
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    labels = np.array([0, 1, 0, 0])
    task = task_of(["no", "yes"])
    found = measured(task, scores, labels)
    assert found["loss"] == 1.5
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(2 / 3)
    # (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) with tp 1, tn 2, fp 1, fn 0
    assert found["matthews"] == pytest.approx(2 / math.sqrt(2 * 1 * 3 * 2))


def test_rows_of_one_class_are_measured_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    found = measured(task_of(["no", "yes"]), np.array([[2.0, 1.0], [3.0, 0.0]]), np.array([0, 0]))
    assert (found["accuracy"], found["matthews"]) == (1, 0)
    assert not [one for one in recwarn if "single label" in str(one.message)]


def test_metrics_of_three_classes_weigh_classes_equally() -> None:
    found = measured(task_of(["a", "b", "c"]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_metrics_of_several_labels() -> None:
    scores = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = measured(task_of(["a", "b"], problem="multi-label"), scores, labels)
    assert found == {"loss": 1.5, "accuracy": 0.5, "f1_micro": pytest.approx(6 / 8), "f1_macro": 0.5}


def test_metrics_of_numbers() -> None:
    found = measured(
        task_of(problem="regression"), np.array([[1.0], [2.0], [9.0], [4.0]]), np.array([1.0, 2.0, 3.0, 4.0])
    )
    assert found["mse"] == 9.0
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 9, 4], [1, 2, 3, 4])[0, 1])
    constant = measured(task_of(problem="regression"), np.ones(4), np.arange(4.0))
    assert math.isnan(constant["pearson"])
    assert constant["mse"] == 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"problem": "regression", "class_weights": "balanced"},
            "data.class_weights = 'balanced': is for classes",
        ),
        ({"problem": "regression", "label_smoothing": 0.1}, "data.label_smoothing = 0.1: is for classes"),
        ({"problem": "regression", "focal_gamma": 2.0}, "data.focal_gamma = 2.0: is for classes"),
        (
            {"problem": "regression", "thresholds": 0.3},
            "data.thresholds = 0.3: are for several classes at once",
        ),
        (
            {"problem": "multi-label", "positive_label": "a"},
            "data.positive_label = 'a': is of two classes that exclude each other",
        ),
        ({"thresholds": "fit"}, "data.thresholds = 'fit': are for several classes at once"),
        (
            {"problem": "multi-label", "top_k": 3},
            "data.top_k = 3: is for one class of each sample, and data.problem is multi-label",
        ),
        ({"label_smoothing": 0.1, "focal_gamma": 2.0}, "data.label_smoothing = 0.1: the focal loss goes by"),
        ({"class_weights": {"a": 2.0}, "label_smoothing": 0.1, "top_k": 3}, ""),
        (
            {"problem": "multi-label", "class_weights": "balanced", "focal_gamma": 2.0, "thresholds": "fit"},
            "",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    data = LabelledColumns(train=TRAIN, text="text", label="label", **settings)
    found = [str(one.problem) for one in SequenceClassification(data).checks()]
    assert len(found) == bool(message) and all(message in one for one in found), found


def nothing(name: str) -> None:
    return None


def test_weights_and_thresholds_go_by_the_names_of_the_classes() -> None:
    task = task_of(["no", "yes"], class_weights={"YES": 3.0})
    task.learn_from(nothing)
    assert task._weights == [1.0, 3.0]
    numbers = task_of(["0", "1"], class_weights={0: 1.5, 1: 3.0})
    numbers.learn_from(nothing)
    assert numbers._weights == [1.5, 3.0], "YAML reads 0 and 1 as numbers, and true as a boolean"
    truths = task_of(["false", "true"], problem="multi-label", thresholds={True: 0.25})
    assert truths.data.thresholds == {"true": 0.25}
    balanced = task_of(["no", "yes"], class_weights="balanced")
    balanced.learn_from(lambda name: np.array([0, 0, 0, 1]) if name == "label" else None)
    assert balanced._weights == [4 / 6, 2.0]
    several = task_of(["no", "yes"], problem="multi-label", class_weights="balanced")
    several.learn_from(lambda name: np.array([1, 0, 1, 0, 0, 1, 1, 0], dtype=np.float32))
    assert several._weights == [1 / 3, 3.0]
    for settings, key in (
        ({"class_weights": {"yeah": 2.0}}, "class_weights"),
        ({"thresholds": {"yeah": 0.2}}, "thresholds"),
    ):
        with pytest.raises(
            ConfigurationError,
            match=rf"data\.{key} = 'yeah': there is no such class among 2; the nearest is 'yes'",
        ):
            task_of(["no", "yes"], problem="multi-label", **settings).learn_from(nothing)
    with pytest.raises(
        ConfigurationError,
        match=r"data\.top_k = 2: there are 2 classes, and the right one is always among so many",
    ):
        task_of(["no", "yes"], top_k=2).learn_from(nothing)
    for labels, given, reason in (
        (["no", "yes"], "maybe", r"is none of the classes; write 'no' or 'yes'"),
        (["a", "b", "c"], "a", "there are 3 classes, and f1 is the mean over them; leave it out"),
    ):
        with pytest.raises(ConfigurationError, match=rf"data\.positive_label = '{given}': {reason}"):
            task_of(labels, positive_label=given).learn_from(nothing)


def test_options_are_for_training_and_an_evaluation_measures_without_them() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    config = BertConfig(**small, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    model = BertForSequenceClassification(config)
    plain = task_of(["a", "b", "c"])
    other = task_of(["a", "b", "c"], class_weights={"a": 5.0, "b": 2.0}, label_smoothing=0.2)
    other.learn_from(nothing)
    batch = plain.collate([[sample([5, 6, 7], [1])], [sample([8], [0])], [sample([9], [2]).as_filler()]])
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    weights = torch.tensor([5.0, 2.0, 1.0])
    expected = torch.nn.functional.cross_entropy(
        logits[:2], batch["labels"][:2], weight=weights, label_smoothing=0.2, reduction="sum"
    )
    torch.testing.assert_close(other.loss(model.train(), batch).loss_sum, expected, rtol=1e-6, atol=1e-6)
    model.eval()
    assert other.loss(model, batch).loss_sum == plain.loss(model, batch).loss_sum
    own = model(**{key: batch[key][:2] for key in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(plain.loss(model, batch).loss_sum / 2, own, rtol=1e-6, atol=1e-6)


def output_of(logits: Any) -> Output:
    return Output(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(logits))


def test_what_the_model_says() -> None:
    plain, all_of_it = AnswerOptions(False, None), AnswerOptions(True, 2)
    one = task_of(["a", "b", "c"])
    logits = [[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]
    assert one.answers(output_of(logits), {}, [], plain) == [{"label": "b"}, {"label": "a"}]
    said = one.answers(output_of(logits), {}, [], all_of_it)[0]
    shares = torch.tensor(logits[0], dtype=torch.float64).softmax(0).tolist()
    assert said["probability"] == pytest.approx(shares[1])
    assert [entry["label"] for entry in said["labels"]] == ["b", "c"]
    assert [entry["probability"] for entry in said["labels"]] == pytest.approx([shares[1], shares[2]])
    several = task_of(["a", "b", "c"], problem="multi-label", thresholds={"c": 0.8})
    several.learn_from(nothing)
    assert several.answers(output_of(logits), {}, [], plain) == [{"labels": ["b"]}, {"labels": ["a"]}]
    said = several.answers(output_of(logits), {}, [], all_of_it)[0]
    assert said["probabilities"] == pytest.approx({"a": 0.5, "b": 0.8807971, "c": 0.7310586})
    assert [entry["label"] for entry in said["most_probable"]] == ["b", "c"]
    fitted = task_of(["a", "b", "c"], problem="multi-label", thresholds="fit")
    fitted.adopt_evaluation({"thresholds": {"a": 0.4, "b": 0.95, "c": 0.7}})  # of before there were logits
    assert fitted.answers(output_of(logits), {}, [], plain) == [{"labels": ["a", "c"]}, {"labels": ["a"]}]
    assert measured_by(fitted)["a"] == 0.5  # fitted on the rows that are measured, of which none has it
    fitted.keeps_fitted = True
    assert measured_by(fitted) == pytest.approx({"a": 0.4, "b": 0.95, "c": 0.7})
    sure = {
        "threshold_logits": {"a": 45.0, "b": -45.0, "c": 45.0},
        "thresholds": {"a": 1.0, "b": 0.0, "c": 1.0},
    }
    fitted.adopt_evaluation(sure)
    assert fitted.answers(output_of([[60.0, -60.0, 40.0]]), {}, [], plain) == [{"labels": ["a"]}]
    number = task_of(problem="regression")
    assert number.answers(output_of([[2.5], [1.0]]), {}, [], all_of_it) == [{"value": 2.5}, {"value": 1.0}]
    assert number.answer({}, [{"value": 2.5}]) == {"value": 2.5}


def measured_by(task: SequenceClassification) -> dict[str, float]:
    """The thresholds by which a task's evaluator goes, on two rows without a class."""
    evaluator, weights = task.evaluator(), torch.ones(2)
    evaluator.update(output_of([[0.0, 2.0, 1.0]] * 2), {"weights": weights, "labels": torch.zeros(2, 3)})
    evaluator.compute([evaluator.state()])
    return dict(evaluator.details()["thresholds"])


@pytest.mark.parametrize("problem", ["single-label", "multi-label", "regression"])
def test_rows_to_be_predicted_need_no_label(problem: str) -> None:
    task = task_of(["a", "b", "c"], problem=problem)
    task.for_prediction = True
    assert task.columns == ("text",)
    arrays = arrays_of(task, {"text": "the cat"}, TOKENIZER)
    assert arrays["label"].shape == ((3,) if problem == "multi-label" else (1,))
    task.collate([[Sample(arrays, 0, 4)]])


def test_columns_with_numbers_by_class_have_a_hash() -> None:
    """The planner remembers what it saw of a job's rows by the section `data`."""
    one, same, other = (
        LabelledColumns(train=TRAIN, text="text", label="label", class_weights={"a": weight})
        for weight in (2.0, 2.0, 3.0)
    )
    assert hash(one) == hash(same) and one == same and hash(one) != hash(other)
