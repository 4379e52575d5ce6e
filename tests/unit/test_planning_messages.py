"""Messages and operations of a step of a model that is small enough to count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.planner.hardware.gpu_table import gpu_type, on_network
from launcher.planner.memory.program import Unit, Weight
from launcher.planner.plan import Plan
from launcher.planner.speed import collectives
from launcher.planner.speed.collectives import Traffic, evaluation_traffic, exposed, seconds, traffic
from launcher.planner.speed.flops import Units, operations, passing_back
from tests.training.plans import deepspeed, plan_of

ROOT = Unit(
    (Weight("embed.weight", (10, 4)), Weight("norm.weight", (4,)), Weight("head.weight", (10, 4))),
    num_first=1,
)
LAYER = Unit(
    (Weight("self_attn.o_proj.weight", (4, 4)), Weight("mlp.up.weight", (8, 4)), Weight("norm.weight", (4,)))
)
MODEL: Units = (ROOT, [LAYER, LAYER, LAYER])
P = 84 + 3 * 52


def still(unit: Unit) -> Unit:
    return Unit(
        tuple(Weight(weight.name, weight.shape, trains=False) for weight in unit.weights), unit.num_first
    )


UPPER: Units = (Unit((still(ROOT).weights[0], *ROOT.weights[1:]), 1), [still(LAYER), still(LAYER), LAYER])
"""The last layer and the head train."""
TRAINED = 52 + 44


def plan(ranks: int = 4, passes: int = 1, **changes: Any) -> Plan:
    batch = {
        "global_batch_size": ranks * passes,
        "micro_batch_size": 1,
        "accumulation_steps": passes,
        "data_parallel_size": ranks,
    }
    return plan_of(
        Path("model"),
        ranks,
        batch=batch,
        data={"train": {"path": "no.jsonl"}, "text": "text", "max_length": 16},
        **changes,
    )


GRADIENTS = {"sharding": "gradients", "mesh__reshard_after_forward": False}
PERSISTENT = {"zero": deepspeed(3)["zero"] | {"max_live_parameters": 41}}


@pytest.mark.parametrize(
    ("changes", "units", "gathered", "reduced"),
    [
        ({}, MODEL, 2 * 156 + 84, P),
        ({"passes": 3}, MODEL, 6 * 156 + 84, P),
        (GRADIENTS | {"passes": 3}, MODEL, P, P),
        (deepspeed(1) | {"passes": 3}, MODEL, P, 2 * P),
        (deepspeed(2) | {"passes": 3}, MODEL, P, 2 * 3 * P),
        (deepspeed(3) | PERSISTENT | {"passes": 3}, MODEL, 3 * (2 * P - 44), 3 * P),
        ({}, UPPER, 3 * 52 + 2 * 52 + 84, TRAINED),
        (GRADIENTS, UPPER, P, TRAINED),
        (deepspeed(1), UPPER, TRAINED, 2 * TRAINED),
        (deepspeed(3) | PERSISTENT, UPPER, 3 * 52 + 52 + 2 * 84 - 44 - 40, TRAINED),
    ],
    ids=[
        "full",
        "full x3",
        "whole",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-3",
        "upper, full",
        "upper, whole",
        "upper, ZeRO-1",
        "upper, ZeRO-3",
    ],
)
@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_bytes_by_hand(
    changes: dict[str, Any], units: Units, gathered: int, reduced: int, precision: str, itemsize: int
) -> None:
    sent = traffic(plan(precision=precision, **changes), units)
    assert sent.received == pytest.approx((itemsize * gathered + 4 * reduced) * 3 / 4)
    assert sent.copied == 0


@pytest.mark.parametrize("sent", [1, 2])
def test_copies_add_up_gradients_once_a_step(sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each of two passes sends them among the ranks of a copy."""
    monkeypatch.setattr(collectives, "DEFERRED_GRADIENT_BYTES", 4 << 30 if sent == 1 else 0)
    two = plan(8, 2, mesh__dp_replicate=2, mesh__dp_shard=4)
    assert traffic(two, MODEL).copied == pytest.approx(8 * P / 4 / 2)
    assert traffic(two, MODEL).num_messages == 4 * 3 + 1 + (sent + 1) * 4


def test_a_rank_alone_sends_nothing() -> None:
    assert seconds(traffic(plan(1), MODEL), plan(1), gpu_type("h100-80gb")) == 0


def test_each_part_of_a_node_has_its_own_way_to_its_copies() -> None:
    """Two nodes of eight: cut in a node, each rank sends another part; where all have all, one way out is as
    wide as the node's."""
    gpu = on_network(gpu_type("h100-80gb"), "ethernet25")
    sent = Traffic(0, 0.0, 1e9)

    def nodes(replicate: int) -> Plan:
        shard = 16 // replicate
        return plan(
            16,
            mesh__nodes=2,
            mesh__ranks_per_node=8,
            mesh__device="cuda",
            mesh__dp_replicate=replicate,
            mesh__dp_shard=shard,
        )

    own, shared = (seconds(sent, nodes(replicate), gpu) for replicate in (2, 16))
    assert own == pytest.approx(1e9 / (gpu.network * 0.75)) and shared == pytest.approx(own / 8)
    alike = seconds(Traffic(0, 1e9, 0.0), nodes(1), gpu)
    assert alike == pytest.approx(shared), "what all gather alike crosses once for a node"


def test_an_evaluation_sends_what_is_gathered_anew() -> None:
    assert evaluation_traffic(plan(passes=3), MODEL).received == pytest.approx(4 * 3 * 156 * 3 / 4)
    assert evaluation_traffic(plan(passes=3, **deepspeed(3)), MODEL).received == pytest.approx(
        4 * 3 * P * 3 / 4
    )
    for changes in (GRADIENTS, deepspeed(1), deepspeed(2)):
        assert evaluation_traffic(plan(passes=3, **changes), MODEL) == Traffic(0, 0.0, 0.0)


def test_a_cpu_hides_nothing_and_a_gpu_all_but_the_ends() -> None:
    assert exposed(1.0, 9.0, plan(), MODEL) == 1.0
    on_gpus = plan(mesh__device="cuda")
    assert exposed(1.0, 9.0, on_gpus, MODEL) == 0.5 and exposed(1.0, 0.2, on_gpus, MODEL) == 0.8


def test_operations_by_hand() -> None:
    """Of 16 tokens: 48 elements of a layer's matrices, 40 of the head; attention 4 wide and 16 long, half of
    it where it is causal."""
    made = operations(plan(), MODEL, 16)
    layer, head, attention = 2 * 16 * 48, 2 * 16 * 40, 4 * 4 * 16 * 16 / 2
    assert made.forward == 3 * (layer + attention) + head
    assert made.backward == 3 * (2 * layer + 2 * attention) + 2 * head and made.again == 0
    recomputed = operations(plan(activation_checkpointing="full"), MODEL, 16)
    assert recomputed.needed == made.needed and recomputed.again == 3 * (layer + attention)
    both_ways = operations(plan(task="sequence-classification"), MODEL, 16)
    assert both_ways.forward == 3 * (layer + 2 * attention), "no word is foreseen, and all of a text is seen"


def test_what_does_not_train_costs_less() -> None:
    layer, head, attention = 2 * 16 * 48, 2 * 16 * 40, 4 * 4 * 16 * 16 / 2
    assert passing_back(UPPER) == [False, False, True] and passing_back(MODEL) == [True] * 3
    made = operations(plan(activation_checkpointing="full"), UPPER, 16)
    assert made.forward == operations(plan(), MODEL, 16).forward
    assert made.backward == 2 * layer + 2 * attention + 2 * head and made.again == layer + attention
    head_alone = (ROOT, [still(LAYER)] * 3)
    lowest = operations(plan(), (Unit((still(ROOT).weights[0], *ROOT.weights[1:]), 1), head_alone[1]), 16)
    assert lowest.backward == head
    words = operations(plan(), head_alone, 16)
    assert words.backward == 3 * (layer + 2 * attention) + 2 * head, "words that train are behind every layer"
