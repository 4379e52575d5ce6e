"""Runs on one GPU: the numbers of a CPU, of the other engine, of eager layers, of a run that was never stopped;
and the memory that was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.runs import events
from launcher.runs.layout import RunDirectory
from tests.gpu.jobs import DEVICE, IS_REHEARSAL, job, run
from tests.training.runs import curve, model_directory, texts, write_rows

NEAR = {"fp32": 1e-3, "bf16": 3e-2}
"""Of losses and gradient norms, relative: sums are added in other orders, and bf16 rounds at other places."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with rows and a tiny Llama."""
    directory = tmp_path_factory.mktemp("gpu")
    write_rows(directory / "rows.jsonl", [{"text": text} for text in texts(120)])
    model_directory(directory / "model", num_hidden_layers=3)
    return directory


def numbers(run: RunDirectory) -> list[tuple[float, float]]:
    """Return loss and gradient norm of every step."""
    return [(record["loss"], record["grad_norm"]) for record in curve(run).values()]


def assert_near(one: RunDirectory, other: RunDirectory, precision: str) -> None:
    ours, theirs = numbers(one), numbers(other)
    assert len(ours) == len(theirs) > 0
    for first, second in zip(ours, theirs, strict=True):
        assert first == pytest.approx(second, rel=NEAR[precision])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_computes_what_a_cpu_does(place: Path, precision: str) -> None:
    """Packed, where a GPU has attention of its own in half precision."""
    sections = {"precision": precision}
    ours = run(place, f"device-{precision}", job(DEVICE, place, place / "model", **sections))
    theirs = run(place, f"cpu-{precision}", job("cpu", place, place / "model", **sections))
    assert_near(ours, theirs, precision)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"engine": "deepspeed", "shard": "full"}},
        {"memory": {"activation_checkpointing": "full"}},
        {"memory": {"offload": "optimizer"}, "parallel": {"engine": "deepspeed", "shard": "full"}},
        {"memory": {"offload": "parameters"}},
    ],
    ids=["zero-3", "recomputed", "optimizer offloaded", "parameters offloaded"],
)
def test_other_ways_give_the_same_numbers(place: Path, changes: dict[str, Any], request: Any) -> None:
    if IS_REHEARSAL and "offload" in changes.get("memory", {}):
        pytest.skip("a CPU has nowhere to offload to")
    name = request.node.callspec.id.replace(" ", "-")
    plain = run(place, f"plain-{name}", job(DEVICE, place, place / "model"))
    other = run(place, name, job(DEVICE, place, place / "model", **changes))
    assert_near(other, plain, "fp32")


def test_compiled_layers_equal_eager_ones(place: Path) -> None:
    model = {"name": str(place / "model"), "task": "causal-lm", "compile": True}
    eager = run(place, "eager", job(DEVICE, place, place / "model"))
    compiled = run(place, "compiled", job(DEVICE, place, place / "model", model=model))
    assert_near(compiled, eager, "fp32")


def test_stopped_it_goes_on_where_it_was(place: Path) -> None:
    """Not to the bit: a GPU adds up some gradients in any order."""
    content = job(DEVICE, place, place / "model", precision="bf16")
    whole = run(place, "whole", content)
    run(place, "stopped", content, "--stop-at", "3")
    stopped = run(place, "stopped", content)
    assert [event["step"] for event in events.read(stopped.events_file) if event["event"] == "resumed"] == [3]
    assert_near(stopped, whole, "bf16")


def test_the_memory_is_the_plans(place: Path) -> None:
    """Within a tenth and 64 MiB, of a model whose tensors are large against the allocator's blocks."""
    model = model_directory(
        place / "wide", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    measured = run(place, "memory", job(DEVICE, place, model, precision="bf16"))
    [compared] = [event for event in events.read(measured.events_file) if event["event"] == "compared"]
    phases = compared["measured"]["phases"]
    for phase in ("first step", "steady step"):
        expected = compared["expected"]["phases"][phase]
        if not IS_REHEARSAL:  # a process on a CPU holds more than its tensors
            assert phases[phase] <= 1.1 * expected + (64 << 20)
        assert phases[phase] > 0.5 * expected
