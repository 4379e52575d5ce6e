from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.errors import ConfigurationError
from launcher.runs.prepared import place, why
from launcher.tasks.question_answering import QuestionAnswering, QuestionColumns
from launcher.tasks.task import AnswerOptions, Encoded, Output, Sample
from launcher.training.data import inspect
from launcher.training.data.prepare import prepare
from tests.distributed.data_world import plan_of, word_tokenizer
from tests.training.tiny import COMMON, model_of

TRAIN = Source(path="unused.jsonl")
TOKENIZER = word_tokenizer()
CONTEXT = "one two three four five six seven the cat sat on the mat ."
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 64},
    "distilbert": {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4},
    "electra": SMALL | {"embedding_size": 24},
    "longformer": SMALL | {"attention_window": 4, "sep_token_id": 3, "max_position_embeddings": 64},
    "llama": SMALL | {"num_key_value_heads": 2},
    "t5": {
        "d_model": 48,
        "d_kv": 12,
        "d_ff": 80,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}


def task_of(tokenizer: Any = TOKENIZER, **settings: Any) -> QuestionAnswering:
    data = QuestionColumns(**{"train": TRAIN, "max_length": 32, "doc_stride": 3, **settings})
    task = tasks.build(plan_of(data, "question-answering"), tokenizer)
    assert isinstance(task, QuestionAnswering)
    return task


def row_of(
    text: str | None = "cat", question: str = "the cat", context: str = CONTEXT, **more: Any
) -> dict[str, Any]:
    answers = [] if text is None else [{"text": text, "answer_start": context.index(text)}]
    return {"question": question, "context": context, "answers": answers} | more


def windows_of(
    task: QuestionAnswering, row: dict[str, Any], tokenizer: Any = TOKENIZER, id: int = 0
) -> list[Sample]:
    [result] = task.encode([row], tokenizer)
    if isinstance(result, RowProblem):
        raise result
    assert isinstance(result, tuple)
    return [Sample(one.arrays, id, one.length, window=number) for number, one in enumerate(result)]


def words(ids: Any) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(list(ids)))


def test_question_and_text_in_one_window() -> None:
    [sample] = windows_of(task_of(), row_of("cat sat"))
    assert words(sample["input_ids"]) == f"[CLS] the cat [SEP] {CONTEXT} [SEP]"
    assert sample["token_type_ids"].tolist() == [0] * 4 + [1] * 15
    first, last = sample["positions"].tolist()
    assert words(sample["input_ids"][first : last + 1]) == "cat sat"
    assert sample["text"].tobytes().decode() == CONTEXT
    assert json.loads(sample["references"].tobytes()) == ["cat sat"]


@pytest.mark.parametrize("stride", [0, 1, 3, 5])
def test_windows_cover_the_text_and_share_the_stride(stride: int) -> None:
    samples = windows_of(task_of(max_length=12, doc_stride=stride), row_of("cat"))
    parts = [sample["input_ids"][4:-1].tolist() for sample in samples]
    assert all(len(part) == 7 for part in parts[:-1]) and len(parts) > 1
    whole = list(parts[0])
    for part in parts[1:]:
        assert whole[len(whole) - stride :] == part[:stride]
        whole += part[stride:]
    assert words(whole) == CONTEXT
    for sample in samples:
        begin = int(sample["place"][1])
        assert CONTEXT[begin:].startswith(sample["text"].tobytes().decode())
        assert words(sample["input_ids"]).startswith("[CLS] the cat [SEP]")
    assert [bool(len(sample["references"])) for sample in samples] == [True] + [False] * (len(samples) - 1)


@pytest.mark.parametrize("stride", [0, 1, 3, 5])
@pytest.mark.parametrize("limit", [12, 14, 19, 40])
def test_the_planner_counts_the_same_windows(stride: int, limit: int) -> None:
    task = task_of(max_length=limit, doc_stride=stride)
    for question in ("the cat", "the cat sat on", "the cat sat on the mat one two"):
        [made] = task.encode([row_of(question=question)], TOKENIZER)
        counts = [len(question.split()), len(CONTEXT.split())]
        lengths = [] if isinstance(made, RowProblem) else [one.length for one in made]
        assert task.sample_lengths(counts, 3) == lengths
        dropped = task_of(max_length=limit, doc_stride=stride, too_long="drop").sample_lengths(counts, 3)
        assert dropped == (lengths if len(lengths) == 1 else [])


def test_a_window_without_the_answer_points_at_the_first_token() -> None:
    samples = windows_of(task_of(max_length=12, doc_stride=3), row_of("cat sat"))
    held = [words(sample["input_ids"][slice(*(sample["positions"] + [0, 1]))]) for sample in samples]
    assert set(held) == {"[CLS]", "cat sat"}


def test_an_answer_that_no_window_holds_is_said_and_left_out_of_the_loss() -> None:
    task = task_of(max_length=12, doc_stride=3)
    [result] = task.encode([row_of("three four five six seven the cat sat")], TOKENIZER)
    assert isinstance(result, tuple)
    assert all(isinstance(one, Encoded) and one.cut and one.num_supervised == 0 for one in result)
    model = model_of("bert", "AutoModelForQuestionAnswering")
    batch = task.collate([[Sample(result[0].arrays, 0, result[0].length)]])
    assert task.loss(model, batch).loss_sum == 0


def test_rows_that_need_windows_follow_the_policy() -> None:
    for policy in ("drop", "refuse"):
        task = task_of(max_length=12, too_long=policy)
        assert len(windows_of(task, row_of("cat", context="the cat sat ."))) == 1
        with pytest.raises(
            RowProblem, match="too long: question and text have more than max_length = 12 tokens"
        ):
            windows_of(task, row_of())


@pytest.mark.parametrize("question", ["the cat sat on", "the cat sat on the mat one two three"])
def test_a_question_that_leaves_no_room(question: str) -> None:
    task = task_of(max_length=12, doc_stride=5)
    room = max(0, 9 - len(question.split()))
    with pytest.raises(
        RowProblem,
        match=f"the question leaves {room} of max_length = 12 tokens for its text, and windows share doc_",
    ):
        windows_of(task, row_of(question=question))
    problem, other = task.encode(
        [row_of(question=question), row_of("cat", "the cat", "the cat sat .")], TOKENIZER
    )
    assert isinstance(problem, RowProblem) and isinstance(other, tuple)


def test_a_long_question_with_a_short_text_is_one_window() -> None:
    [sample] = windows_of(
        task_of(max_length=12, doc_stride=5), row_of("cat", "the cat sat on the", "the cat")
    )
    assert words(sample["input_ids"]) == "[CLS] the cat sat on the [SEP] the cat [SEP]"


def test_questions_without_an_answer() -> None:
    with pytest.raises(RowProblem, match=r"a question without an answer; write data\.unanswerable: true"):
        windows_of(task_of(), row_of(None))
    [sample] = windows_of(task_of(unanswerable=True), row_of(None))
    assert sample["positions"].tolist() == [0, 0] and json.loads(sample["references"].tobytes()) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": " ", "context": CONTEXT, "answers": []}, "empty: 'question' has no text"),
        ({"question": "a", "answers": []}, "missing key: no 'context'"),
        ({"question": "a", "context": CONTEXT}, "missing key: no 'answers'"),
        (
            {"question": "a", "context": CONTEXT, "answers": [{"text": "cat", "answer_start": 1}]},
            "at character 1 stands 'ne '",
        ),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        windows_of(task_of(), row)


def test_what_contradicts_itself_is_refused() -> None:
    def problems(**settings: Any) -> str:
        data = QuestionColumns(**{"train": TRAIN, "max_length": 64, "doc_stride": 8, **settings})
        return "\n".join(str(one.problem) for one in QuestionAnswering(data).checks())

    assert problems() == ""
    assert "data.packing" in problems(packing=True)
    assert (
        "data.doc_stride = 64: windows of max_length = 64 tokens would share all of their text"
        in problems(doc_stride=64)
    )
    assert "write data.unanswerable: true" in problems(no_answer_threshold=0.3)
    assert problems(no_answer_threshold=0.3, unanswerable=True) == ""
    assert "data.answers = 'context': is the column of data.context too" in problems(answers="context")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "somewhere"

    with pytest.raises(
        ConfigurationError, match=r"model\.name = 'somewhere': its tokenizer \(Slow\) does not say where"
    ):
        task_of(Slow())


def test_a_model_that_stands_needs_a_head_for_answers() -> None:
    config = transformers.BertConfig(architectures=["BertForQuestionAnswering"])
    task_of().adopt(config, as_it_stands=True)
    config.architectures = ["BertModel"]
    task_of().adopt(config)
    with pytest.raises(
        ConfigurationError, match=r"MODEL: the model \(BertModel\) has no head for answers; train it first"
    ):
        task_of().adopt(config, as_it_stands=True)


def model_for(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **(COMMON | KINDS[kind]))
    torch.manual_seed(0)
    return transformers.AutoModelForQuestionAnswering.from_config(config).float().eval()


def separated_tokenizer() -> Any:
    """As RoBERTa's: two separators between question and text, and no token types."""
    from tokenizers import processors

    tokenizer = word_tokenizer("left")
    cls, sep = (tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("[SEP]", sep), ("[CLS]", cls), trim_offsets=False
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers_for_each_window_alone(kind: str) -> None:
    tokenizer = TOKENIZER if kind in ("bert", "electra") else separated_tokenizer()
    model, task = model_for(kind), task_of(tokenizer, max_length=16, unanswerable=True)
    task.adopt(model.config)
    task.prepare(tokenizer)
    task.configure(model.config)
    rows = [row_of("cat sat"), row_of(None, "a dog"), row_of("mat", "one"), row_of("cat", context="the cat")]
    samples = [
        sample for number, row in enumerate(rows) for sample in windows_of(task, row, tokenizer, number)
    ]
    assert len({sample.length for sample in samples}) > 1 and len(samples) > len(rows)
    output = task.loss(model, task.collate([[sample] for sample in samples] + [[samples[0].as_filler()]]))
    expected = torch.zeros(())
    for number, sample in enumerate(samples):
        inputs = {
            key: torch.tensor(sample[key].astype(np.int64))[None]
            for key in ("input_ids", "token_type_ids")
            if key in sample
        }
        start, end = torch.tensor(sample["positions"].astype(np.int64))
        alone = model(**inputs, start_positions=start[None], end_positions=end[None])
        expected = expected + alone.loss
        assert output.predictions is not None
        logits = torch.stack((alone.start_logits, alone.end_logits), -1)[0]
        torch.testing.assert_close(output.predictions[number, : sample.length], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=1e-6)
    together = task.collate([[samples[0]], [samples[1]]])
    parts = [task.loss(model, task.collate([[sample]])).loss_sum for sample in samples[:2]]
    torch.testing.assert_close(task.loss(model, together).loss_sum, parts[0] + parts[1], rtol=1e-6, atol=1e-6)


def test_positions_beyond_the_window_count_for_nothing_as_in_transformers() -> None:
    model, task = model_for("bert"), task_of()
    samples = windows_of(task, row_of()) + windows_of(task, row_of("sat")) + windows_of(task, row_of("mat"))
    samples[1]["positions"] = np.array([2**31 - 1, 6], dtype=np.int32)
    batch = task.collate([[sample] for sample in samples])
    starts, ends = batch["positions"].T
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    whole = model(**inputs, start_positions=starts.clone(), end_positions=ends.clone())
    both = torch.stack((whole.start_logits, whole.end_logits), -1)
    sums = torch.nn.functional.cross_entropy(
        both, batch["positions"].clamp(max=both.shape[1]), reduction="none", ignore_index=both.shape[1]
    )
    assert float(whole.loss.detach()) == pytest.approx(
        float(sums[:, 0].sum() / 2 + sums[:, 1].sum() / 3) / 2, rel=1e-6
    )
    assert float(task.loss(model, batch).loss_sum.detach()) == pytest.approx(float(sums.sum()) / 2, rel=1e-6)


def test_a_separator_among_the_words_of_a_longformers_row() -> None:
    tokenizer, config = separated_tokenizer(), transformers.LongformerConfig()
    task = task_of(tokenizer)
    task.adopt(config)
    task.prepare(tokenizer)
    plain, other = task.encode([row_of(), row_of(context="the [SEP] cat")], tokenizer)
    assert isinstance(plain, tuple) and isinstance(other, RowProblem)
    assert "holds a separator of the tokenizer as a word" in str(other)
    [sample] = windows_of(task, row_of(), tokenizer)
    short = task.shortened(sample, 7, [])
    assert (
        short.length < sample.length and np.count_nonzero(short["input_ids"] == tokenizer.sep_token_id) == 3
    )
    with pytest.raises(
        ConfigurationError, match="by 3 separators in a sequence, and its tokenizer puts 2 there"
    ):
        task.prepare(TOKENIZER)


def logits_at(samples: list[Sample], *points: tuple[int, int, float]) -> torch.Tensor:
    """Of each window logits of zero but where its (first, last, height) begins and ends."""
    logits = torch.zeros(len(samples), max(sample.length for sample in samples), 2)
    for row, (first, last, height) in enumerate(points):
        logits[row, first, 0] = logits[row, last, 1] = height / 2
    return logits


def measured(task: QuestionAnswering, parts: list[tuple[list[Sample], torch.Tensor]]) -> dict[str, float]:
    """Each part as a rank sees it, with filler behind it."""
    states = []
    for samples, logits in parts:
        evaluator = task.evaluator()
        if samples:
            items = [[sample] for sample in samples] + [[samples[0].as_filler()]]
            output = Output(
                torch.tensor(2.0 * len(samples)), torch.tensor(0.0), torch.cat([logits, logits[:1]])
            )
            evaluator.update(output, task.collate(items))
        states.append(evaluator.state())
    return task.evaluator().compute(states)


def test_the_best_window_answers_and_ranks_do_not_matter() -> None:
    task = task_of(max_length=12)
    first, second = windows_of(task, row_of("cat"), id=0), windows_of(task, row_of("on the mat"), id=1)
    samples = first + second
    assert len(first) == len(second) == 3
    places = [tuple(sample["positions"].tolist()) for sample in samples]
    heights = [5.0 if place != (0, 0) else 1.0 for place in places]
    points = [
        (*(place if height > 1 else (4, 4)), height) for place, height in zip(places, heights, strict=True)
    ]
    logits = logits_at(samples, *points)
    together = measured(task, [(samples, logits)])
    assert together == {"loss": 2.0, "exact_match": 1.0, "f1": 1.0}
    order = [4, 0, 2, 5, 1, 3]
    mixed = [samples[number] for number in order]
    assert (
        measured(task, [(mixed[:4], logits[order[:4]]), (mixed[4:], logits[order[4:]]), ([], logits[:0])])
        == together
    )


def test_answers_are_judged_with_and_without_a_threshold() -> None:
    task = task_of(unanswerable=True, no_answer_threshold=0.5)
    samples = [
        windows_of(task, row, id=number)[0]
        for number, row in enumerate([row_of("cat"), row_of(None), row_of("mat")])
    ]
    # The first is right, the second has an answer that there is not, the third none though there is one.
    logits = logits_at(
        samples,
        (*samples[0]["positions"].tolist(), 8.0),
        (6, 6, 2.0),
        (*samples[2]["positions"].tolist(), 2.0),
    )
    logits[2, 0] = 3.0
    found = measured(task, [(samples, logits)])
    assert (found["has_answer_exact_match"], found["no_answer_accuracy"]) == (0.5, 0.0)
    assert found["exact_match"] == pytest.approx(1 / 3) and found["best_exact_match"] == pytest.approx(2 / 3)
    assert set(found) == set(task.metrics)
    evaluator = task_of(unanswerable=True).evaluator()
    evaluator.update(
        Output(torch.tensor(6.0), torch.tensor(0.0), logits), task.collate([[sample] for sample in samples])
    )
    fitted = evaluator.compute([evaluator.state()])
    assert fitted["f1"] == fitted["best_f1"] == pytest.approx(2 / 3)
    assert evaluator.details()["num_without_answer"] == 1
    groups = evaluator.details()["groups"]
    kinds = groups["questions"]
    assert [kinds[name]["num_rows"] for name in ("with an answer", "without one")] == [2, 1]
    assert kinds["with an answer"]["f1"] == fitted["has_answer_f1"]
    assert kinds["without one"]["f1"] == fitted["no_answer_accuracy"]
    lengths = groups["characters of the text"].values()
    assert sum(one["f1"] * one["num_rows"] for one in lengths) == pytest.approx(3 * fitted["f1"])
    other = task_of(unanswerable=True)
    other.adopt_evaluation(evaluator.details())
    assert other._threshold == evaluator.details()["no_answer_threshold"] != 0.5
    other.keeps_fitted = True
    again = other.evaluator()
    again.compute([evaluator.state()])
    assert again.details()["no_answer_threshold"] == other._threshold


def test_an_answer_is_at_most_so_long() -> None:
    [sample] = windows_of(task_of(), row_of("cat"))
    logits = logits_at([sample], (4, 17, 9.0))
    task = task_of(max_answer_length=3)
    [part] = task.answers(
        Output(torch.tensor(0.0), torch.tensor(0.0), logits), {}, [sample], AnswerOptions(False, None)
    )
    assert len(task.answer({}, [part])["answer"].split()) <= 3


def test_what_the_model_says_of_a_row() -> None:
    task = task_of(max_length=12, unanswerable=True, no_answer_threshold=0.5)
    samples = windows_of(task, row_of("cat"))
    points = [
        (*sample["positions"].tolist(), 8.0) if sample["positions"].any() else (4, 4, 1.0)
        for sample in samples
    ]
    output = Output(torch.tensor(0.0), torch.tensor(0.0), logits_at(samples, *points))
    said = task.answer(row_of(), task.answers(output, {}, samples, AnswerOptions(False, None)))
    assert said == {"answer": "cat", "start": CONTEXT.index("cat"), "end": CONTEXT.index("cat") + 3}
    json.dumps(task.answers(output, {}, samples, AnswerOptions(True, 3)))
    more = task.answer(row_of(), task.answers(output, {}, samples, AnswerOptions(True, 3)))
    assert more["answers"][0]["answer"] == "cat" and len(more["answers"]) == 3
    assert more["probability"] == more["answers"][0]["probability"] > 0.2 and more["no_answer"] < 0.1
    assert sum(one["probability"] for one in more["answers"]) < 1
    spans = [(one["start"], one["end"]) for one in more["answers"]]
    assert len(set(spans)) == 3
    assert output.predictions is not None
    output.predictions[:, 0] = 9.0
    nothing = task.answer(row_of(), task.answers(output, {}, samples, AnswerOptions(True, None)))
    assert nothing["answer"] == "" and nothing["no_answer"] > 0.9


def test_rows_to_be_predicted_need_no_answer() -> None:
    task = task_of()
    task.for_prediction = True
    assert task.columns == ("question", "context")
    [sample] = windows_of(task, {"question": "the cat", "context": CONTEXT})
    assert sample["positions"].tolist() == [0, 0]


def test_an_example_can_be_collated() -> None:
    task = task_of()
    batch = task.collate([[task.example(9)], [task.example(5)]])
    assert batch["input_ids"].shape == (2, 9) and batch["positions"].shape == (2, 2)
    assert [field.name for field in dataclasses.fields(AnswerOptions)] == ["probabilities", "top_k"]


def test_every_row_of_a_file_is_used_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = [row_of("cat"), row_of(None), row_of("mat") | {"answers": [{"text": "mat", "answer_start": 3}]}]
    paragraphs = [
        {
            "context": CONTEXT,
            "qas": [{"question": row["question"], "answers": row["answers"]} for row in asked],
        }
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "a", "paragraphs": paragraphs}]}))
    data = QuestionColumns(train=Source(path=str(path)), max_length=12, doc_stride=3)
    plan = plan_of(data, "question-answering")
    report = prepare(data.train, "train", plan, tasks.build(plan, TOKENIZER), TOKENIZER).report
    assert (report.rows_read, report.rows_used, report.num_items) == (3, 1, 3)
    assert report.dropped == {"label that cannot be used": 2}
    said = [f"{place(one)}: {why(one)}" for one in report.examples]
    assert (
        "squad.json, line 2: label that cannot be used (a question without an answer; write data.unanswerable"
        in said[0]
    )
    assert (
        "squad.json, line 3: label that cannot be used (at character 3 stands ' tw', not 'mat'; that begins at 53"
        in said[1]
    )


def test_the_inspected_tokens_of_the_answer_are_learned() -> None:
    [sample] = windows_of(task_of(), row_of("cat sat"))
    learned = inspect._learned(sample)
    assert words(sample["input_ids"][learned]) == "cat sat" and len(learned) == sample.length


def test_a_row_that_is_drawn_twice_counts_twice() -> None:
    """As bootstrap intervals draw rows anew."""
    task = task_of()
    right, wrong = windows_of(task, row_of("cat"), id=0)[0], windows_of(task, row_of("mat"), id=1)[0]
    states = []
    for sample, point in ((right, right["positions"].tolist()), (wrong, [4, 4])):
        evaluator = task.evaluator()
        output = Output(torch.tensor(1.0), torch.tensor(0.0), logits_at([sample], (*point, 5.0)))
        evaluator.update(output, task.collate([[sample]]))
        states.append(evaluator.state())
    evaluator = task.evaluator()
    drawn = [evaluator.as_copy(states[place], copy) for copy, place in enumerate([0, 0, 1, 0])]
    assert evaluator.compute(drawn)["exact_match"] == 0.75
    assert evaluator.compute(states)["exact_match"] == 0.5
