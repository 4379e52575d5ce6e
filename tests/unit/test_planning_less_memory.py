"""What is advised after a rank ran out of memory."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from launcher.planner.hardware import detect as hardware_module
from launcher.planner.hardware.detect import Gpu, Hardware
from launcher.planner.less_memory import Advice, less_memory
from launcher.planner.memory.profile import Profile
from launcher.planner.memory.profiles import Unknown
from launcher.planner.memory.program import Unit, Weight
from launcher.planner.plan import Plan
from tests.training.plans import plan_of
from tests.unit.given_profiles import given
from tests.unit.test_planning_footprint import LLAMA

GIB = 1 << 30
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "intermediate_size": 4096,
    "vocab_size": 1000,
}
SMALL = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 8, "vocab_size": 1000}
CAPPED = Hardware(4, 64 * GIB, process_bytes=2 * GIB)
LAYERS = tuple(Unit((Weight(f"layers.{number}.weight", (16384, 1024)),)) for number in range(16))
ONLY_STATE = given(
    Unknown("its code goes by numbers", Profile(32, Unit((Weight("head.weight", (1000, 1024)),)), LAYERS))
)
"""Of 269.5 million parameters, whose passes are not known: their state takes 3.0 GiB."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def on(model: Path, ranks: int = 1, global_batch_size: int = 8, micro: int = 1, **changes: Any) -> Plan:
    batch = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro,
        "accumulation_steps": global_batch_size // ranks // micro,
        "data_parallel_size": ranks,
    }
    return plan_of(
        model,
        ranks,
        **{"batch": batch, "activation_checkpointing": "full", "data__max_length": 32, **changes},
    )


def less(plan: Plan, hardware: Hardware) -> Advice:
    return less_memory(plan, hardware, profiles=ONLY_STATE)


def test_more_ranks_where_the_state_alone_is_too_large(model: Path) -> None:
    advice = less(on(model), CAPPED)
    assert advice.options == "--nproc 2"
    assert (
        advice.reason
        == "the model and its training state take about 3.0 GiB of a rank, which has 2.0 GiB; cut over 2 "
        "ranks it is 1.5 GiB"
    )


def test_a_smaller_pass_is_no_advice_where_the_state_alone_is_too_large(model: Path) -> None:
    assert (
        less(on(model, global_batch_size=24, micro=4, activation_checkpointing="none"), CAPPED).options
        == "--nproc 2"
    )
    advice = less(on(model, global_batch_size=12, micro=12), Hardware(4, 64 * GIB, process_bytes=1 * GIB))
    assert advice.options == "--nproc 4 --set batch.micro_batch_size=3"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"micro": 4}, "--set batch.micro_batch_size=2"),
        ({"micro": 3, "activation_checkpointing": "none"}, "--set batch.micro_batch_size=1"),
        ({"activation_checkpointing": "selective"}, "--set memory.activation_checkpointing=full"),
    ],
)
def test_a_smaller_pass_where_the_state_fits(model: Path, changes: dict[str, Any], options: str) -> None:
    advice = less(on(model, 4, 48, **changes), CAPPED)
    assert (advice.options, advice.reason) == (options, "")


def test_more_ranks_where_the_pass_is_the_least_already(model: Path) -> None:
    assert less(on(model, 4), CAPPED).options == "--nproc 8"


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        (
            {"mesh__dp_replicate": 4, "mesh__dp_shard": 1},
            "--set parallel.shard=full --set parallel.replicate=1",
        ),
        ({"sharding": "gradients", "mesh__reshard_after_forward": False}, "--set parallel.shard=full"),
    ],
)
def test_cut_in_full_before_more_ranks(model: Path, changes: dict[str, Any], options: str) -> None:
    advice = less(on(model, 4, **changes), dataclasses.replace(CAPPED, process_bytes=int(1.6 * GIB)))
    assert advice.options == options and "cut in full over the 4 ranks it is 771 MiB" in advice.reason


def test_more_ranks_with_the_sharding_that_the_job_left_out(model: Path) -> None:
    decided = [{"key": "parallel.shard", "value": "none", "reason": "one rank"}]
    assert less(on(model, sharding="none"), CAPPED).options == "--nproc 2 --set parallel.shard=full"
    assert less(on(model, sharding="none", decisions=decided), CAPPED).options == "--nproc 2"


def test_ranks_that_only_share_the_machine_are_no_help(model: Path) -> None:
    advice = less(on(model), Hardware(4, 2 * GIB))
    assert (
        advice.options == ""
        and "which this machine has not: take more nodes, or let ZeRO-3 offload to NVMe" in advice.reason
    )
    capped = Hardware(4, 3 * GIB, process_bytes=2 * GIB)
    assert less(on(model), capped).options == ""


def test_no_number_of_ranks_is_enough(model: Path) -> None:
    advice = less(on(model, global_batch_size=2), Hardware(4, 64 * GIB, process_bytes=GIB))
    assert advice.options == "" and advice.reason.endswith(
        "cut over 2 ranks, one for each sample of the batch, it is still 1.5 GiB"
    )


def test_it_should_have_been_enough(model: Path) -> None:
    advice = less(on(model, 4, global_batch_size=4), CAPPED)
    assert advice.options == "" and advice.reason.endswith(
        "by that it should do, and nothing that needs less is left to change"
    )


def test_gpus_first_and_then_the_hosts_memory(model: Path) -> None:
    gpus = tuple(Gpu("GPU", 2 * GIB, 9.0) for _ in range(4))
    plan = on(model, mesh__device="cuda")
    assert less(plan, Hardware(4, 64 * GIB, gpus=gpus)).options == "--nproc 4"
    advice = less(plan, Hardware(4, 64 * GIB, gpus=gpus[:2]))
    assert (
        advice.options
        == "--set parallel.engine=deepspeed --set parallel.shard=full --set memory.offload=parameters"
    )
    assert "2 GPUs are here" in advice.reason


def test_nothing_is_made_up_about_what_is_not_known(tmp_path: Path, model: Path) -> None:
    unknown = tmp_path / "elsewhere"
    assert less_memory(on(unknown, micro=2), CAPPED).options == "--set batch.micro_batch_size=1"
    assert less_memory(on(unknown), CAPPED) == less(on(model, mesh__device="cuda"), Hardware(4, 64 * GIB))
    assert less(on(model, offload="parameters"), CAPPED).options == ""


@pytest.mark.parametrize(
    ("peak", "options"),
    [
        (0, "--set batch.micro_batch_size=4"),
        (10 * GIB, "--set batch.micro_batch_size=2"),
        (int(11.13 * GIB), "--set batch.micro_batch_size=4 --set memory.activation_checkpointing=full"),
    ],
)
def test_the_cheapest_pass_that_would_have_fitted_by_the_formulas(
    peak: int, options: str, tmp_path: Path
) -> None:
    """What was measured beyond the plan is taken to come on top of every other plan too."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plan = on(tmp_path, micro=8, activation_checkpointing="none", data__max_length=256)
    advice = less_memory(plan, Hardware(4, 64 * GIB, process_bytes=10 * GIB), peak)
    assert advice.options == options
    assert "the plan expected" in advice.reason and "of 10.0 GiB" in advice.reason
    assert ("a rank had" in advice.reason) == bool(peak)


def test_the_limit_of_a_process_is_a_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CAPPED.rank_memory("cpu", 4) == 2 * GIB
    assert CAPPED.rank_memory("cpu", 64) == 1 * GIB
    assert Hardware(4, 64 * GIB).rank_memory("cpu", 2) == 32 * GIB
    limits = {resource.RLIMIT_DATA: 5 * GIB, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(
        hardware_module.resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY)
    )
    assert hardware_module.process_limit() == 5 * GIB
    limits[resource.RLIMIT_DATA] = resource.RLIM_INFINITY
    assert hardware_module.process_limit() == 0


def test_what_is_offloaded_has_to_fit_the_host_after_out_of_memory_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | SMALL))
    gpus = (Gpu("NVIDIA H100 80GB HBM3", 2 * GIB, 9.0),)
    plan = on(
        tmp_path,
        1,
        64,
        64,
        activation_checkpointing="full",
        data__max_length=4096,
        offload="parameters",
        mesh__device="cuda",
    )
    roomy, tight = (less_memory(plan, Hardware(4, memory, gpus=gpus)) for memory in (64 * GIB, GIB // 16))
    assert roomy.options.startswith("--set batch.micro_batch_size=") and "with this it is" in roomy.reason
    assert "with this it is" not in tight.reason
