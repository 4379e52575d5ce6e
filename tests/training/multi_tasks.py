"""Several tasks at once for tests: rows, plans, and the same in plain transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from launcher.planner.plan import Plan
from launcher.training.data.order import MixedOrder
from launcher.training.model.loading import initialise
from launcher.training.model.with_heads import AutoModelWithHeads, head_class, head_config, head_of
from tests.training.runs import batch_of, plan_for, tokenizer, write_rows

SIZES = {"score": 30, "kind": 24, "words": 20}
WEIGHTS = {"score": 0.5, "kind": 2.0, "words": 1.0}
KINDS = ("k0", "k1", "k2")
TAGS = ("high", "low")


def rows(task: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of texts whose number, class and tags follow from their words."""
    generator = random.Random(f"{task} {seed}")
    results = []
    for _ in range(number):
        kind = generator.randrange(3)
        numbers = [generator.randrange(kind * 40, kind * 40 + 40) for _ in range(generator.randrange(3, 14))]
        words = [f"w{one}" for one in numbers]
        results.append(
            {
                "score": {"text": " ".join(words), "value": 1.0 + kind + numbers[0] / 100},
                "kind": {"first": " ".join(words[:2]), "second": " ".join(words[2:]), "label": f"k{kind}"},
                "words": {"words": words, "tags": ["low" if one < 60 else "high" for one in numbers]},
            }[task]
        )
    return results


def data_of(folder: Path) -> dict[str, Any]:
    """Return the section `data` of a job with a number, a class of a pair, and tags."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    for number, (task, size) in enumerate(SIZES.items()):
        train.append({"task": task} | write_rows(folder / f"{task}.jsonl", rows(task, size)))
        held_out.append({"task": task} | write_rows(folder / f"held-{task}.jsonl", rows(task, 7 + number, 1)))
    sections = {
        "score": {"text": "text", "label": "value", "problem": "regression"},
        "kind": {"text": ["first", "second"], "label": "label"},
        "words": {"task": "token-classification", "words": "words", "tags": "tags", "scheme": "none"},
    }
    tasks = {
        name: {"task": "sequence-classification", "loss_weight": WEIGHTS[name]} | own
        for name, own in sections.items()
    }
    return {"train": train, "evaluation": held_out, "tasks": tasks, "max_length": 32, "num_workers": 1}


def plan_of(encoder: Path, data: dict[str, Any], world_size: int, num_steps: int, **changes: Any) -> Plan:
    """Return a plan of steps over twelve samples, without clipping."""
    values: dict[str, Any] = {
        "model__task": "multi-task",
        "task": "multi-task",
        "attention": "sdpa",
        "layout": "padded",
        "batch": batch_of(world_size, 12 // world_size),
        "training": {"learning_rate": 1e-3, "clip_norm": 0.0},
    }
    return plan_for(encoder, data, world_size, num_steps, **(values | changes))


class Plain:
    """Transformers' own classes over one body, with the weights that a run begins with."""

    def __init__(self, encoder: Path, run: Path) -> None:
        """run: a run directory, whose model says which heads there are."""
        config = AutoConfig.from_pretrained(run / "model", attn_implementation="eager")
        begun = AutoModelWithHeads.from_config(config, attn_implementation="eager").float()
        new = tuple(name for name, _ in begun.named_parameters() if name.startswith("head_"))
        initialise(begun, new, 17)
        body = AutoModel.from_pretrained(encoder, attn_implementation="eager")
        self.models: dict[str, PreTrainedModel] = {}
        for task in SIZES:
            own = head_class(config, task)(head_config(config, task))
            own.load_state_dict(head_of(begun, task).state_dict(), strict=False)
            if task == "score":
                nn.init.constant_(own.classifier.bias, head_config(config, task).head_bias[0])
            setattr(own, own.base_model_prefix, body)
            self.models[task] = own.train()

    def parameters(self) -> list[nn.Parameter]:
        """Return those of all, each once."""
        return list({id(one): one for own in self.models.values() for one in own.parameters()}.values())

    def loss(self, task: str, row: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """Return the summed loss of a row, and over how many positions."""
        return loss_of(task, self.models[task], row)

    def step_loss(self, batch: list[tuple[str, dict[str, Any]]]) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the sum over the tasks of weight x mean, and each task's mean."""
        every = [(task, *self.loss(task, row)) for task, row in batch]
        means = {
            task: sum(loss for own, loss, _ in every if own == task)
            / sum(count for own, _, count in every if own == task)
            for task in {task for task, _ in batch}
        }
        total = sum(WEIGHTS[task] * mean for task, mean in means.items())
        return total, {task: float(mean.detach()) for task, mean in means.items()}  # type: ignore[return-value]


def loss_of(task: str, model: PreTrainedModel, row: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Return the summed loss of a row by a model's own class, and over how many positions."""
    if task == "words":
        ids = tokenizer()(" ".join(row["words"]))["input_ids"]
        labels = [-100, *(model.config.label2id[tag] for tag in row["tags"]), -100]
        given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        return model(**given).loss * len(row["tags"]), len(row["tags"])
    texts = (row["text"],) if task == "score" else (row["first"], row["second"])
    label: Any = row["value"] if task == "score" else KINDS.index(row["label"])
    return model(**tokenizer()(*texts, return_tensors="pt"), labels=torch.tensor([label])).loss, 1


def batches(num_steps: int, size: int = 12) -> list[list[tuple[str, dict[str, Any]]]]:
    """Return the rows of each step, in the order of a run with the seed 17."""
    every = [(task, row) for task, number in SIZES.items() for row in rows(task, number)]
    sizes = list(SIZES.values())
    places = MixedOrder(17, sizes, sizes).indices(0, size * num_steps).reshape(num_steps, size)
    return [[every[place] for place in step] for step in places.tolist()]


def loaded(export: Path, task: str) -> PreTrainedModel:
    """Return a head of an export as transformers loads it."""
    auto_class = (
        "AutoModelForTokenClassification" if task == "words" else "AutoModelForSequenceClassification"
    )
    model: PreTrainedModel = getattr(transformers, auto_class).from_pretrained(export / task)
    return model.eval()


def held_out(data: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Return the held-out rows of a task."""
    [source] = [one for one in data["evaluation"] if one["task"] == task]
    return [json.loads(line) for line in Path(source["path"]).read_text().splitlines()]
