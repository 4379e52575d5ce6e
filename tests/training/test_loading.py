"""Loaded weights have memory of their own: no rank goes on holding the files, and what becomes of them is no
matter."""

from __future__ import annotations

import errno
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

from launcher.data.section import Source
from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.tasks.sequence_classification import LabelledColumns, SequenceClassification
from launcher.training.engines import build
from launcher.training.model import attention, pretrained
from launcher.training.model import loading as models
from launcher.training.model.loading import local_part
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.test_engine import Causal
from tests.training.tiny import model_of
from tests.training.wholes import whole

pytestmark = pytest.mark.distributed


def loaded(plan: Plan) -> dict[str, Any]:
    """Where the parameters are after loading, and whether writing zeros over the files changes them."""
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = build(plan, Causal, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})  # type: ignore[arg-type]
    mapped = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    before = {name: local_part(parameter).clone() for name, parameter in engine.model.named_parameters()}
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        with open(Path(plan.model.name) / "model.safetensors", "r+b") as file:
            size = file.seek(0, 2)
            file.seek(0)
            file.write(bytes(size))
    torch.distributed.barrier()
    same = all(
        torch.equal(before[name], local_part(parameter))
        for name, parameter in engine.model.named_parameters()
    )
    return {
        "mapped": mapped,
        "same": same,
        "any": any(bool(value.any()) for value in before.values()),
        "shards": _shards(),
    }


def _shards() -> int:
    """DTensors that are alive: for ZeRO, what loading should have let go of."""
    return sum(issubclass(type(thing), DTensor) for thing in gc.get_objects())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "engine", [{}, {"offload": "parameters"}, deepspeed(2)], ids=["fsdp", "fsdp, offloaded", "zero2"]
)
def test_no_rank_holds_the_files(engine: dict[str, Any], world_size: int, tmp_path: Path) -> None:
    if engine.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    model_of("llama").save_pretrained(tmp_path)
    plan = plan_of(tmp_path, world_size, **engine)
    for rank in on_ranks(world_size, loaded, plan):
        shards = rank.pop("shards")
        assert rank == {"mapped": [], "same": True, "any": True}
        assert shards == 0 or plan.engine == "fsdp"


def test_no_memory_while_loading_is_not_the_models_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its errno, by which it is known as out of memory."""

    def without_memory(*_: Any, **__: Any) -> PreTrainedModel:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    model_of("llama").save_pretrained(tmp_path)
    plan = plan_of(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", without_memory)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        models.load(plan, Causal.auto_class, pretrained.read_config(plan), lambda model: None)


def biases(plan: Plan, config: Any) -> dict[str, Any]:
    """What the head's tensors are after loading."""
    data = LabelledColumns(train=Source(path="unused"), text="text", label="label", problem="regression")
    task = SequenceClassification(data)
    config.problem_type = "multi_label_classification"
    engine = build(plan, task, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    state = engine.state_dict()
    return {name: whole(state[f"model.{name}"]) for name in ("classifier.weight", "classifier.bias")}


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [(1, {}), (2, {}), pytest.param(2, deepspeed(3), marks=pytest.mark.slow)],
    ids=["1", "2, fsdp", "2, zero3"],
)
def test_a_new_head_begins_where_the_labels_say(
    engine: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    """The bias alone, and only of a head that the files do not hold."""
    if engine.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, num_labels=3, attn_implementation="sdpa", **sizes)
    BertModel(config).save_pretrained(tmp_path / "body")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "head")
    config.head_bias = [3.5, -2.0, 0.25]
    for source, bias in (("body", [3.5, -2.0, 0.25]), ("head", [0.0] * 3)):
        task = {"task": "sequence-classification", "model__task": "sequence-classification"}
        plan = plan_of(tmp_path / source, world_size, **task, attention="sdpa", layout="padded", **engine)
        for found in on_ranks(world_size, biases, plan, config):
            assert found["classifier.bias"].tolist() == bias
            assert found["classifier.weight"].abs().max() < 1 and found["classifier.weight"].any()


def squares(plan: Plan, config: Any) -> dict[str, Any]:
    """The loss that the engine has of some numbers, and that by its own outputs."""
    data = LabelledColumns(train=Source(path="unused"), text="text", label="label", problem="regression")
    task = SequenceClassification(data)
    engine = build(plan, task, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    labels = torch.tensor([3.14159, -271.828])
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "labels": labels,
        "weights": torch.ones(2),
    }
    output = engine.evaluate(batch)
    assert output.predictions is not None
    return {
        "engine": output.loss_sum,
        "exact": (output.predictions.float().flatten() - labels).square().sum(),
    }


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [(1, {}), (2, {}), pytest.param(1, deepspeed(2), marks=pytest.mark.slow)],
    ids=["1", "2, fsdp", "1, zero2"],
)
def test_labels_are_not_rounded_to_what_the_model_computes_in(
    engine: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    """FSDP would, and bf16 has three digits."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, num_labels=1, attn_implementation="sdpa", **sizes)
    config.problem_type = "regression"
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    task = {"task": "sequence-classification", "model__task": "sequence-classification"}
    way = {"attention": "sdpa", "layout": "padded", "precision": "bf16"}
    for one in on_ranks(world_size, squares, plan_of(tmp_path, world_size, **task, **way, **engine), config):
        torch.testing.assert_close(one["engine"], one["exact"], rtol=1e-6, atol=0)
