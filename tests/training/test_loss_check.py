"""The check after loading passes what is right, goes over to a way that is where one is, and stops what is
not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from launcher import tasks
from launcher.data.section import Source
from launcher.errors import ConfigurationError, DataError
from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from launcher.tasks.sequence_classification import SequenceClassification
from launcher.tasks.task import Sample
from launcher.training import engines
from launcher.training.data.prepare import prepare
from launcher.training.loss import LogitTransform
from launcher.training.model import attention, loss_check, pretrained
from launcher.training.model.few_layers import shortened
from launcher.training.model.loading import repeated_layers
from tests.families import tiny
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import (
    batch_of,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    texts,
    tokenizer,
    write_rows,
    write_texts,
)

pytestmark = pytest.mark.distributed
Fault = Callable[[], contextlib.AbstractContextManager[Any]]


def checked(plan: Plan, fault: Fault = contextlib.nullcontext) -> dict[str, Any]:
    """Load the plan's model under its engine, put the fault in, and check; what was said and which way was
    taken."""
    config, tokenizer = pretrained.read_config(plan), pretrained.read_tokenizer(plan)
    task = tasks.build(plan, tokenizer)
    dataset = prepare(plan.data.train, "train", plan, task, tokenizer)
    task.configure(config)
    engine = engines.build(plan, task, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    said: list[tuple[str, dict[str, Any]]] = []
    own, num_passed, has_few_rows = loss_check._own, [], []

    def counted(engine: Any, *arguments: Any) -> Any:
        num_passed.append(len(repeated_layers(engine.model)))
        embeddings = engine.model.get_input_embeddings().weight
        num_written = int(embeddings.any(dim=1).sum())
        has_few_rows.append(0 < num_written < len(embeddings) // 2)
        return own(engine, *arguments)

    with fault(), mock.patch.object(loss_check, "_own", counted):
        try:
            loss_check.check_loss(
                engine, task, dataset, plan, lambda name, **fields: said.append((name, fields))
            )
        except (ConfigurationError, DataError) as error:
            return {"error": str(error)}
    whole = [
        unit._get_fsdp_state()._fsdp_param_group.is_unsharded
        for unit in engine.model.modules()
        if isinstance(unit, FSDPModule)
    ]
    output = engine.evaluate(task.collate([dataset.item(0)]))
    return {
        "whole": whole,
        "said": said,
        "way": (task.layout, engine.model.config._attn_implementation, task.head),
        "num_layers": len(repeated_layers(engine.model)),
        "num_passed": num_passed,
        "has_few_rows": has_few_rows,
        "num_roots": sum(
            unit._get_fsdp_state()._is_root is not False
            for unit in engine.model.modules()
            if isinstance(unit, FSDPModule)
        ),
        "loss": float(output.loss_sum),
    }


@contextlib.contextmanager
def leak() -> Iterator[None]:
    """Samples of a row see those before them."""
    right = attention.packed_attention

    def wrong(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **(options | {"cu_seq_lens_q": options["cu_seq_lens_q"][[0, -1]]}))

    with mock.patch.object(attention, "packed_attention", wrong):
        attention.register("packed")
        yield
    attention.register("packed")


@contextlib.contextmanager
def wrong_mask() -> Iterator[None]:
    """Tokens see those after them."""
    right = attention.packed

    def wrong(*arguments: Any) -> Any:
        *others, _, window = arguments
        return right(*others, False, window)

    with mock.patch.object(attention, "packed", wrong):
        yield


def lost_multiplier() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(LogitTransform, "of", classmethod(lambda cls, config: LogitTransform()))


@contextlib.contextmanager
def shifted_label() -> Iterator[None]:
    """Every token is to predict itself."""
    right = CausalLM.collate

    def wrong(self: CausalLM, items: Any) -> dict[str, Any]:
        batch = right(self, items)
        return batch | {"targets": batch["input_ids"].flatten().clone()}

    with mock.patch.object(CausalLM, "collate", wrong):
        yield


@contextlib.contextmanager
def wrong_padding() -> Iterator[None]:
    """A classifier's rows are padded with what its config does not know as padding."""
    right = SequenceClassification.collate

    def wrong(self: SequenceClassification, items: Any) -> dict[str, Any]:
        self._pad = 77
        return right(self, items)

    with mock.patch.object(SequenceClassification, "collate", wrong):
        yield


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {"train": write_texts(tmp_path / "train.jsonl", 20), "text": "text", "max_length": 64}


def plan_with(model: Path, data: dict[str, Any], world_size: int = 1, **changes: Any) -> Plan:
    return plan_of(model, world_size, data=data, batch=batch_of(world_size, 2), **changes)


def one_rank(plan: Plan, fault: Fault = contextlib.nullcontext) -> dict[str, Any]:
    [result] = on_ranks(1, checked, plan, fault)
    return dict(result)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_right_way_stays(tmp_path: Path, data: dict[str, Any], precision: str) -> None:
    result = one_rank(plan_with(model_directory(tmp_path / "model"), data, precision=precision))
    [(name, numbers)] = result["said"]
    assert name == "checked"
    assert result["way"] == ("packed", attention.PACKED, "chunked")
    assert float(numbers["ours"]) == pytest.approx(float(numbers["own"]), rel=loss_check.TOLERANCE[precision])


@pytest.mark.parametrize(
    ("family", "fault", "way"),
    [
        ("llama", leak, ("padded", "sdpa", "chunked")),
        ("llama", wrong_mask, ("padded", "sdpa", "chunked")),
        ("granite", lost_multiplier, ("padded", "sdpa", "model")),
    ],
)
def test_a_fault_with_a_way_around_it(
    tmp_path: Path, data: dict[str, Any], family: str, fault: Fault, way: tuple[str, ...]
) -> None:
    result = one_rank(plan_with(model_directory(tmp_path / "model", family), data), fault)
    [(name, fields)] = result["said"]
    assert name == "layout"
    assert fields["planned"] == "packed packed chunked"
    assert fields["taken"] == " ".join(way)
    assert fields["ours"] != fields["own"]
    assert result["way"] == way


def test_a_class_that_keeps_to_itself_where_samples_begin(tmp_path: Path, data: dict[str, Any]) -> None:
    result = one_rank(plan_with(model_directory(tmp_path / "model", "stablelm"), data))
    [(name, fields)] = result["said"]
    assert (name, fields["ours"], fields["taken"]) == ("layout", "none", "padded sdpa chunked")


def test_a_leak_in_half_precision(tmp_path: Path, data: dict[str, Any]) -> None:
    result = one_rank(plan_with(model_directory(tmp_path / "model"), data, precision="bf16"), leak)
    assert result["said"][0][0] == "layout"


def test_labels_that_are_shifted_stop_the_run_with_both_numbers(tmp_path: Path, data: dict[str, Any]) -> None:
    error = one_rank(plan_with(model_directory(tmp_path / "model"), data), shifted_label)["error"]
    assert "model.name" in error
    assert "in one pass" in error
    ours, own = re.findall(r"\d+\.\d{4}", error)
    assert ours != own


def test_targets_that_are_not_the_next_tokens() -> None:
    ids = np.array([3, 4, 5, 6], dtype=np.int32)
    dataset = mock.Mock(num_items=1, item=lambda index: [Sample({"input_ids": ids, "targets": ids}, 0, 4)])
    with pytest.raises(DataError, match="next tokens"):
        loss_check._rows(CausalLM(CausalColumns(train=Source(path="a"), text="text")), dataset, [])


def test_a_classifier_padded_with_another_token_than_its_configs(tmp_path: Path) -> None:
    rows = [{"text": text, "label": text[:2]} for text in texts(20)]
    data = {
        "train": write_rows(tmp_path / "rows.jsonl", rows),
        "text": "text",
        "label": "label",
        "max_length": 64,
    }
    model = model_directory(
        tmp_path / "model",
        "gpt2",
        "AutoModelForSequenceClassification",
        num_labels=len({row["label"] for row in rows}),
    )
    plan = plan_with(
        model,
        data,
        task="sequence-classification",
        model__task="sequence-classification",
        attention="sdpa",
        layout="padded",
    )
    assert one_rank(plan)["said"][0][0] == "checked"
    error = one_rank(plan, wrong_padding)["error"]
    assert "in one pass" in error


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3), deepspeed(2)])
def test_sharded(tmp_path: Path, data: dict[str, Any], engine: dict[str, Any]) -> None:
    """Five layers, of which the check passes two: all five are there again for what comes after it."""
    plan = plan_with(model_directory(tmp_path / "model", num_hidden_layers=5), data, 2, **engine)
    one = one_rank(plan_with(tmp_path / "model", data))
    for result in on_ranks(2, checked, plan):
        assert result["said"][0][0] == "checked"
        assert (result["num_layers"], result["num_passed"]) == (5, [2])
        # FSDP's units are one family, with the layers that the check left out.
        assert result["num_roots"] == (0 if engine else 1)
        assert not any(result["whole"])
        # Where the embeddings are cut, they are not gathered: the passes have the rows of two samples' tokens.
        assert result["has_few_rows"] == ([engine != deepspeed(2)])
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for result in on_ranks(2, checked, plan, leak):
        assert result["said"][0][1]["taken"] == "padded sdpa chunked"


@pytest.mark.slow
def test_training_goes_on_with_all_layers(tmp_path: Path, data: dict[str, Any]) -> None:
    """DeepSpeed has noted by then in which order two layers were passed, and meets five."""
    model = model_directory(tmp_path / "model", num_hidden_layers=5)
    curves = []
    for name, changes in (("fsdp", {}), ("zero3", deepspeed(3))):
        run = new_run(
            tmp_path / name,
            plan_for(model, data | {"packing": True, "evaluation": data["train"]}, 2, 4, **changes),
        )
        finish(run, 2)
        curves.append([(record["loss"], record["grad_norm"]) for record in curve(run).values()])
    assert len(curves[0]) == 4
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "kept"),
    [
        ("llama", {"num_hidden_layers": 6}, 2),
        (
            "gemma3_text",
            {
                "num_hidden_layers": 14,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2
                + ["sliding_attention"] * 2,
            },
            6,
        ),
        (
            "qwen2_moe",
            {"num_hidden_layers": 9, "mlp_only_layers": [0, 1, 2], "layer_types": ["full_attention"] * 9},
            4,
        ),
    ],
)
def test_the_check_passes_the_first_layers_of_every_kind(
    kind: str, changes: dict[str, Any], kept: int
) -> None:
    config = tiny.config_of(kind, tiny.CAUSAL_LM, 0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    model = tiny.model_of(kind, tiny.CAUSAL_LM, config=config).eval()
    ids = torch.arange(3, 12)[None]
    before = model(ids).logits
    with shortened(model):
        assert len(repeated_layers(model)) == kept
        assert not torch.equal(model(ids).logits, before)
    assert len(repeated_layers(model)) == changes["num_hidden_layers"]
    assert torch.equal(model(ids).logits, before)


def classifier_plan(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    problem: str,
    world_size: int = 1,
    text: Any = "text",
    **changes: Any,
) -> Plan:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": source, "text": text, "label": "label", "problem": problem, "max_length": 64}
    how = {
        "task": "sequence-classification",
        "model__task": "sequence-classification",
        "attention": "sdpa",
        "layout": "padded",
    }
    return plan_with(tmp_path / "model", data, world_size, **how, **changes)


def test_as_many_labels_as_tokens(tmp_path: Path) -> None:
    """Rows are cut short, and their labels are not."""
    model_directory(tmp_path / "model", "bert", "AutoModelForSequenceClassification", num_labels=14)
    rows = [{"text": " ".join(["w1"] * 12), "label": [f"c{number % 14}"]} for number in range(28)]
    assert one_rank(classifier_plan(tmp_path, rows, "multi-label"))["said"][0][0] == "checked"


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "engine"), [(1, {}), (2, deepspeed(3))], ids=["one rank", "ZeRO-3"])
def test_an_output_that_is_near_zero_by_chance(
    tmp_path: Path, world_size: int, engine: dict[str, Any]
) -> None:
    """Rounding of its terms is no small part of it, and no reason for another way."""
    sizes = {"num_labels": 1, "initializer_range": 0.02, "seed": 7}
    model_directory(tmp_path / "model", "bert", "AutoModelForSequenceClassification", **sizes)
    rows = [{"text": text, "label": number / 7} for number, text in enumerate(texts(20))]
    plan = classifier_plan(tmp_path, rows, "regression", world_size, precision="bf16", **engine)
    for result in on_ranks(world_size, checked, plan):
        [(name, numbers)] = result["said"]
        assert name == "checked"
        assert abs(float(numbers["own"].split()[0])) < 1e-3


def test_weights_that_are_no_numbers(tmp_path: Path, data: dict[str, Any]) -> None:
    directory = model_directory(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    model.save_pretrained(directory)
    assert (
        "its own class makes nan of a row of the data in fp32: weights are not finite"
        in one_rank(plan_with(directory, data))["error"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_pairs_whose_ends_are_where_the_model_looks(tmp_path: Path, kind: str) -> None:
    """Cut short, both rows have as many ends as before; a row without any is refused in the class's own
    words."""
    config = tiny.config_of(kind, tiny.SEQUENCE_CLASSIFICATION, 0.0)
    config.pad_token_id, config.bos_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, 2, 0
    tiny.model_of(kind, tiny.SEQUENCE_CLASSIFICATION, config=config).save_pretrained(tmp_path / "model")
    words = tokenizer()
    rows = [{"a": " ".join(["w1"] * length), "b": "w2 w3 w4", "label": str(length)} for length in (3, 20, 5)]
    for pair, said in (
        ("<s> $A </s> </s> $B </s>", "checked"),
        ("<s> $A $B", "refuses a row of the data: Each example must contain"),
    ):
        special = [("<s>", 1), ("</s>", 2)]
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair=pair, special_tokens=special
        )
        words.save_pretrained(tmp_path / "model")
        assert said in str(one_rank(classifier_plan(tmp_path, rows, "single-label", text=["a", "b"])))
