"""Scores of generated texts against references: BLEU, chrF, ROUGE, exact match, a user's own function.

All are over the full evaluation and in per cent, as in papers; sacrebleu and rouge-score compute them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.tasks.generation import Evaluation
from launcher.tasks.task import Better

OVERLAP: dict[str, Better] = dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL"), "higher")
EXACT: dict[str, Better] = {"exact_match": "higher"}
References = Sequence[Sequence[str]]


def scores(
    answers: Sequence[str], references: References, evaluation: Evaluation, names: Sequence[str]
) -> dict[str, float]:
    """Return the named scores of answers against one or several references each, and the score of the job's
    own scorer.

    Raises ConfigurationError if that scorer cannot be called or returns no number.
    """
    results: dict[str, float] = {}
    if {"bleu", "chrf"} & set(names):
        results |= overlap(answers, references, evaluation.bleu_tokenizer)
    if "rouge1" in names:
        results |= rouge(answers, references)
    if "exact_match" in names:
        equal = [
            answer.strip() in {text.strip() for text in texts}
            for answer, texts in zip(answers, references, strict=True)
        ]
        results["exact_match"] = 100 * sum(equal) / max(1, len(equal))
    if evaluation.scorer is not None and evaluation.scorer_name is not None:
        results[evaluation.scorer_name] = _by_own(evaluation.scorer, answers, references)
    return results


def overlap(answers: Sequence[str], references: References, tokenizer: str = "13a") -> dict[str, float]:
    """Return `bleu` (arXiv 1804.08771) and `chrf` (chrF2, W15-3049), 0 to 100, of the whole corpus by
    sacrebleu."""
    import sacrebleu

    if not answers:
        return {"bleu": 0.0, "chrf": 0.0}
    # sacrebleu wants the first reference of every row, then the second; None where a row has fewer.
    most = max(map(len, references))
    streams = [
        [texts[number] if number < len(texts) else None for texts in references] for number in range(most)
    ]
    bleu = sacrebleu.BLEU(tokenize=tokenizer).corpus_score(list(answers), streams)
    chrf = sacrebleu.CHRF().corpus_score(list(answers), streams)
    return {"bleu": bleu.score, "chrf": chrf.score}


def rouge(answers: Sequence[str], references: References) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, -2 and -L (W04-1013), 0 to 100, by stems; the best reference counts.

    Its words are of ASCII letters and digits: for other scripts use BLEU and chrF.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    rows = [
        scorer.score_multi(list(texts), answer) for answer, texts in zip(answers, references, strict=True)
    ]
    return {kind: 100 * sum(row[kind].fmeasure for row in rows) / max(1, len(rows)) for kind in kinds}


def own_scorer(name: str) -> Callable[..., Any]:
    """Return the function that `evaluation.scorer` names. Raises ConfigurationError if it cannot be
    imported."""
    module, _, function = name.partition(":")
    try:
        scorer: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's own, and may raise anything
        reason = f"cannot be imported: {type(error).__name__}: {error}; the module must lie on PYTHONPATH"
        raise ConfigurationError(Problem("evaluation.scorer", name, reason)) from None
    if not callable(scorer):
        raise ConfigurationError(
            Problem("evaluation.scorer", name, f"is a {type(scorer).__name__}, not a function")
        )
    return scorer


def _by_own(name: str, answers: Sequence[str], references: References) -> float:
    try:
        return float(own_scorer(name)(list(answers), [list(texts) for texts in references]))
    except ConfigurationError:
        raise
    except Exception as error:
        what = f"failed on {len(answers):,} answers: {type(error).__name__}: {error}"
        reason = f"{what}; it takes (answers, references) and returns a number"
        raise ConfigurationError(Problem("evaluation.scorer", name, reason)) from None
