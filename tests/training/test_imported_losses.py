"""What is imported trains as its source does: ten losses of the source tool beside ten of launcher, from the
same configuration.

Both see the same rows in the same order: the source is given them in the order that launcher draws them in.
What launcher cannot say (a warm-up that begins at 0) is left out of the configurations, and one test shows
that it would be seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import processors
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from launcher.importing.job import import_files
from launcher.job.load import load
from launcher.planner.hardware.detect import Hardware
from launcher.planner.search import plan_job as decide
from launcher.training.data.order import Order
from launcher.training.model.adapters import first_values
from tests.training.runs import curve, finish, model_directory, new_run, texts, write_rows

NUM_STEPS = 10
NUM_ROWS = 30
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CLOSE = 1e-5
"""The largest relative difference of a loss: rounding in fp32, which ten steps of Adam let grow. Seen:
docs/guide-import.md."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with its tokenizer."""
    return model_directory(tmp_path_factory.mktemp("decoder"), **SMALL, num_key_value_heads=1, head_dim=16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, without dropout, for two classes, with its tokenizer."""
    # As many positions as a job's max_length has where nobody writes one.
    changes = SMALL | {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 2,
        "max_position_embeddings": 1024,
    }
    return model_directory(
        tmp_path_factory.mktemp("encoder"), "bert", "AutoModelForSequenceClassification", **changes
    )


def rows_for(kind: str) -> list[dict[str, Any]]:
    """Rows of one kind; a longer row for every third, so that batches differ in their tokens."""
    found = list(texts(2 * NUM_ROWS))
    if kind == "label":
        return [{"text": text, "label": number % 2} for number, text in enumerate(found[:NUM_ROWS])]
    if kind == "completion":
        prompts = [
            " ".join(text.split()[:3]) for text in found[:NUM_ROWS]
        ]  # short: a row of which nothing is learned is left out
        return [
            {"prompt": prompt, "completion": " " + text}
            for prompt, text in zip(prompts, found[NUM_ROWS:], strict=True)
        ]
    return [{"text": text} for text in found[:NUM_ROWS]]


def in_launchers_order(rows: list[dict[str, Any]], seed: int, batch: int) -> list[dict[str, Any]]:
    """The rows of all steps one after the other, as launcher draws them."""
    return [rows[index] for index in Order(seed, len(rows)).indices(0, NUM_STEPS * batch)]


def losses_of_launcher(
    folder: Path, content: dict[str, Any], model: Path, rows: list[dict[str, Any]]
) -> list[float]:
    """Fill in what an imported job leaves to be filled in, and train."""
    content["model"]["name"] = str(model)
    content["data"]["train"] = write_rows(folder / "rows.jsonl", rows)
    if "label" in rows[0]:
        content["model"]["task"], content["data"] = (
            "sequence-classification",
            content["data"] | {"text": "text", "label": "label"},
        )
    elif "prompt" in rows[0]:
        content["data"] = {key: value for key, value in content["data"].items() if key != "text"} | {
            "prompt": "prompt",
            "completion": "completion",
        }
    else:
        content["data"] |= {"text": "text"}
    content |= {"trackers": [], "cluster": {"gpus_per_node": 0, "ranks_per_node": 1}}
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(content), encoding="utf-8")
    plan = decide(load(job), hardware=Hardware(1, 8 << 30))
    run = new_run(folder / "run", plan)
    finish(run, 1)
    return [record["loss"] for record in curve(run).values()]


class InOrder(Trainer):
    """A Trainer that takes the rows as they come."""

    def _get_train_sampler(self, *arguments: Any, **keywords: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def encoded(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows as the Trainer takes them: a text begun and ended, learned as a whole; or with its label."""
    found = [dict(tokenizer(row["text"])) for row in rows]
    return [
        {**entry, "labels": row.get("label", entry["input_ids"])}
        for entry, row in zip(found, rows, strict=True)
    ]


def padded(entries: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch with padding on the right, of which nothing is learned."""
    longest = max(len(entry["input_ids"]) for entry in entries)

    def filled(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([list(entry[key]) + [filler] * (longest - len(entry[key])) for entry in entries])

    mask = torch.tensor(
        [[1] * len(entry["input_ids"]) + [0] * (longest - len(entry["input_ids"])) for entry in entries]
    )
    is_text = isinstance(entries[0]["labels"], list)
    labels = filled("labels", -100) if is_text else torch.tensor([entry["labels"] for entry in entries])
    return {"input_ids": filled("input_ids", 0), "attention_mask": mask, "labels": labels}


def arguments_of(folder: Path, **changes: Any) -> TrainingArguments:
    """TrainingArguments for ten steps on a CPU, with everything else left to the Trainer."""
    return TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        max_steps=NUM_STEPS,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )


def logged(trainer: Any) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def farthest(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two equally long curves."""
    assert len(ours) == len(theirs) == NUM_STEPS
    found = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    print(f"largest relative difference: {found:.1e}")
    return found


ARGUMENTS: dict[str, dict[str, Any]] = {
    "the Trainer's defaults": {"learning_rate": 5e-3},
    "every number of AdamW": {
        "learning_rate": 5e-3, "weight_decay": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.95,
        "adam_epsilon": 1e-4, "max_grad_norm": 0.2,
        "lr_scheduler_type": "cosine", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
    },
    "SGD without momentum": {"learning_rate": 0.1, "optim": "sgd", "weight_decay": 0.1,
    "lr_scheduler_type": "constant"},
    "a polynomial, and no clipping": {
        "learning_rate": 5e-3, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3},
        "max_grad_norm": 0.0,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_the_trainer_on_texts(name: str, decoder: Path, tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, **ARGUMENTS[name])
    assert compared_with_the_trainer(arguments, decoder, "text", tmp_path) < CLOSE


@pytest.mark.slow
def test_the_trainer_on_classes(encoder: Path, tmp_path: Path) -> None:
    arguments = arguments_of(
        tmp_path, **ARGUMENTS["every number of AdamW"] | {"gradient_accumulation_steps": 1}
    )
    assert compared_with_the_trainer(arguments, encoder, "label", tmp_path) < CLOSE


@pytest.mark.slow
def test_the_trainer_adds_up_the_means_of_a_classifiers_micro_batches(encoder: Path, tmp_path: Path) -> None:
    """Three micro-batches: three times the loss and gradient. The import says so, and that a third of
    clipping and epsilon is the same."""
    arguments = arguments_of(tmp_path, **ARGUMENTS["every number of AdamW"])
    third = {"clip_norm": arguments.max_grad_norm / 3, "epsilon": arguments.adam_epsilon / 3}
    assert compared_with_the_trainer(arguments, encoder, "label", tmp_path, third, scale=3.0) < CLOSE
    remarks = import_files([tmp_path / "arguments.json"]).remarks
    assert any(
        remark.kind == "cannot be said" and remark.said == "gradient_accumulation_steps" for remark in remarks
    )


def test_a_warm_up_is_a_step_ahead_and_would_be_seen(decoder: Path, tmp_path: Path) -> None:
    """The import says under `changes meaning` that its steps differ; the losses show that this comparison can
    fail."""
    arguments = arguments_of(tmp_path, learning_rate=5e-3, warmup_steps=4)
    assert compared_with_the_trainer(arguments, decoder, "text", tmp_path) > 1e-3
    remarks = import_files([tmp_path / "arguments.json"]).remarks
    assert any(remark.kind == "changes meaning" and remark.said == "warmup_steps" for remark in remarks)


def compared_with_the_trainer(
    arguments: TrainingArguments,
    model: Path,
    kind: str,
    folder: Path,
    changes: dict[str, Any] | None = None,
    scale: float = 1.0,
) -> float:
    """Train with the Trainer, and with launcher what is imported of its arguments; the largest relative
    difference of a loss.

    `changes` are keys of the job's training section; the Trainer's losses are `scale` times launcher's.
    """
    file = folder / "arguments.json"
    file.write_text(arguments.to_json_string(), encoding="utf-8")
    rows, tokenizer = rows_for(kind), AutoTokenizer.from_pretrained(model)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    auto_class = AutoModelForSequenceClassification if kind == "label" else AutoModelForCausalLM
    data = encoded(in_launchers_order(rows, arguments.seed, batch), tokenizer)
    theirs = logged(
        InOrder(auto_class.from_pretrained(model), arguments, data_collator=padded, train_dataset=data)
    )
    content = import_files([file]).content
    content["training"] |= changes or {}
    return farthest([scale * loss for loss in losses_of_launcher(folder, content, model, rows)], theirs)


@pytest.mark.slow
def test_a_loop_of_accelerates(decoder: Path, tmp_path: Path) -> None:
    """The loop of transformers' examples without a Trainer, with its command line and Accelerate's file
    beside it."""
    from accelerate import Accelerator

    configuration = tmp_path / "accelerate.yaml"
    configuration.write_text(
        "distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\nmixed_precision: 'no'\n", encoding="utf-8"
    )
    line = (
        f"accelerate launch --config_file {configuration} run.py --per_device_train_batch_size 3 "
        "--gradient_accumulation_steps 2 "
    )
    line += (
        "--learning_rate 5e-3 --weight_decay 0.1 --max_train_steps 10 --lr_scheduler_type linear "
        "--num_warmup_steps 0 --max_grad_norm 1.0"
    )
    rows, tokenizer = rows_for("text"), AutoTokenizer.from_pretrained(decoder)
    ours = losses_of_launcher(tmp_path, import_files([], line.split()).content, decoder, rows)

    accelerator = Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(decoder)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=5e-3
    )
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS)
    data = encoded(in_launchers_order(rows, 42, 6), tokenizer)
    loader: Any = DataLoader(data, batch_size=3, collate_fn=padded)  # type: ignore[arg-type]
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    theirs: list[float] = []
    batches = list(loader)
    for step in range(NUM_STEPS):
        halves = batches[2 * step : 2 * step + 2]
        learned = sum(int((half["labels"][:, 1:] != -100).sum()) for half in halves)
        losses = [model(**half, num_items_in_batch=learned).loss for half in halves]
        for loss in losses:
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        theirs.append(sum(loss.item() for loss in losses))
    assert farthest(ours, theirs) < CLOSE


SFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "texts": ("text", {"learning_rate": 5e-3}, {}),
    "prompts and completions": (
        "completion",
        {"learning_rate": 5e-3, "max_length": 24, "weight_decay": 0.1},
        {},
    ),
    "an adapter": (
        "completion",
        {"learning_rate": 2e-2},
        {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": "all-linear"},
    ),
    "an adapter scaled by the root": (
        "text",
        {"learning_rate": 2e-2},
        {
            "use_peft": True,
            "lora_dropout": 0.0,
            "lora_r": 4,
            "lora_alpha": 6,
            "lora_target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
        },
    ),
}


@pytest.mark.parametrize("name", list(SFT))
def test_trl(name: str, decoder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip(
        "trl", reason="TRL is not installed; with TRL 1.16 these are within rounding (docs/guide-import.md)"
    )
    import datasets

    kind, changes, of_model = SFT[name]
    arguments = trl.SFTConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=NUM_STEPS, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, **changes,
    )  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(json.loads(arguments.to_json_string()) | of_model), encoding="utf-8")
    rows, model, tokens = (
        rows_for(kind),
        AutoModelForCausalLM.from_pretrained(decoder),
        AutoTokenizer.from_pretrained(decoder),
    )
    # As a language model's tokenizer does, it begins a text and does not end it: TRL writes the end itself,
    # and it would be there twice.
    tokens.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    configuration = trl.ModelConfig(str(decoder), **of_model)
    data = datasets.Dataset.from_list(in_launchers_order(rows, arguments.seed, 4))

    class Sequential(trl.SFTTrainer):  # type: ignore[misc,name-defined]
        _get_train_sampler = InOrder._get_train_sampler

    adapter = trl.get_peft_config(configuration)
    trainer = Sequential(model, arguments, train_dataset=data, processing_class=tokens, peft_config=adapter)
    if of_model:
        begin_as_launcher(trainer.model, arguments.seed)
    theirs = logged(trainer)
    assert farthest(losses_of_launcher(tmp_path, import_files([file]).content, decoder, rows), theirs) < CLOSE


def begin_as_launcher(model: Any, seed: int) -> None:
    """Give peft's matrices the first values that launcher makes up from the seed and their names: another
    draw of the same kind."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            plain = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.data.copy_(first_values(plain, parameter.shape, seed))
