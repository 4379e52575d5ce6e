"""Scores of tagged words: seqeval's entity scores, in total and by type, and the accuracy over words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.groups import by_length, measured
from launcher.tasks.schemes import OUTSIDE, Entity, Scheme, inside
from launcher.tasks.task import Evaluator, Output

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

CONTINUES, NOT_SEEN = -1, -2
"""Instead of a prediction: a word without a piece of its own, and a word after the end of the text that was
read."""


def entity_scores(
    gold: Sequence[list[str]], predicted: Sequence[list[str]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return `precision`, `recall` and `f1` of all entities; and by type the same with `num_entities`.

    By seqeval's default, which is conlleval's: a tag that is out of order begins an entity. A share of
    nothing is 0.
    """
    from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

    names = ("precision", "recall", "f1", "num_entities")
    whole = precision_recall_fscore_support(list(gold), list(predicted), average="micro", zero_division=0)
    each = precision_recall_fscore_support(list(gold), list(predicted), average=None, zero_division=0)
    kinds = sorted({kind for tags in (*gold, *predicted) for kind, *_ in get_entities(tags)})
    of_types = [dict(zip(names, map(float, values), strict=True)) for values in zip(*each, strict=True)]
    return dict(zip(names[:3], map(float, whole[:3]), strict=True)), dict(zip(kinds, of_types, strict=True))


def loose_entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities in a model's tags, as they are scored, for any order of tags and any scheme."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [
        Entity("" if kind == "_" else kind, first, last + 1) for kind, first, last in get_entities(list(tags))
    ]


def completed(tags: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return the names of predicted tags of a scheme.

    A word without a piece continues the entity before it; a word that was not read is outside.
    """
    completed: list[str] = []
    for number in tags:
        before = completed[-1] if completed else OUTSIDE
        goes_on = number == CONTINUES and before[:1] in ("B", "I")
        completed.append(names[number] if number >= 0 else inside(before) if goes_on else OUTSIDE)
    return completed


def classes_of(tags: Sequence[int], names: Sequence[str]) -> list[str | None]:
    """Return the names of predicted classes, without a scheme; None for a word without a piece, or not
    read."""
    return [names[number] if number >= 0 else None for number in tags]


class TagScores(Evaluator):
    """`loss`, `accuracy` over words and the scores of entities; without a scheme `f1_macro` over the classes
    that occur."""

    def __init__(self, names: Sequence[str], scheme: Scheme) -> None:
        self._names, self._scheme = list(names), scheme
        self._sums = np.zeros(2)
        self._words: list[np.ndarray] = []
        self._types: dict[str, dict[str, float]] = {}
        self._tags: tuple[list[list[str]], list[list[str]]] = [], []
        """The correct tags of each row, and the model's."""

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        words = batch["aside"]["words"].copy()  # row, number in the row, tag, place: see `collate`
        assert output.predictions is not None
        read = words[:, 3] >= 0
        words[read, 3] = output.predictions.argmax(dim=-1).cpu().numpy()
        self._words.append(words)
        self._sums += [float(output.loss_sum), int((batch["labels"] >= 0).sum())]

    def state(self) -> list[np.ndarray]:
        return [self._sums, np.concatenate([np.zeros((0, 4), dtype=np.int64), *self._words])]

    def as_copy(self, state: Sequence[np.ndarray], copy: int) -> Sequence[np.ndarray]:
        sums, words = state
        return [sums, words + np.array([copy << 40, 0, 0, 0])]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum, num_learned = np.sum([sums for sums, _ in states], axis=0).tolist()
        gold: list[list[str]] = []
        predicted: list[list[str]] = []
        for _, tags, guesses in _rows(np.concatenate([words for _, words in states])):
            if self._scheme == "none":
                # As in transformers' run_ner: a word without a piece does not count.
                seen = [place for place, guess in enumerate(guesses) if guess != CONTINUES]
                tags, guesses = [tags[place] for place in seen], [guesses[place] for place in seen]
                predicted.append([name or "" for name in classes_of(guesses, self._names)])
            else:
                predicted.append(completed(guesses, self._names))
            gold.append([self._names[number] for number in tags])
        self._tags = gold, predicted
        metrics = {"loss": loss_sum / max(num_learned, 1)}
        flat = [[name for tags in side for name in tags] for side in (gold, predicted)]
        if not flat[0]:
            return metrics
        metrics["accuracy"] = float(np.mean(np.array(flat[0]) == np.array(flat[1])))
        if self._scheme != "none":
            scores, self._types = entity_scores(gold, predicted)
            # "_" is seqeval's name for entities without a type; then there is only that one.
            named = {kind: values["f1"] for kind, values in self._types.items() if kind != "_"}
            return metrics | scores | {f"f1_{kind}": value for kind, value in named.items()}
        from sklearn.metrics import f1_score

        classes = sorted(set(self._names) & {*flat[0], *flat[1]})
        return metrics | {
            "f1_macro": float(f1_score(*flat, labels=classes, average="macro", zero_division=0))
        }

    def details(self) -> dict[str, Any]:
        """Return the scores of each type of entity, and F1 (without a scheme accuracy) by words of the
        row."""
        groups = by_length(list(map(len, self._tags[0])))
        told: dict[str, Any] = {"types": self._types} if self._types else {}
        return told | ({"groups": {"words of the row": measured(groups, self._of)}} if groups else {})

    def _of(self, places: Sequence[int]) -> dict[str, float]:
        """Return the F1 of the entities of some rows, or the accuracy over their words."""
        gold, predicted = ([side[place] for place in places] for side in self._tags)
        if self._scheme != "none":
            return {"f1": entity_scores(gold, predicted)[0]["f1"]}
        pairs = [pair for own in zip(gold, predicted, strict=True) for pair in zip(*own, strict=True)]
        return {"accuracy": sum(one == other for one, other in pairs) / max(1, len(pairs))}


def _rows(words: np.ndarray) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield each row with its words' tags and predictions in order, from all windows and ranks."""
    ordered = words[np.lexsort((words[:, 1], words[:, 0]))]
    ends = np.flatnonzero(np.diff(ordered[:, 0])) + 1
    for part in np.split(ordered, ends) if len(ordered) else ():
        yield int(part[0, 0]), part[:, 2].tolist(), part[:, 3].tolist()
