"""Exact match and F1 held to SQuAD's scripts, written out here once more in another way."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from launcher.tasks.squad import (
    Asked,
    answered,
    best_threshold,
    exact_match,
    f1,
    normalize,
    with_unanswerable,
)

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
TEXTS = [
    "", " ", "the", "a an the", "The Cat", "cat", "the cat sat", "cat cat", "Cat, cat; the CAT!", "...", "1,000", "1000",
    "an apple a day", "apple day", "état", "l'état", "東京 都", "the\u00a0cat", "well-known", "well known", "A", "theatre", "o'the",
]  # fmt: skip


def plain(text: str) -> str:
    """Letter by letter, and word by word for articles, which end at what is no letter, digit or underscore."""
    kept = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    words, word = [], ""
    for letter in kept + " ":
        if letter.isalnum() or letter == "_":
            word += letter
            continue
        words += [" " if word in ("a", "an", "the") else word, letter]
        word = ""
    return " ".join("".join(words).split())


def overlap(answer: str, reference: str, version: int) -> float:
    ours, theirs = plain(answer).split(), plain(reference).split()
    if version == 2 and (not ours or not theirs):
        return float(ours == theirs)
    left, common = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    return 0.0 if not common else 2 * common / (len(ours) + len(theirs))


def questions(seed: int, number: int, unanswerable: bool) -> list[Asked]:
    generator = random.Random(seed)
    found = []
    for _ in range(number):
        references = tuple(generator.choice(TEXTS) for _ in range(generator.randrange(not unanswerable, 4)))
        found.append(
            Asked(
                references,
                generator.choice(TEXTS),
                generator.choice([0.0, 0.2, 0.2, 0.5, 0.9, 1.0, generator.random()]),
            )
        )
    return found


def script_v2(asked: list[Asked], threshold: float) -> dict[str, float]:
    """Version 2.0, from one question to the next."""
    exact, partial = [], []
    for one in asked:
        gold = [text for text in one.references if plain(text)] or [""]
        exact.append(float(any(plain(one.answer) == plain(text) for text in gold)))
        partial.append(max(overlap(one.answer, text, 2) for text in gold))
    found: dict[str, float] = {}
    for name, scores in (("exact_match", exact), ("f1", partial)):
        given = [
            score if one.no_answer <= threshold else float(not one.references)
            for one, score in zip(asked, scores, strict=True)
        ]
        found[name] = sum(given) / len(given)
        kinds = {
            "has_answer": [bool(one.references) for one in asked],
            "no_answer": [not one.references for one in asked],
        }
        for kind, chosen in kinds.items():
            of_kind = [score for score, taken in zip(given, chosen, strict=True) if taken]
            found[f"{kind}_{name}"] = sum(of_kind) / len(of_kind) if of_kind else math.nan
        current = best = sum(not one.references for one in asked)
        taken = 0.0
        for number in sorted(range(len(asked)), key=lambda number: asked[number].no_answer):
            gain = scores[number] if asked[number].references else (-1 if asked[number].answer else 0)
            current += gain
            if current > best:
                best, taken = current, asked[number].no_answer
        found[f"best_{name}"], found[f"best_{name}_threshold"] = best / len(asked), taken
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_normalised_as_the_scripts_do(text: str) -> None:
    assert normalize(text) == plain(text)


@pytest.mark.parametrize("answer", TEXTS)
def test_scores_of_single_answers(answer: str) -> None:
    for reference in TEXTS:
        assert exact_match(answer, [reference]) == float(plain(answer) == plain(reference))
        assert f1(answer, [reference]) == pytest.approx(overlap(answer, reference, 1), abs=1e-12)
        assert f1(answer, [reference], empty_is_a_word=True) == pytest.approx(
            overlap(answer, reference, 2), abs=1e-12
        )


def test_the_best_of_several_references_counts() -> None:
    assert exact_match("the cat", ["dog", "Cat!"]) == 1.0
    assert f1("cat dog", ["dog", "bird cat dog"]) == pytest.approx(0.8)


@pytest.mark.parametrize("seed", range(5))
def test_every_question_has_an_answer(seed: int) -> None:
    asked = questions(seed, 40, unanswerable=False)
    found = answered(asked)
    best = [max(overlap(one.answer, text, 1) for text in one.references) for one in asked]
    assert found["f1"] == pytest.approx(sum(best) / 40)
    assert found["exact_match"] == pytest.approx(
        sum(exact_match(one.answer, one.references) for one in asked) / 40
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0, None])
def test_with_unanswerable_questions(seed: int, threshold: float | None) -> None:
    asked = questions(seed, 1 + seed * 3, unanswerable=True)
    metrics, beside = with_unanswerable(asked, threshold)
    taken = script_v2(asked, 1.0)["best_f1_threshold"] if threshold is None else threshold
    expected = script_v2(asked, taken)
    assert beside["no_answer_threshold"] == taken
    names = {"no_answer_accuracy": "no_answer_exact_match"}
    for name, value in (
        metrics | {key: beside[key] for key in ("best_f1_threshold", "best_exact_match_threshold")}
    ).items():
        assert value == pytest.approx(expected[names.get(name, name)], abs=1e-12, nan_ok=True), name
    assert metrics["f1"] == pytest.approx(metrics["best_f1"]) or threshold is not None or _tied(asked)


def _tied(asked: list[Asked]) -> bool:
    """Whether two questions are as doubtful: the script then goes by their order, and no threshold parts them."""
    return len({one.no_answer for one in asked}) < len(asked)


def test_one_kind_of_question_alone() -> None:
    metrics, beside = with_unanswerable([Asked(("cat",), "cat", 0.3)], 0.5)
    assert math.isnan(metrics["no_answer_accuracy"]) and metrics["has_answer_f1"] == 1.0
    assert (beside["num_with_answer"], beside["num_without_answer"]) == (1, 0)
    metrics, _ = with_unanswerable([Asked((), "cat", 0.3)], 0.5)
    assert (
        math.isnan(metrics["has_answer_f1"])
        and metrics["no_answer_accuracy"] == 0.0
        and metrics["best_f1"] == 1.0
    )


def test_the_best_threshold_is_the_first_that_is_best() -> None:
    scores, doubt = np.array([1.0, 1.0, 0.0]), np.array([0.1, 0.7, 0.7])
    found: Any = best_threshold(scores, doubt, np.array([True, True, False]), np.zeros(3, dtype=bool))
    assert found == (1.0, 0.7)
