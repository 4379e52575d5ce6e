"""Scores of written texts are those of the libraries that define them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.errors import ConfigurationError
from launcher.tasks.generation import Evaluation, Generate, GenerationOptions
from launcher.tasks.text_scores import EXACT, OVERLAP, scores

ANSWERS = ["the cat sat on the mat .", "a dog", "", "häuser & straßen", "one two three four five six"]
REFERENCES = [["the cat sat on a mat ."], ["a dog ran", "the dog"], ["nothing"], ["Häuser und Straßen"], ["six five four three two one", "one two three four five six", "seven"]]  # fmt: skip


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    import sacrebleu

    found = scores(ANSWERS, REFERENCES, Evaluation(), tuple(OVERLAP))
    streams = [
        [texts[number] if number < len(texts) else None for texts in REFERENCES] for number in range(3)
    ]
    assert found["bleu"] == sacrebleu.corpus_bleu(ANSWERS, streams).score > 10
    assert found["chrf"] == sacrebleu.corpus_chrf(ANSWERS, streams).score > 10
    single = [texts[0] for texts in REFERENCES]
    alone = scores(ANSWERS, [[text] for text in single], Evaluation(), tuple(OVERLAP))
    assert alone["bleu"] == sacrebleu.corpus_bleu(ANSWERS, [single]).score < found["bleu"]


def test_rouge_takes_the_best_reference_of_a_row() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = scores(ANSWERS, REFERENCES, Evaluation(), tuple(OVERLAP))
    for kind in ("rouge1", "rouge2", "rougeL"):
        rows = [
            max(scorer.score(text, answer)[kind].fmeasure for text in texts)
            for answer, texts in zip(ANSWERS, REFERENCES, strict=True)
        ]
        assert found[kind] == pytest.approx(100 * sum(rows) / len(rows))


def test_exact_matches_are_by_any_reference_and_do_not_mind_space() -> None:
    found = scores(["42", " a ", "no"], [["42"], ["b", "a"], ["yes"]], Evaluation(), tuple(EXACT))
    assert found == {"exact_match": pytest.approx(200 / 3)}


def test_no_answers_score_nothing() -> None:
    assert set(scores([], [], Evaluation(), tuple(EXACT | OVERLAP)).values()) == {0.0}


def test_another_script_is_cut_otherwise() -> None:
    answers, references = ["我们 走 吧"], [["我们走吧"]]
    plain, chinese = (
        scores(answers, references, Evaluation(bleu_tokenizer=name), ("bleu",))["bleu"]
        for name in ("13a", "zh")
    )
    assert chinese == pytest.approx(100) and plain < 50


def module(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_scores.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("own_scores", None)


def test_a_function_of_ones_own_is_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def last_number(answers, references):\n    return sum(a[-1:] == r[0][-1:] for a, r in zip(answers, references))\n"
    module(tmp_path, text, monkeypatch)
    evaluation = Evaluation(scorer="own_scores:last_number")
    assert scores(["x 3", "y 4"], [["3"], ["5"]], evaluation, ()) == {"last_number": 1.0}


@pytest.mark.parametrize(
    ("text", "scorer", "message"),
    [
        ("", "own_scores:score", "cannot be imported: AttributeError"),
        ("import nothing_of_this_name", "own_scores:score", "No module named 'nothing_of_this_name'"),
        ("score = 3", "own_scores:score", "is a int, not a function"),
        (
            "def score(answers): return 1",
            "own_scores:score",
            "it takes .answers, references. and returns a number",
        ),
        (
            "def score(answers, references): return 'much'",
            "own_scores:score",
            "failed on 1 answers: ValueError",
        ),
    ],
)
def test_a_function_that_cannot_score(
    text: str, scorer: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, text, monkeypatch)
    with pytest.raises(ConfigurationError, match=message) as caught:
        scores(["a"], [["a"]], Evaluation(scorer=scorer), ())
    assert caught.value.problems[0].key == "evaluation.scorer"


def test_texts_are_scored_in_groups_and_distinct_ones_counted() -> None:
    """The scorer of the user's own is asked once, of all answers."""
    import numpy as np

    from launcher.tasks.writing import TextEvaluator, WritingTask, as_bytes

    class Writer:
        compared_by = OVERLAP
        evaluation = Evaluation(scorer="tests.unit.no_such_module:score")
        limit_details = WritingTask.limit_details
        generation = GenerationOptions({"max_new_tokens": 8})

    evaluator: Any = TextEvaluator(cast(Any, Writer()))
    assert evaluator.details() == {}
    pairs = zip(ANSWERS * 2, REFERENCES * 2, strict=True)
    rows = [[number, 0, *pair, number < 3] for number, pair in enumerate(pairs)]
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        evaluator.compute([[np.zeros(4), as_bytes(rows)]])
    told = evaluator.details()
    assert (told["num_answers"], told["num_distinct_answers"]) == (10, 5)
    assert (told["num_at_limit"], told["max_new_tokens"]) == (3, 8)
    groups = told["groups"]["words of the reference"]
    assert {name: group["num_rows"] for name, group in groups.items()} == {"1": 2, "3 to 4": 4, "5 to 8": 4}
    short = scores(["a dog", ANSWERS[3]], [REFERENCES[1], REFERENCES[3]], Evaluation(), tuple(OVERLAP))
    assert {name: groups["3 to 4"][name] for name in short} == pytest.approx(short)
    assert next(iter(groups["1"])) == "bleu"


@pytest.mark.parametrize("padding", [0, 2], ids=["of its own", "the end"])
def test_answers_that_came_to_their_limit_are_told(padding: int) -> None:
    """A model may be forced to end there (BART): its last token tells nothing."""
    import numpy as np

    from launcher.tasks.writing import WritingTask

    class Words:
        def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
            return [" ".join(map(str, row)) for row in rows]

    class Writer:
        tokenizer, settings = Words(), Generate(max_new_tokens=4, stop_strings=("9 9",))
        generation = GenerationOptions({"max_new_tokens": 4, "pad_token_id": padding, "eos_token_id": [2]})

    def at_limit(*rows: list[int]) -> list[bool]:
        return WritingTask.at_limit(cast(Any, Writer()), np.array(rows))

    assert at_limit([5, 6, 7, 8], [5, 2, padding, padding], [5, 6, 2, padding], [5, 9, 9, 1]) == [
        True,
        *[False] * 3,
    ]
    assert at_limit([5, 6, 7, 2]) == [padding == 0]
    assert at_limit([5, 6, 7], [8, 8, 8]) == [False, False]
