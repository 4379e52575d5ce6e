"""A model's answers for the words of a text: tags, and the entities that they mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.schemes import Scheme
from launcher.tasks.tag_scores import classes_of, completed, loose_entities
from launcher.tasks.tagged_rows import Marked
from launcher.tasks.task import AnswerOptions, Sample

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


def of_samples(
    shares: np.ndarray, samples: Sequence[Sample], names: Sequence[str], options: AnswerOptions
) -> list[dict[str, Any]]:
    """Return for each sample its words' numbers in the row, tags by number, and probabilities; on request the
    most likely tags.

    `shares`: the probabilities of tags, float [words with a piece, tags], sample after sample, without
    padding samples.
    """
    parts, begin = [], 0
    for sample in samples:
        places = sample["places"] if sample.weight else sample["places"][:0]
        read = np.flatnonzero(places >= 0)
        own = shares[begin : begin + len(read)]
        begin += len(read)
        tags, probabilities = places.astype(np.int64), np.full(len(places), np.nan)
        tags[read], probabilities[read] = own.argmax(axis=1), own.max(axis=1)
        part: dict[str, Any] = {"words": sample["words"][: len(places)].tolist(), "tags": tags.tolist()}
        # JSON has no NaN: a word without a piece has no probability.
        part["probabilities"] = [None if np.isnan(one) else float(one) for one in probabilities]
        part["asked"] = bool(options.probabilities)
        if options.top_k is not None:
            likeliest: list[Any] = [None] * len(places)
            for word, share in zip(read.tolist(), own, strict=True):
                best = np.argsort(-share, kind="stable")[: options.top_k].tolist()
                likeliest[word] = [
                    {"tag": names[number], "probability": float(share[number])} for number in best
                ]
            part["likeliest"] = likeliest
        parts.append(part)
    return parts


def of_row(
    marked: Marked, parts: Sequence[dict[str, Any]], names: Sequence[str], scheme: Scheme
) -> dict[str, Any]:
    """Return the `tags` of a row's words, and with a scheme its `entities`; on request `probabilities` and
    the `likeliest` tags. Without a scheme, a word without a prediction has None.

    An entity has its type, text, `start` and `end` in characters, `words` (the first, and the one after the
    last), and a probability, the mean of its words'. If the row is a list of words, characters count in the
    words joined by spaces.
    """
    order = np.argsort(np.concatenate([part["words"] for part in parts]), kind="stable").tolist()

    def all_of(key: str) -> list[Any]:
        flat = [value for part in parts for value in part[key]]
        return [flat[number] for number in order]

    probabilities = all_of("probabilities")
    if scheme == "none":
        answer: dict[str, Any] = {"tags": classes_of(all_of("tags"), names)}
    else:
        tags = completed(all_of("tags"), names)
        answer = {"tags": tags, "entities": []}
        for kind, first, behind in loose_entities(tags):
            start, end = marked.words[first][0], marked.words[behind - 1][1]
            sure = [one for one in probabilities[first:behind] if one is not None]
            entity = {
                "type": kind,
                "text": marked.text[start:end],
                "start": start,
                "end": end,
                "words": [first, behind],
            }
            answer["entities"].append(entity | {"probability": sum(sure) / len(sure)})
    if parts[0]["asked"]:
        answer["probabilities"] = probabilities
    if "likeliest" in parts[0]:
        answer["likeliest"] = all_of("likeliest")
    return answer
