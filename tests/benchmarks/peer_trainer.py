"""The peer: transformers' Trainer on the model, rows, steps, batch and schedule of a job. Run by bench_trainer_tasks.py
under torchrun.

Rows are read and encoded here by transformers' and the tokenizer's own means, as its examples do, and nothing of
launcher is used but the words that SQuAD's script compares. What is not named below is the Trainer's default. Prints one
JSON line: the metric on the held-out rows, and the seconds from the end of the first step to that of the last.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed
import transformers
from transformers import AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from launcher.tasks import squad

Rows = list[dict[str, Any]]


class Kind(NamedTuple):
    """What differs from task to task: the encoded rows, the model, the collator, and the metric of predictions."""

    train: Rows
    evaluation: Rows
    model: Any
    collator: Any
    score: Callable[[Any], float]


def main() -> None:
    """Train as the request says, and print the result."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    transformers.set_seed(request["seed"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    kind = KINDS[request["task"]](request, tokenizer)
    clock = Clock()
    arguments = Seq2SeqTrainingArguments(
        output_dir=request["output"],
        max_steps=request["steps"],
        per_device_train_batch_size=request["batch"] // request["ranks"],
        per_device_eval_batch_size=32,
        learning_rate=request["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=request["warmup"],
        weight_decay=request["weight_decay"],
        bf16=request["precision"] == "bf16",
        seed=request["seed"],
        use_cpu=True,
        ddp_backend="gloo",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        predict_with_generate=request["task"] == "translation",
        generation_max_length=64,
    )
    trainer = (Seq2SeqTrainer if request["task"] == "translation" else Trainer)(
        model=kind.model,
        args=arguments,
        train_dataset=kind.train,
        data_collator=kind.collator,
        callbacks=[clock],
    )
    trainer.train()
    predictions = trainer.predict(kind.evaluation).predictions
    if trainer.args.process_index == 0:
        result = {"metric": kind.score(predictions), "seconds": clock.last - clock.first}
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.barrier()


class Clock(TrainerCallback):
    """Notes when the first step and the last one ended."""

    first = last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last


def classes(request: dict[str, Any], tokenizer: Any) -> Kind:
    """Pairs of sentences in classes: accuracy."""
    tables = [_table(request[key]) for key in ("train", "evaluation")]
    names = sorted({row["entailment"] for row in tables[0]})
    train, evaluation = (
        [
            tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=64)
            | {"labels": names.index(row["entailment"])}
            for row in table
        ]
        for table in tables
    )
    right = np.array([row["labels"] for row in evaluation])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        request["model"], num_labels=len(names)
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    return Kind(train, evaluation, model, collator, lambda logits: float((logits.argmax(-1) == right).mean()))


def tags(request: dict[str, Any], tokenizer: Any) -> Kind:
    """Words with tags, each at its first piece: the entities' F1."""
    from seqeval.metrics import f1_score

    texts = [list(_sentences(request[key])) for key in ("train", "evaluation")]
    names = sorted({tag for _, own in texts[0] for tag in own})

    def encoded(words: list[str], own: list[str]) -> dict[str, Any]:
        row = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128)
        numbers = row.word_ids()
        before = [None, *numbers[:-1]]
        labels = [
            -100 if number is None or number == last else names.index(own[number])
            for number, last in zip(numbers, before, strict=True)
        ]
        return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels}

    train, evaluation = ([encoded(*text) for text in own] for own in texts)

    def score(logits: np.ndarray) -> float:
        said, right = [], []
        for row, (_, own) in zip(zip(evaluation, logits, strict=True), texts[1], strict=True):
            places = [place for place, label in enumerate(row[0]["labels"]) if label != -100]
            found = [names[number] for number in row[1][places].argmax(-1)]
            said.append(found + ["O"] * (len(own) - len(found)))
            right.append(own)
        return float(f1_score(right, said))

    model = transformers.AutoModelForTokenClassification.from_pretrained(
        request["model"], num_labels=len(names)
    )
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    return Kind(train, evaluation, model, collator, score)


def answers(request: dict[str, Any], tokenizer: Any) -> Kind:
    """Spans of a text, found in windows: F1."""
    asked = [list(_questions(request[key])) for key in ("train", "evaluation")]
    length, stride = request["max_length"], request["doc_stride"]

    def windows(questions: Rows) -> Iterator[tuple[dict[str, Any], list[tuple[int, int] | None]]]:
        for question in questions:
            whole = tokenizer(
                question["question"],
                question["context"],
                truncation="only_second",
                max_length=length,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for number, spans in enumerate(whole["offset_mapping"]):
                inside = [
                    span if part == 1 else None
                    for span, part in zip(spans, whole.sequence_ids(number), strict=True)
                ]
                begin, end = question["start"], question["start"] + len(question["answers"][0])
                starts = [place for place, span in enumerate(inside) if span and span[0] <= begin < span[1]]
                ends = [place for place, span in enumerate(inside) if span and span[0] < end <= span[1]]
                both = bool(starts and ends)
                row = {
                    name: whole[name][number] for name in ("input_ids", "attention_mask", "token_type_ids")
                }
                row |= {"start_positions": starts[0] if both else 0, "end_positions": ends[0] if both else 0}
                yield row | {"_question": question["number"]}, inside

    train = [_without(row) for row, _ in windows(asked[0])]
    found = list(windows(asked[1]))

    def score(logits: tuple[np.ndarray, np.ndarray]) -> float:
        best: dict[int, tuple[float, str]] = {}
        for (row, inside), starts, ends in zip(found, *logits, strict=True):
            context = asked[1][row["_question"]]["context"]
            for value, begin, end in _spans(inside, starts, ends):
                if value > best.get(row["_question"], (-np.inf,))[0]:
                    best[row["_question"]] = value, context[begin:end]
        return float(
            np.mean([squad.f1(best.get(one["number"], (0.0, ""))[1], one["answers"]) for one in asked[1]])
        )

    model = transformers.AutoModelForQuestionAnswering.from_pretrained(request["model"])
    evaluation = [_without(row) for row, _ in found]
    return Kind(train, evaluation, model, transformers.DataCollatorWithPadding(tokenizer), score)


def translation(request: dict[str, Any], tokenizer: Any) -> Kind:
    """Sentences to sentences, written greedily: BLEU."""
    import sacrebleu

    tables = [_table(request[key]) for key in ("train", "evaluation")]
    train, evaluation = (
        [
            {
                **tokenizer(row["de"], truncation=True, max_length=96),
                "labels": tokenizer(row["en"], truncation=True, max_length=64)["input_ids"],
            }
            for row in table
        ]
        for table in tables
    )
    for row in [*train, *evaluation]:
        row.pop("token_type_ids", None)

    def score(ids: np.ndarray) -> float:
        texts = tokenizer.batch_decode(
            np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True
        )
        return float(sacrebleu.corpus_bleu(texts, [[row["en"] for row in tables[1]]]).score)

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(request["model"])
    return Kind(train, evaluation, model, transformers.DataCollatorForSeq2Seq(tokenizer, model), score)


KINDS = {"classes": classes, "tags": tags, "answers": answers, "translation": translation}


def _table(path: str) -> Rows:
    with open(path, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _sentences(path: str) -> Iterator[tuple[list[str], list[str]]]:
    for block in Path(path).read_text(encoding="utf-8").split("\n\n"):
        pairs = [line.split("\t") for line in block.split("\n") if line.strip()]
        if pairs:
            yield [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _questions(path: str) -> Iterator[dict[str, Any]]:
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    all_asked = (
        (paragraph["context"], one)
        for article in articles
        for paragraph in article["paragraphs"]
        for one in paragraph["qas"]
    )
    for number, (context, one) in enumerate(all_asked):
        texts = [answer["text"] for answer in one["answers"]]
        start = one["answers"][0]["answer_start"]
        yield {
            "number": number, "question": one["question"], "context": context, "answers": texts, "start": start,
        }  # fmt: skip


def _spans(
    inside: list[tuple[int, int] | None], starts: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[float, int, int]]:
    """The spans between the 20 best starts and the 20 best ends, with their scores."""
    for start in np.argsort(-starts)[:20]:
        for end in np.argsort(-ends)[:20]:
            if start <= end < start + 30 and end < len(inside):
                first, last = inside[start], inside[end]
                if first and last:
                    yield float(starts[start] + ends[end]), first[0], last[1]


def _without(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("_")}


if __name__ == "__main__":
    main()
