"""Engine, stage and offloading: what is taken is what trying everything would take, and nothing that does not
fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.plan_tables import explained, not_taken
from launcher.errors import ConfigurationError
from launcher.job.schema import Job
from launcher.planner.candidates import engine_options
from launcher.planner.fastest import WORTH
from launcher.planner.forecast import Forecast, forecast_of
from launcher.planner.hardware.detect import Gpu, Hardware
from launcher.planner.hardware.gpu_table import gpu_type
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.limits import RECOMPUTATIONS
from launcher.planner.plan import Plan
from launcher.planner.preview import preview_job
from launcher.planner.resolve.batch import divisors, with_batch
from launcher.planner.search import plan_job
from launcher.planner.speed.collectives import offloads
from launcher.planner.suggestions import nearest_that_fit
from launcher.planner.target import USABLE, Target
from tests.unit.test_planning_footprint import LLAMA
from tests.unit.test_planning_search import decided, job_of

GIB = 1 << 30
SMALL = {
    "hidden_size": 2048,
    "num_hidden_layers": 12,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "vocab_size": 32000,
}
NUM_GPUS, SAMPLES = 4, 16
SEVENTY = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}


def machine(memory: float, host: float = 1024) -> Hardware:
    """GPUs with so many GiB in a node with so many."""
    return Hardware(
        64, int(host * GIB), frozenset(), (Gpu("NVIDIA H100 80GB HBM3", int(memory * GIB), 9.0),) * NUM_GPUS
    )


def small(directory: Path, **sections: dict[str, Any]) -> Job:
    cluster = {"gpus_per_node": NUM_GPUS, "nodes": 1, "gpu": None} | sections.pop("cluster", {})
    batch = {"global_batch_size": SAMPLES} | sections.pop("batch", {})
    made = job_of(directory, batch=batch, cluster=cluster, **sections)
    (directory / "config.json").write_text(json.dumps(LLAMA | SMALL))
    return made


def pinned(job: Job, **keys: Any) -> Job:
    """The job with keys of `parallel` and `memory` set."""
    content = job.model_dump(exclude_unset=True)
    for key, value in keys.items():
        section = "parallel" if key in ("engine", "shard", "replicate") else "memory"
        content.setdefault(section, {})[key] = value
    return Job.model_validate(content)


def everything(job: Job, hardware: Hardware) -> list[list[Forecast]]:
    """Every plan that fits, by what goes first: nothing offloaded before anything, and FSDP before DeepSpeed."""
    order: list[tuple[str, tuple[tuple[str, str], ...]]] = [
        ("fsdp", (("none", "full"), ("none", "gradients"))),
        ("deepspeed", (("none", "full"), ("none", "gradients"), ("none", "optimizer"))),
        ("fsdp", (("parameters", "full"),)),
        ("deepspeed", (("optimizer", "full"), ("optimizer", "gradients"), ("parameters", "full"))),
    ]
    return [
        [made for offload, shard in cuts for made in _fitting(job, hardware, engine, offload, shard)]
        for engine, cuts in order
    ]


def _fitting(job: Job, hardware: Hardware, engine: str, offload: str, shard: str) -> list[Forecast]:
    ways = ("none", "full") if (engine, shard) == ("deepspeed", "full") else RECOMPUTATIONS
    asked = pinned(
        job, engine=engine, offload=offload, shard=shard, replicate=1, activation_checkpointing="full"
    )
    plan, memory = plan_job(asked, None, hardware, local=False), hardware.gpus[0].memory_bytes
    assert (plan.engine, plan.offload, plan.sharding) == (engine, offload, shard)
    found = []
    for way in ways:
        for micro in divisors(SAMPLES // NUM_GPUS):
            made = forecast_of(with_batch(plan, micro, way), Target(memory, gpu_type("h100-80gb")))
            assert made is not None
            if made.fits and (offload == "none" or made.host_bytes <= hardware.memory_bytes * USABLE["cpu"]):
                found.append(made)
    return found


def key(plan: Plan) -> tuple[str, str, str]:
    return plan.engine, plan.offload, plan.sharding


@pytest.mark.parametrize(
    ("memory", "host"), [(60, 1024), (14, 1024), (7, 1024), (4, 1024), (5, 5), (2.5, 1024), (1.2, 1024)]
)
def test_what_is_taken_is_what_trying_everything_would_take(
    memory: float, host: float, tmp_path: Path
) -> None:
    job, hardware = small(tmp_path), machine(memory, host)
    made = plan_job(job, None, hardware, local=False)
    said = forecast_of(made, Target(hardware.gpus[0].memory_bytes, gpu_type("h100-80gb")))
    assert said is not None and said.speed is not None
    assert (
        made.batch.micro_batch_size * made.batch.accumulation_steps * NUM_GPUS
        == made.batch.global_batch_size
        == SAMPLES
    )
    group = next((group for group in everything(job, hardware) if group), None)
    if group is None:
        assert not said.fits and made.engine == "fsdp" and made.offload == "none"
        return
    assert said.fits and key(made) in {key(other.plan) for other in group}
    assert said.speed.step * WORTH <= min(other.speed.step for other in group if other.speed)


def test_the_cases_above_are_of_every_kind(tmp_path: Path) -> None:
    """Else they would show little."""
    job = small(tmp_path)
    made = {plan_job(job, None, machine(memory), local=False).offload for memory in (60, 4, 1.2)}
    assert made == {"none", "parameters"}
    only = small(tmp_path, parallel={"engine": "deepspeed"})
    assert plan_job(only, None, machine(5), local=False).offload == "optimizer"


def test_a_70b_on_four_nodes_of_small_gpus_takes_what_fits(tmp_path: Path) -> None:
    cluster = {"gpu": "a100-40gb", "nodes": 4}
    job = job_of(tmp_path, batch={"global_batch_size": 128}, data={"max_length": 4096}, cluster=cluster)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | SEVENTY))
    seen = preview_job(job)
    assert seen.forecast is not None and seen.forecast.fits
    assert key(seen.plan) == ("fsdp", "parameters", "full")
    assert "nothing fits the GPUs without" in decided(seen.plan, "memory.offload")
    assert seen.plan.batch.global_batch_size == 128
    kinds = {
        refused.what.split(",")[0].split(" ")[0]
        for refused in seen.plan.refused
        if refused.why == "does not fit"
    }
    assert kinds >= {"FSDP", "ZeRO-3", "ZeRO-2", "ZeRO-1"}
    lines = not_taken(seen.plan)
    assert len(lines) < 20 and any("38.0 GiB of a rank" in line for line in lines)
    assert "Looked at and not taken" in explained(
        seen.plan, "memory.offload"
    ) and "more, which --json lists" in "\n".join(lines)
    # On twice as many nodes nothing has to leave the GPUs.
    wide = preview_job(job.model_copy(update={"cluster": job.cluster.model_copy(update={"nodes": 16})}))
    assert wide.plan.offload == "none" and "all of it fits" in decided(wide.plan, "memory.offload")
    assert wide.forecast is not None and wide.forecast.fits


def test_what_fits_is_planned_as_if_there_were_no_offloading(tmp_path: Path) -> None:
    job = small(tmp_path)
    auto, never = (
        plan_job(one, None, machine(40), local=False) for one in (job, pinned(job, offload="none"))
    )
    assert auto.model_copy(update={"decisions": (), "refused": ()}) == never.model_copy(
        update={"decisions": (), "refused": ()}
    )


def test_offloading_may_be_left_out_of_account_or_be_all_that_is_looked_at(tmp_path: Path) -> None:
    only = plan_job(small(tmp_path), None, machine(4), local=False, offloading="only")
    assert (
        key(only) == key(plan_job(small(tmp_path), None, machine(4), local=False)) and only.offload != "none"
    )
    assert all("offloaded" in refused.what for refused in only.refused)
    assert plan_job(small(tmp_path), None, machine(4), local=False, offloading="never").offload == "none"


def test_a_cpu_has_nothing_to_move(tmp_path: Path) -> None:
    job = small(tmp_path, cluster={"gpus_per_node": 0, "ranks_per_node": 2})
    made = plan_job(job, None, Hardware(4, 4 * GIB), local=False)
    assert made.offload == "none" and "in the host's memory already" in decided(made, "memory.offload")
    assert not any(
        alternative.offload != "none" for group in engine_options(job, made) for alternative in group
    )
    to_files = pinned(job, offload_to="/mnt/nvme")
    with pytest.raises(ConfigurationError, match=r"set memory\.offload"):
        plan_job(to_files, None, Hardware(4, 4 * GIB), local=False)


def test_files_are_for_deepspeed_and_only_where_nothing_else_fits(tmp_path: Path) -> None:
    job = small(tmp_path, memory={"offload_to": "/mnt/nvme"})
    much, little = (plan_job(job, None, machine(memory, 5), local=False) for memory in (60, 5))
    assert (much.engine, much.offload, much.offload_to) == ("fsdp", "none", "cpu")
    assert little.engine == "deepspeed" and little.offload != "none" and little.offload_to == "/mnt/nvme"
    assert "no plan of FSDP fits" in decided(little, "parallel.engine")
    assert any(
        refused.why == "not possible" and "host's memory alone" in refused.reason
        for refused in little.refused
    )
    assert little.sharding == "full", "only the third stage offloads to files"
    assert decided(little, "zero.reduce_bucket_size") and decided(little, "checkpoint.async")


def test_an_engine_that_is_not_installed_is_said_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name)
    )
    made = plan_job(small(tmp_path, memory={"offload": "none"}), None, machine(4))
    assert made.engine == "fsdp" and any("not installed" in refused.reason for refused in made.refused)


@pytest.mark.parametrize(
    ("network", "memory", "shard"),
    [("ib400", 80, "full"), ("ethernet25", 80, "optimizer"), ("ethernet25", 7, "full")],
)
def test_zero_takes_an_earlier_stage_where_messages_are_waited_for(
    network: str, memory: float, shard: str, tmp_path: Path
) -> None:
    """Two nodes: what ZeRO-1 sends once a step, ZeRO-2 sends with each pass, all-reduced, which is as much as
    ZeRO-3 gathers and sends."""
    job = small(
        tmp_path,
        parallel={"engine": "deepspeed"},
        cluster={"nodes": 2, "network": network},
        batch={"global_batch_size": 256},
    )
    made = plan_job(job, None, machine(memory), local=False)
    assert made.zero is not None and made.sharding == shard
    assert made.zero.stage == {"full": 3, "gradients": 2, "optimizer": 1}[shard]
    if shard != "full":
        assert "x as fast" in decided(made, "parallel.shard")


def test_selective_recomputation_and_zero_begin_with_the_second_stage(tmp_path: Path) -> None:
    job = small(tmp_path, parallel={"engine": "deepspeed"}, memory={"activation_checkpointing": "selective"})
    made = plan_job(job, None, machine(60), local=False)
    assert (
        made.zero is not None and made.zero.stage in (1, 2) and made.activation_checkpointing == "selective"
    )


def test_zero_takes_an_earlier_stage_where_that_computes_less_again(tmp_path: Path) -> None:
    """On a fast network, where messages are hidden: the third stage cannot keep what selective checkpointing
    keeps."""
    job = small(tmp_path, parallel={"engine": "deepspeed"}, data={"max_length": 8192})
    made = plan_job(job, None, machine(12), local=False)
    assert made.zero is not None and made.zero.stage < 3 and made.activation_checkpointing == "selective"


def test_what_is_offloaded_is_not_on_the_device(tmp_path: Path) -> None:
    """Of P parameters over 4 ranks in bf16: ZeRO-3 leaves 2P/4 without the optimizer's state, and next to
    nothing without the shards."""
    job = small(tmp_path, parallel={"engine": "deepspeed", "shard": "full"})
    sizes = {}
    for offload in ("none", "optimizer", "parameters"):
        plan = plan_job(
            pinned(job, offload=offload, activation_checkpointing="full"), None, machine(80), local=False
        )
        made = forecast_of(plan, Target(80 * GIB))
        assert made is not None
        sizes[offload] = (
            made.footprint.phase("saving").peak,
            made.footprint.phase("steady step").host,
            Estimator(plan, made.program).least(),
        )
    num_parameters = 2 * 32000 * 2048 + 12 * (2048 * (2 * 2048 + 2 * 1024) + 3 * 2048 * 5632)
    share = num_parameters / NUM_GPUS
    assert sizes["none"][0] - sizes["optimizer"][0] == pytest.approx(16 * share, rel=0.02)
    assert sizes["optimizer"][0] - sizes["parameters"][0] == pytest.approx(2 * share, rel=0.02)
    assert [sizes[name][1] / share for name in sizes] == pytest.approx([0, 16, 18], rel=0.02)
    assert sizes["none"][2] > sizes["optimizer"][2] > sizes["parameters"][2]


def test_offloading_costs_the_way_and_the_processors(tmp_path: Path) -> None:
    job = small(tmp_path, parallel={"shard": "full"})
    rates = {}
    for engine, offload in (
        ("fsdp", "none"),
        ("fsdp", "parameters"),
        ("deepspeed", "optimizer"),
        ("deepspeed", "parameters"),
    ):
        asked = pinned(job, engine=engine, offload=offload, activation_checkpointing="full")
        made = forecast_of(
            plan_job(asked, None, machine(80), local=False), Target(80 * GIB, gpu_type("h100-80gb"))
        )
        assert made is not None and made.speed is not None and offloads(made.plan) == (offload != "none")
        rates[engine, offload] = made.speed
    kept, moved = rates["fsdp", "none"], rates["fsdp", "parameters"]
    assert (
        moved.step > kept.step and moved.communication > kept.communication and moved.compute == kept.compute
    )
    # 28 bytes of each element: of 3.35e12 a second for a GPU alone, of 200e9 for four of them.
    assert moved.optimizer == pytest.approx(kept.optimizer * 3.35e12 / (200e9 / NUM_GPUS))
    assert rates["deepspeed", "optimizer"].communication < rates["deepspeed", "parameters"].communication


def test_a_host_without_the_memory_for_it_is_no_place(tmp_path: Path) -> None:
    job, hardware = small(tmp_path), machine(4, 8)
    made = plan_job(job, None, hardware, local=False)
    assert made.offload == "none"
    assert any("of the host's memory" in refused.reason for refused in made.refused)
    plan = plan_job(pinned(job, offload="parameters"), None, machine(4), local=False)
    unknown, told = (forecast_of(plan, Target(4 * GIB, host_memory_bytes=size * GIB)) for size in (0, 8))
    assert unknown is not None and unknown.fits
    assert (
        told is not None
        and told.fits_device
        and not told.fits
        and told.lack.endswith("of the 7.2 GiB of the host's memory")
    )


def test_the_nearest_that_fit_offload_only_where_the_job_says_not_to(tmp_path: Path) -> None:
    """What is left open was looked at already, and lacked the host's memory."""
    for engine, kinds in (("fsdp", ["parameters"]), ("deepspeed", ["optimizer", "parameters"])):
        job, hardware = (
            small(
                tmp_path, parallel={"engine": engine, "shard": "full"}, batch={"global_batch_size": NUM_GPUS}
            ),
            machine(4, 8),
        )
        advised = []
        for one in (job, pinned(job, offload="none")):
            made = forecast_of(
                plan_job(one, None, hardware, local=False), Target(4 * GIB, gpu_type("h100-80gb"))
            )
            assert made is not None and not made.fits
            advised.append([words for words, _ in nearest_that_fit(made, 8) if "offload" in words])
        assert advised[0] == [] and [words.split()[1].rstrip(",") for words in advised[1]] == kinds


def test_what_is_not_to_be_cut_is_not_handed_to_an_engine_that_cuts(tmp_path: Path) -> None:
    made = plan_job(small(tmp_path, parallel={"shard": "none"}), None, machine(1.2), local=False)
    assert (made.engine, made.sharding) == ("fsdp", "none")


@pytest.mark.parametrize("training", [{"optimizer": "muon"}, {"optimizer": "adafactor"}, {"moments": "8bit"}])
def test_what_needs_whole_rows_is_not_handed_to_an_engine_that_cuts_them_up_nor_off_the_device(
    training: dict[str, str], tmp_path: Path
) -> None:
    job = small(tmp_path, training=training)
    made = plan_job(job, None, machine(80), local=False)
    assert [[(one.engine, one.offload) for one in group] for group in engine_options(job, made)] == [
        [("fsdp", "none")]
    ]


def test_dora_is_not_handed_to_an_engine_that_has_weights_whole_within_their_layers_alone(
    tmp_path: Path,
) -> None:
    job = small(tmp_path, model={"adapter": {"dora": True}})
    made = plan_job(job, None, machine(80), local=False)
    assert {one.engine for group in engine_options(job, made) for one in group} == {"fsdp"}


@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
def test_an_adapter_needs_little_beside_a_model_that_stays_as_it_is(offload: str, tmp_path: Path) -> None:
    parallel = {"engine": "deepspeed", "shard": "full"}
    whole, beside = (
        forecast_of(
            plan_job(
                small(tmp_path, parallel=parallel, memory={"offload": offload}, model=model),
                None,
                machine(80),
                local=False,
            ),
            Target(),
        )
        for model in ({}, {"adapter": {"rank": 8}})
    )
    assert whole is not None and beside is not None
    for phase, other in zip(whole.footprint.phases, beside.footprint.phases, strict=True):
        # Its own matrices are small, and so always whole, and there is a pass through them.
        assert other.total <= 1.1 * phase.total, phase.name


def test_a_plan_for_elsewhere_does_not_go_by_what_is_free_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small(tmp_path, cluster={"gpu": "a100-40gb", "gpus_per_node": NUM_GPUS})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | SEVENTY))
    made = []
    for memory in (1, 4096):
        monkeypatch.setattr(Hardware, "detect", lambda memory=memory: Hardware(4, memory * GIB))
        made.append(plan_job(job, None, local=False))
    assert key(made[0]) == key(made[1]) == key(preview_job(job).plan)
