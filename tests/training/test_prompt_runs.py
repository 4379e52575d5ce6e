"""Prompt tuning on every engine: peft's own steps, resumed to the bit, resharded, written with and exported."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.training.checkpoint.export import export
from launcher.training.engines import build
from launcher.training.model import attention
from launcher.training.predict_entry import predict
from tests.training import pairs
from tests.training.batches import batch_of_samples
from tests.training.plans import deepspeed, plan_of
from tests.training.prompt_checks import answers_are_those_of, goes_on
from tests.training.ranks import on_ranks
from tests.training.runs import (
    batch_of,
    curve,
    evaluations,
    finish,
    model_directory,
    new_run,
    plan_for,
    state,
    tokenizer,
    write_rows,
)
from tests.training.test_engine import Causal, _samples
from tests.training.test_predict import scratch
from tests.training.tiny import model_of
from tests.training.wholes import whole as gathered

pytestmark = pytest.mark.distributed
COUNT = 6
PROMPT = {"method": "prompt-tuning", "virtual_tokens": COUNT}
PLACE = "model.embed_tokens.prompt_embeddings"
VIRTUAL = -torch.arange(1, COUNT + 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    model_of("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def steps(plan: Plan, num_steps: int, learns_first: bool = True) -> dict[str, Any]:
    """A few steps of twelve samples behind virtual tokens, this rank's share of them. `learns_first`: the first
    word from the last virtual token."""
    kind = attention.register(plan.attention)
    config = AutoConfig.from_pretrained(plan.model.name, attn_implementation=kind)
    engine = build(plan, Causal, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    rank, size = torch.distributed.get_rank(), plan.batch.data_parallel_size
    numbers = []
    for step in range(num_steps):
        samples = _samples(step)
        mine = samples[rank * (len(samples) // size) : (rank + 1) * (len(samples) // size)]
        batch = batch_of_samples([torch.cat([VIRTUAL, sample]) for sample in mine])
        batch["targets"] = batch["targets"].where(batch["targets"] >= 0, -100)
        if not learns_first:
            batch["targets"][torch.tensor([0, *batch["lengths"]]).cumsum(0)[:-1] + COUNT - 1] = -100
        output = engine.micro_step(batch, 1 / sum(map(len, samples)), True)
        sums = torch.stack([output.loss_sum.detach().double() / sum(map(len, samples)),
                            engine.squared_gradient_norm().double()])  # fmt: skip
        torch.distributed.all_reduce(sums)
        numbers.append([float(sums[0]), float(sums[1].sqrt())])
        engine.optimizer_step(1e-2, 1.0)
    tensors = {name: gathered(value) for name, value in engine.state_dict().items()}
    return {"curve": numbers, "tensors": tensors}


def by_peft(directory: Path, start: torch.Tensor) -> dict[str, Any]:
    """Three steps of AdamW on peft's own model, from the same start; each sample alone."""
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), settings)
    [learned] = [one for one in model.parameters() if one.requires_grad]
    learned.data.copy_(start)
    optimizer = torch.optim.AdamW([learned], lr=1e-2, weight_decay=0.0)
    numbers = []
    for step in range(3):
        samples = _samples(step)
        # peft learns the first word too, from the last virtual token.
        alone = [model(input_ids=one[None], labels=one[None]).loss * len(one) for one in samples]
        loss = torch.stack(alone).sum() / sum(map(len, samples))
        loss.backward()
        assert learned.grad is not None
        numbers.append([float(loss.detach()), float(learned.grad.norm())])
        optimizer.step()
        optimizer.zero_grad()
    return {"curve": numbers, "last": learned.detach()}


@functools.cache
def start_of(directory: Path) -> torch.Tensor:
    plan = plan_of(directory, 1, batch=batch_of(1, 12), model__adapter=PROMPT)
    start: torch.Tensor = on_ranks(1, functools.partial(steps, num_steps=0), plan)[0]["tensors"][
        f"model.{PLACE}"
    ]
    return start


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, {}),
        pytest.param(2, deepspeed(3), marks=pytest.mark.slow),
        pytest.param(2, deepspeed(2), marks=pytest.mark.slow),
        pytest.param(2, {"activation_checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.very_slow),
        pytest.param(3, {}, marks=pytest.mark.very_slow),
        pytest.param(3, deepspeed(1), marks=pytest.mark.very_slow),
    ],
)
def test_the_steps_are_those_of_peft(world_size: int, engine: dict[str, Any], llama: Path) -> None:
    if "engine" in engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    plan = plan_of(
        llama, world_size, batch=batch_of(world_size, 12 // world_size), model__adapter=PROMPT, **engine
    )
    theirs = by_peft(llama, start_of(llama))
    ours, *_ = on_ranks(world_size, functools.partial(steps, num_steps=3), plan)
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=1e-5, atol=0)
    assert {name for name in ours["tensors"] if name.startswith("model.")} == {f"model.{PLACE}"}
    torch.testing.assert_close(ours["tensors"][f"model.{PLACE}"], theirs["last"], rtol=0, atol=3e-5)


def test_the_start_is_of_tokens_that_the_seed_draws_or_a_text_names(llama: Path) -> None:
    table = AutoModelForCausalLM.from_pretrained(llama).get_input_embeddings().weight.detach()
    drawn = start_of(llama)
    assert all(any(torch.equal(row, word) for word in table) for row in drawn)
    two = on_ranks(2, functools.partial(steps, num_steps=0),
                   plan_of(llama, 2, batch=batch_of(2, 6), model__adapter=PROMPT))  # fmt: skip
    assert torch.equal(two[0]["tensors"][f"model.{PLACE}"], drawn)
    named = PROMPT | {"init_text": "w5 w7"}
    [one] = on_ranks(1, functools.partial(steps, num_steps=0),
                     plan_of(llama, 1, batch=batch_of(1, 12), model__adapter=named))  # fmt: skip
    ids = tokenizer()("w5 w7")["input_ids"]
    assert torch.equal(one["tensors"][f"model.{PLACE}"], table[(ids * COUNT)[:COUNT]])


def questions(path: Path, num_rows: int, seed: int) -> dict[str, str]:
    """Rows of a question and its answer, whose words follow from each other."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        words = torch.randint(
            0, 60, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator
        )
        query, answer = (" ".join(f"w{number + shift}" for number in words.tolist()) for shift in (0, 60))
        rows.append({"question": query, "answer": answer})
    return write_rows(path, rows)


def plan_with(llama: Path, folder: Path, world_size: int, **changes: Any) -> Plan:
    """Four steps of packed questions and answers; answers are written to nine held-out questions."""
    folder.mkdir(exist_ok=True)
    data = {
        "train": questions(folder / "train.jsonl", 48, 0),
        "evaluation": questions(folder / "held-out.jsonl", 9, 1),
        "prompt": "question",
        "completion": "answer",
        "packing": True,
        "max_length": 40,
        "num_workers": 1,
    }
    values: dict[str, Any] = {
        "batch": batch_of(world_size, 6 // world_size),
        "evaluation": {"generate": {"max_new_tokens": 6}},
        "training": {"learning_rate": 0.1},
        "model__adapter": PROMPT,
        "layout": "packed",
    }
    return plan_for(llama, data, world_size, 4, **(values | changes))


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    run = new_run(folder / "whole", plan_with(llama, folder / "data", 2))
    finish(run, 2)
    return run


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks_and_engines(llama: Path, trained: Any) -> None:
    folder = trained.path.parent
    plan = functools.partial(plan_with, llama, folder / "data")
    goes_on(plan, trained)


def test_what_is_exported_peft_reads_and_writes_the_same_answers(llama: Path, trained: Any) -> None:
    folder = trained.path.parent
    export(trained, folder / "adapter", adapter=True)
    with pytest.raises(ConfigurationError, match="no part of the weights; `launcher export RUN"):
        export(trained, folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, state(trained)[f"model.{PLACE}"])
    answers_are_those_of(model, trained, plan_with(llama, folder / "data", 2))


@pytest.mark.slow
def test_the_penalty_for_repetition_is_that_of_peft(llama: Path, tmp_path: Path) -> None:
    """A model's own generation config may have one, and virtual tokens have no score."""
    directory = tmp_path / "model"
    model_of("llama").save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    transformers.GenerationConfig(repetition_penalty=1.8, eos_token_id=2).save_pretrained(directory)
    run = new_run(tmp_path / "run", plan_with(directory, tmp_path / "data", 1))
    finish(run, 1)
    export(run, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    words, output = tokenizer(), tmp_path / "answers.jsonl"
    asking = plan_with(directory, tmp_path / "data", 1)
    finish(scratch(tmp_path / "asking", asking, output, run=run.path), 1, entry=predict)
    rows = [json.loads(line) for line in (tmp_path / "data/held-out.jsonl").read_text().splitlines()]
    for row, line in zip(rows, output.read_text().splitlines(), strict=True):
        ids = torch.tensor([[1, *words(row["question"], add_special_tokens=False)["input_ids"]]])
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                 do_sample=False, pad_token_id=0, repetition_penalty=1.8)  # fmt: skip
        assert json.loads(line)["text"] == words.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_a_classifier_is_exported_with_its_new_head(tmp_path: Path) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    directory = model_directory(tmp_path / "bert", "bert", "AutoModel", **still)
    rows = [{"text": f"w{number} w{number + 1}", "label": "ab"[number % 2]} for number in range(40)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data: dict[str, Any] = {"train": source, "evaluation": source, "text": "text", "label": "label"}
    data |= {"max_length": 32, "num_workers": 1}
    task = {"task": "sequence-classification", "model__task": "sequence-classification"}
    plan = plan_for(directory, data, 2, 3, attention="sdpa", layout="padded", model__adapter=PROMPT, **task)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2)
    export(run, tmp_path / "adapter", adapter=True)
    kind = transformers.AutoModelForSequenceClassification
    base = kind.from_pretrained(directory, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    output = tmp_path / "answers.jsonl"
    finish(scratch(tmp_path / "asking", plan, output, run=run.path, top_k=2), 2, entry=predict)
    for row, line in zip(rows, output.read_text().splitlines(), strict=True):
        ids = torch.tensor([tokenizer()(row["text"])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        shares = {one["label"]: one["probability"] for one in json.loads(line)["labels"]}
        assert shares == pytest.approx(dict(zip("ab", logits.softmax(0).tolist(), strict=True)), abs=2e-6)


@pytest.mark.slow
def test_virtual_tokens_are_trained_further_from_their_directory(
    llama: Path, trained: Any, tmp_path: Path
) -> None:
    export(trained, tmp_path / "adapter", adapter=True)
    further = PROMPT | {"weights": str(tmp_path / "adapter")}
    data = trained.path.parent / "data"
    run = new_run(tmp_path / "run", plan_with(llama, data, 2, model__adapter=further))
    finish(run, 2)
    assert evaluations(run)[0]["loss"] == pytest.approx(evaluations(trained)[4]["loss"], rel=1e-6)
    wider = model_directory(tmp_path / "wider", hidden_size=96)
    other = new_run(tmp_path / "other", plan_with(wider, data, 1, model__adapter=further))
    with pytest.raises(AssertionError, match=r"prompt_embeddings are \[6, 48\], and \[6, 96\] are needed"):
        finish(other, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.very_slow)])
def test_an_encoder_decoder_learns_and_writes_as_peft_reads_it(family: str, tmp_path: Path) -> None:
    """On three ranks under ZeRO-3 as on two under FSDP."""
    still = {"t5": {"dropout_rate": 0.0}, "bart": {"dropout": 0.0}}[family]
    directory = pairs.model_directory(tmp_path / family, family, **still)
    train, held_out = (
        write_rows(tmp_path / f"{name}.jsonl", pairs.pairs(number, seed))
        for name, number, seed in (("train", 24, 0), ("held-out", 9, 1))
    )
    data = {"train": train, "evaluation": held_out, "source": "source", "target": "target"}
    data |= {"max_length": 32, "max_target_length": 32, "num_workers": 1}
    task = {"task": "sequence-to-sequence", "model__task": "sequence-to-sequence"}
    values: dict[str, Any] = task | {"attention": "sdpa", "layout": "padded", "model__adapter": PROMPT}
    values |= {"training": {"learning_rate": 0.1}, "evaluation": {"generate": {"max_new_tokens": 6}}}
    plan = plan_for(directory, data, 2, 4, batch=batch_of(2, 3), **values)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2)
    other = new_run(
        tmp_path / "other", plan_for(directory, data, 3, 4, batch=batch_of(3, 2), **values, **deepspeed())
    )
    finish(other, 3)
    assert evaluations(other)[4] == pytest.approx(evaluations(run)[4], rel=1e-4, abs=1e-6)
    export(run, tmp_path / "adapter", adapter=True)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    words = transformers.AutoTokenizer.from_pretrained(directory)
    output, total, count = tmp_path / "answers.jsonl", 0.0, 0
    finish(scratch(tmp_path / "asking", plan, output, run=run.path), 2, entry=predict)
    rows = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    for row, line in zip(rows, output.read_text().splitlines(), strict=True):
        ids, labels = (torch.tensor([words(row[name])["input_ids"]]) for name in ("source", "target"))
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            total += float(model(**read, labels=labels).loss) * labels.numel()
        count += labels.numel()
        written = model.generate(**read, max_new_tokens=6, do_sample=False)
        assert json.loads(line)["text"] == words.decode(written[0], skip_special_tokens=True)
    assert evaluations(run)[4]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.slow
def test_tags_are_those_of_peft_behind_its_virtual_tokens(tmp_path: Path) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    directory = model_directory(tmp_path / "bert", "bert", "AutoModel", **still)
    rows = [
        {
            "words": [f"w{place + number}" for place in range(1 + number % 7)],
            "tags": ["X", *"O" * (number % 7)],
        }
        for number in range(40)
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data: dict[str, Any] = {"train": source, "evaluation": source, "words": "words", "tags": "tags"}
    data |= {"scheme": "none", "max_length": 24, "num_workers": 1}
    task = {"task": "token-classification", "model__task": "token-classification"}
    plan = plan_for(directory, data, 2, 3, attention="sdpa", layout="padded", model__adapter=PROMPT, **task)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2)
    export(run, tmp_path / "adapter", adapter=True)
    base = transformers.AutoModelForTokenClassification.from_pretrained(directory, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([tokenizer()(" ".join(row["words"]))["input_ids"]])
        labels = torch.tensor([int(tag == "X") for tag in row["tags"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, COUNT:]
        total += float(torch.nn.functional.cross_entropy(logits[1:-1], labels, reduction="sum"))
        count += len(labels)
    assert evaluations(run)[3]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero-3"])
def test_half_precision_stays_near(engine: dict[str, Any], llama: Path, trained: Any, tmp_path: Path) -> None:
    """The vectors are fp32 with fp32 state, as other adapters' parameters."""
    data = trained.path.parent / "data"
    plan = plan_with(llama, data, 2, precision="bf16", activation_checkpointing="full", **engine)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2)
    for number, record in curve(trained).items():
        assert curve(run)[number]["loss"] == pytest.approx(record["loss"], rel=2e-2)
    assert state(run)[f"model.{PLACE}"].dtype == torch.float32
