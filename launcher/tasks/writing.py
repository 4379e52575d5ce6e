"""The common part of tasks whose model generates text: settings, and scores against references."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.generation import Generate, GenerationOptions, options_of
from launcher.tasks.groups import by_length, measured
from launcher.tasks.task import Better, Evaluator, Finding, Output, Sample, Task, finding
from launcher.tasks.text_scores import scores
from launcher.tasks.token_losses import TokenLosses

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


class WritingTask(Task):
    """A task whose model can generate an answer to a row, from `prompts`."""

    writes = True
    tokenizer: Any = None
    """The model's tokenizer, once prepared."""
    compared_by: Mapping[str, Better] = {}
    """The metrics that compare answers with references."""

    @property
    def generates(self) -> bool:
        return self.evaluation.generate is not None

    @property
    def settings(self) -> Generate:
        """Return the settings of generation: the job's, else the model's own generation config."""
        return self.evaluation.generate or Generate()

    @property
    def written_metrics(self) -> Mapping[str, Better]:
        """Return the further metrics of an evaluation with generation."""
        if self.evaluation.generate is None:
            return {}
        own = self.evaluation.scorer_name
        return {**self.compared_by, **({} if own is None else {own: "higher"})}

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        evaluation, settings = self.evaluation, self.evaluation.generate
        if settings is None:
            if evaluation.scorer is not None:
                reason = (
                    "scores what the model writes, and it writes nothing: write evaluation.generate: true"
                )
                yield finding("evaluation.scorer", evaluation.scorer, reason, "evaluation.generate")
            return
        if self.data.evaluation is None:
            reason = "there are no rows to write to: name data.evaluation, or leave it out"
            yield finding("evaluation.generate", None, reason, "data.evaluation")
        if settings.do_sample and (settings.num_beams or 1) > 1:
            reason = "beams look for the likeliest text, and do_sample draws: write 1, or do_sample: false"
            yield finding(
                "evaluation.generate.num_beams", settings.num_beams, reason, "evaluation.generate.do_sample"
            )
        drawing = {"temperature", "top_k", "top_p", "seed"} & settings.model_fields_set
        for key in sorted(drawing) if not settings.do_sample else ():
            reason = "only counts when tokens are drawn: write do_sample: true, or leave it out"
            yield finding(
                f"evaluation.generate.{key}", getattr(settings, key), reason, "evaluation.generate.do_sample"
            )
        if (name := evaluation.scorer_name) is not None and name in {
            **self.compared_by,
            **dict.fromkeys(LOSSES),
        }:
            reason = f"{name} is measured already; give the function another name"
            yield finding("evaluation.scorer", evaluation.scorer, reason)

    def evaluator(self) -> Evaluator:
        return TextEvaluator(self) if self.generates else TokenLosses()

    @property
    def generation(self) -> GenerationOptions:
        return options_of(self.settings, self.tokenizer, self.end_tokens)

    @property
    def end_tokens(self) -> Sequence[int]:
        """Return the ids at which an answer ends, in addition to those of the model's generation config."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def configure_generation(self, generation: Any) -> None:
        """Write every end of an answer, and the tokenizer's first and padding token, as transformers' Trainer
        aligns them (`align_special_tokens`)."""
        for name in ("bos_token_id", "pad_token_id"):
            if (token := getattr(self.tokenizer, name)) is not None:
                setattr(generation, name, token)
        own = generation.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        if not set(self.end_tokens) <= set(own):
            generation.eos_token_id = list(dict.fromkeys([*self.end_tokens, *own]))
        # Otherwise loading derives it again from the model's config, which has no such keys.
        generation._from_model_config = False

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of generated tokens, int [n], up to the first stop string and without special
        tokens."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        ends = [place for stop in self.settings.stop_strings if (place := text.find(stop)) >= 0]
        return (text[: min(ends)] if ends else text).strip()

    def at_limit(self, written: np.ndarray) -> list[bool]:
        """Return for each text, int [texts, n], whether it has the maximum number of tokens, so that its end
        may be missing."""
        arguments = self.generation.arguments
        padding, most = arguments["pad_token_id"], arguments["max_new_tokens"]
        if written.shape[1] < most:
            return [False] * len(written)
        ended = np.isin(written[:, :-1], [padding, *arguments.get("eos_token_id", ())]).any(axis=1)
        ended |= written[:, -1] == padding
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        stopped = [any(stop in text for stop in self.settings.stop_strings) for text in texts]
        return [not one for one in (ended | np.array(stopped, dtype=bool)).tolist()]

    def limit_details(self, num_at_limit: int) -> dict[str, Any]:
        """Return an evaluation's details about answers that reached their limit: their number, and the limit if
        there are any."""
        limit = {"max_new_tokens": self.generation.arguments["max_new_tokens"]} if num_at_limit else {}
        return {"num_at_limit": num_at_limit, **limit}

    def texts_of(self, output: Output) -> list[Any]:
        """Return the text generated for each sample, as `{"text": ...}`; in a prediction with `at_limit` if it
        reached its limit."""
        assert output.generated is not None
        written = output.generated.cpu().numpy()
        limits = self.at_limit(written) if self.for_prediction else [False] * len(written)
        return [
            {"text": self.decode(ids)} | ({"at_limit": True} if is_cut else {})
            for ids, is_cut in zip(written, limits, strict=True)
        ]

    def aside(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the evaluator's data for a batch's samples: their row ids, windows, weights and
        references."""
        return {
            "ids": [sample.id for sample in samples],
            "windows": [sample.window for sample in samples],
            "weights": [sample.weight for sample in samples],
            "references": [from_bytes(sample["references"]) for sample in samples],
        }


LOSSES: dict[str, Better] = {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}
"""The metrics of a reference's tokens."""


class TextEvaluator(TokenLosses):
    """The losses of the references' tokens, and the scores of generated texts against the references."""

    def __init__(self, task: WritingTask) -> None:
        super().__init__()
        self._task = task
        self._rows: list[tuple[int, int, str, list[str], bool]] = []
        self._texts: tuple[list[str], list[list[str]]] = [], []
        """The answer and the references of each row."""
        self._num_at_limit = 0

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        super().update(output, batch)
        if output.generated is None:
            return
        self._rows += answered(self._task, output, batch)

    def state(self) -> list[np.ndarray]:
        return [*super().state(), as_bytes(self._rows)]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        losses = super().compute(states)
        # Rows are sorted, whatever rank they come from, so that sums over them are rounded alike.
        rows = sorted((row for _, written in states for row in from_bytes(written)), key=lambda row: row[:2])
        answers, references = self._texts = [row[2] for row in rows], [row[3] for row in rows]
        self._num_at_limit = sum(row[4] for row in rows)
        return losses | scores(answers, references, self._task.evaluation, tuple(self._task.compared_by))

    def details(self) -> dict[str, Any]:
        """Return how many answers differ, and the scores by words of the first reference."""
        answers, references = self._texts
        if not answers:
            return {}
        names, plain = (
            tuple(self._task.compared_by),
            self._task.evaluation.model_copy(update={"scorer": None}),
        )

        def scored(places: Sequence[int]) -> dict[str, float]:
            own = [answers[place] for place in places], [references[place] for place in places]
            return scores(*own, plain, names)

        groups = by_length([len(texts[0].split()) if texts else 0 for texts in references])
        distinct = {"num_answers": len(answers), "num_distinct_answers": len(set(answers))}
        distinct |= self._task.limit_details(self._num_at_limit)
        return {**distinct, "groups": {"words of the reference": measured(groups, scored)}}


def answered(
    task: WritingTask, output: Output, batch: dict[str, Any]
) -> Iterator[tuple[int, int, str, list[str], bool]]:
    """Yield for each row of a batch its id, its window, the answer, the references, and whether the answer
    reached its limit."""
    assert output.generated is not None
    written, aside = output.generated.cpu().numpy(), batch["aside"]
    named = zip(aside["ids"], aside["windows"], aside["weights"], aside["references"], strict=True)
    for ids, is_cut, (id, window, weight, references) in zip(
        written, task.at_limit(written), named, strict=True
    ):
        if weight:
            yield id, window, task.decode(ids), references, is_cut


def as_bytes(value: Any) -> np.ndarray:
    """Return a JSON value as the bytes of its text, uint8 [n]."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def from_bytes(content: np.ndarray) -> Any:
    """Return the value that `as_bytes` turned into bytes."""
    return json.loads(content.tobytes())
