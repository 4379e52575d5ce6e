"""Plans for GPUs that are not here: the table, what is chosen, what is compared, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.forecast import bars, nearest, picture, speed_lines
from launcher.cli.output import folded
from launcher.cli.plan_tables import cells, explained, scaling_plots
from launcher.data.section import Sources
from launcher.errors import ConfigurationError
from launcher.job.schema import Job
from launcher.planner.comparison import compare, scale, with_network, with_prices
from launcher.planner.dataset.dataset_size import DatasetSizes
from launcher.planner.fewest_gpus import fewest_gpus
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.detect import Gpu, Hardware
from launcher.planner.hardware.gpu_table import TABLE, gpu_type, seen
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.memory.profiles import Profiles
from launcher.planner.memory.program import Program
from launcher.planner.model.model_config import config_of, locate
from launcher.planner.plan import Plan
from launcher.planner.preview import preview_job
from launcher.planner.resolve.batch import with_batch
from launcher.planner.search import plan_job
from launcher.planner.suggestions import nearest_that_fit
from launcher.planner.target import Target
from tests.unit.test_planning_footprint import LLAMA, plan_for


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return Job.model_validate(
        {
            "name": "test",
            "model": {"name": str(tmp_path), "weights": "random"},
            "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 4096},
            "batch": {"global_batch_size": 64},
            "training": {"max_steps": 100},
            "cluster": {"gpus_per_node": 8},
        }
    )


def changed(job: Job, **sections: dict[str, Any]) -> Job:
    return job.model_copy(
        update={name: getattr(job, name).model_copy(update=values) for name, values in sections.items()}
    )


def test_every_gpu_has_a_source_and_sound_figures() -> None:
    for gpu in TABLE:
        assert (
            gpu.source
            and gpu.half_rate > gpu.full_rate
            and gpu.memory_bytes > 20 << 30
            and gpu.link >= gpu.network
        )


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="h100-80gb"):
        gpu_type("h100")
    assert gpu_type(" H200 ").key == "h200"


def test_the_gpus_of_this_machine_are_found_by_name() -> None:
    here = Hardware(8, 1 << 40, gpus=(Gpu("NVIDIA A100-SXM4-80GB", 80 << 30, 8.0),))
    found = seen(here)
    assert found is not None and found.key == "a100-80gb"
    assert seen(Hardware(8, 1 << 40)) is None


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 80, "h100-80gb"),
        ("NVIDIA H100 PCIe", 80, "h100-pcie"),
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA B200", 179, "b200"),
        ("NVIDIA GB200", 186, "gb200"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA H100 NVL", 94, "h100-nvl"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA L40", 45, None),
        ("NVIDIA A10", 22, "a10"),
        ("NVIDIA A10G", 22, None),
        ("Tesla V100-SXM2-32GB", 32, "v100-32gb"),
        ("NVIDIA GeForce RTX 3090", 24, "rtx3090"),
        ("AMD Instinct MI300X", 192, "mi300x"),
        ("NVIDIA T4", 15, None),
    ],
)
def test_a_gpu_is_known_by_what_nvidia_smi_calls_it(name: str, gib: int, key: str | None) -> None:
    found = seen(Hardware(8, 1 << 40, gpus=(Gpu(name, gib << 30, 9.0),)))
    assert (found.key if found else None) == key


def test_what_is_chosen_fits_and_keeps_the_global_batch(job: Job) -> None:
    made = preview_job(job, gpu="h100-80gb")
    assert made.forecast is not None and made.forecast.fits and made.forecast.speed is not None
    batch = made.plan.batch
    assert batch.global_batch_size == batch.micro_batch_size * batch.accumulation_steps * 8 == 64
    assert 0.1 < made.forecast.speed.utilisation < 0.7
    assert made.forecast.to_dict()["speed"]["step_seconds"] == made.forecast.speed.step


def test_less_memory_means_smaller_passes_or_more_recomputation(job: Job) -> None:
    large, small = (preview_job(job, gpu=name).plan for name in ("h200", "a100-40gb"))
    order = ["none", "selective", "full"]
    key = [
        (order.index(plan.activation_checkpointing), -plan.batch.micro_batch_size) for plan in (large, small)
    ]
    assert key[0] < key[1]


def test_several_gpus_and_several_numbers_of_them(job: Job) -> None:
    rows = compare(job, "h100-80gb,a100-80gb")
    assert [row.gpu for row in rows] == ["h100-80gb", "a100-80gb"]
    assert rows[0].forecast and rows[1].forecast and rows[0].forecast.speed and rows[1].forecast.speed
    assert rows[0].forecast.speed.step < rows[1].forecast.speed.step
    grown, _ = scale(job, "8..64", "h100-80gb")
    assert [row.plan.mesh.world_size for row in grown] == [8, 16, 32, 64]
    sizes = [row.forecast.footprint.phase("loading").peak for row in grown if row.forecast]
    assert sizes == sorted(sizes, reverse=True)
    assert all(len(cells(row)) == 11 for row in [*rows, *grown]) and rows[0].to_dict()["gpus"] == 8


@pytest.mark.parametrize(
    ("span", "gpu", "network", "text"),
    [
        ("eight", "h100-80gb", None, "write 8..1024"),
        ("8..4", "h100-80gb", None, "write 8..1024"),
        ("8..²", "h100-80gb", None, "write 8..1024"),
        (
            "128..256",
            "h100-80gb",
            None,
            "128, 256 GPUs: .* cannot be cut over so many; the nearest that work: 64",
        ),
        (
            "12..100",
            "h100-80gb",
            None,
            "12 GPUs: no whole number of nodes of 8 GPUs; 24, 48, 96 GPUs: .*; the nearest that work: 8 or 16",
        ),
        ("8..16", "h100-80gb,l40s", None, "one kind of GPU; write h100-80gb"),
        ("8..16", "h100-80gb", "carrier-pigeon", "there are ib400"),
    ],
)
def test_spans_and_networks_that_are_none(
    job: Job, span: str, gpu: str, network: str | None, text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        scale(with_network(job, network), span, gpu)


def test_numbers_that_are_not_possible_are_left_out_of_a_scale_and_said(job: Job) -> None:
    """Twelve GPUs are no nodes of eight, and two cannot be four copies: the others stay."""
    wide = changed(job, batch={"global_batch_size": 96})
    rows, left_out = scale(wide, "12..96", "h100-80gb")
    assert [row.plan.mesh.world_size for row in rows] == [24, 48, 96]
    assert [(one.what, one.why) for one in left_out] == [
        ("12 GPUs", "not possible")
    ] and "nodes of 8" in left_out[0].reason
    copies = changed(job, parallel={"replicate": 4})
    rows, left_out = scale(copies, "1..16", "h200")
    assert [row.plan.mesh.world_size for row in rows] == [4, 8, 16]
    assert {one.what for one in left_out} == {"1 GPU", "2 GPUs"} and all(
        "parallel.replicate" in one.reason for one in left_out
    )
    with pytest.raises(ConfigurationError, match=r"1 GPU: parallel\.replicate: .*; the nearest that work: 4"):
        scale(copies, "1..2", "h200")


def test_what_is_wrong_with_every_number_of_a_scale_is_said_itself(job: Job) -> None:
    with pytest.raises(ConfigurationError, match=r"^parallel\.replicate = 2: ZeRO cuts over all ranks"):
        scale(changed(job, parallel={"replicate": 2, "engine": "deepspeed"}), "8..16", "h200")


def test_the_fewest_gpus_that_end_in_time_and_what_they_cost(job: Job) -> None:
    slow = fewest_gpus(job, "30d", 64, "h100-80gb")[0]
    assert slow.hours is not None
    [fast] = fewest_gpus(job, f"{slow.hours * 3600 / 3:.0f}s", 64, "h100-80gb")
    assert (
        fast.hours is not None
        and fast.plan.mesh.world_size > slow.plan.mesh.world_size
        and fast.hours <= slow.hours / 3
    )
    [row] = with_prices([fast], ["h100-80gb=2.5"])
    assert row.cost == pytest.approx(2.5 * fast.hours * fast.plan.mesh.world_size)


@pytest.mark.parametrize(
    ("deadline", "changes", "text"),
    [
        ("soon", {}, "write 90min, 24h or 2d"),
        ("1s", {}, r"no plan on up to 64 GPUs ends in time; the nearest is \d+ s on 64 x h100-80gb"),
        (
            "24h",
            {"training": {"max_steps": None, "epochs": 1.0}},
            r"needs training.max_steps, as .* is not known: .*train\.jsonl",
        ),
        (
            "24h",
            {"data": {"max_length": 10_000_000}},
            "nothing fits on so few: on 64 x h100-80gb FSDP full, 1 x 64.* GiB of the 76.0 GiB",
        ),
        (
            "24h",
            {"cluster": {"nodes": "10-12"}},
            "--max-gpus = 64: cluster.nodes 10-12 begins with 80 GPUs; write so many or more",
        ),
        (
            "24h",
            {"cluster": {"nodes": "5-7"}},
            "cannot be cut over 40 to 56 GPUs.*global_batch_size 40 or 80, cluster.nodes 4 or 8",
        ),
    ],
)
def test_deadlines_that_cannot_be_kept(job: Job, deadline: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        fewest_gpus(changed(job, **changes), deadline, 64, "h100-80gb")


def test_a_kind_of_gpu_that_will_not_do_is_a_row_with_the_nearest(job: Job) -> None:
    kept = changed(job, memory={"offload": "none"})
    fast, small = fewest_gpus(kept, None, 4, "h100-80gb,rtx4090")
    assert fast.why_not is None and cells(fast)[4] == "yes" and fast.to_dict()["why_not"] is None
    assert (small.gpu, cells(small)[4]) == ("rtx4090", "no") and small.to_dict()["why_not"] == small.why_not
    assert small.why_not is not None and "nothing fits on so few: on 4 x rtx4090 FSDP" in small.why_not
    assert "the nearest that fits: memory.offload: parameters" in small.why_not
    hours = fast.hours
    assert hours is not None
    [late] = [row for row in fewest_gpus(job, f"{2400 * hours:.0f}s", 4, "h200,l40s") if row.gpu == "l40s"]
    assert (
        late.why_not is not None and "ends in time; the nearest is" in late.why_not and cells(late)[4] == "no"
    )
    with pytest.raises(ConfigurationError) as caught:
        fewest_gpus(kept, None, 1, "rtx4090,l40s")
    assert [problem.key for problem in caught.value.problems] == ["--max-gpus"] * 2 and "1 x l40s" in str(
        caught.value
    )


def test_a_plan_that_the_job_sets_is_named_with_what_it_needs_at_the_least(job: Job) -> None:
    """Nothing was looked at beside it."""
    asked = changed(
        job,
        memory={"offload": "none", "activation_checkpointing": "none"},
        batch={"micro_batch_size": 4},
        parallel={"engine": "fsdp", "shard": "full"},
    )
    with pytest.raises(
        ConfigurationError,
        match=r"on 2 x l40s .* GiB of the 45.6 GiB of a rank at the least; the nearest that fits: ",
    ):
        fewest_gpus(asked, None, 2, "l40s")


def test_a_deadline_of_epochs_whose_data_are_here(job: Job, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words"}\n' * 64_000)
    epochs = changed(
        job, training={"max_steps": None, "epochs": 1.0}, data={"train": Sources(path=str(rows))}
    )
    [row] = fewest_gpus(epochs, "24h", 64, "h100-80gb")
    assert row.hours is not None and row.forecast is not None and row.forecast.duration is not None
    assert row.forecast.duration.num_steps == 1000 and 0 < row.hours < 24


@pytest.mark.parametrize("amount", ["", "=", "=nan", "=inf", "=-1", "=much"])
def test_prices_that_are_none(amount: str) -> None:
    with pytest.raises(ConfigurationError, match="write NAME=AMOUNT"):
        with_prices([], [f"h100-80gb{amount}"])


def test_prices_of_other_gpus(job: Job) -> None:
    rows = compare(changed(job, cluster={"gpu": "h100-80gb"}), None)
    assert [row.price for row in with_prices(rows, ["h100-80gb=0"])] == [0.0]
    with pytest.raises(
        ConfigurationError, match="--price = 'l40s': is of a GPU that is not planned for; there are h100-80gb"
    ):
        with_prices(rows, ["l40s=1"])
    with pytest.raises(
        ConfigurationError, match="--price = 'h100': is not in the table; the nearest: h100-80gb"
    ):
        with_prices(rows, ["h100=1"])


def test_a_name_is_blamed_where_it_stands(job: Job) -> None:
    named = changed(job, cluster={"gpu": "h100"})
    for asked in (
        preview_job,
        lambda job: scale(job, "8..16", None),
        lambda job: fewest_gpus(job, None, 8, None),
        lambda job: compare(job, None),
    ):
        with pytest.raises(
            ConfigurationError, match=r"^cluster.gpu = 'h100': is not in the table; the nearest: h100-80gb"
        ):
            asked(named)
    with pytest.raises(ConfigurationError, match=r"^--gpu = 'h1': "):
        preview_job(named, gpu="h1")


def test_ranks_of_this_machine_are_none_of_gpus_elsewhere(job: Job) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--nproc = 2: .*--gpu h200 of others; .*--set cluster\.gpus_per_node=2"
    ):
        preview_job(job, 2, "h200")
    with pytest.raises(
        ConfigurationError, match=r"--nproc = 2: .*cluster\.gpu h200 of others; .*--set cluster\.gpu=null"
    ):
        preview_job(changed(job, cluster={"gpu": "h200"}), 2)


class ByFormulas(Profiles):
    """In the place of a trace, which needs torch."""

    def find(self, plan: Plan) -> Program:
        formulas = formulas_of(plan, config_of(plan.model) or {})
        assert formulas is not None
        return formulas


def test_a_trace_is_held_to_the_hosts_memory_too(job: Job) -> None:
    asked = changed(job, memory={"offload": "parameters"}, cluster={"mem": "64G", "gpus_per_node": 1})
    made = preview_job(asked, gpu="h100-80gb", compared=ByFormulas())
    assert (
        made.forecast is not None
        and made.traced is not None
        and made.forecast.target.host_memory_bytes == 64 << 30
    )
    assert (made.traced.fits, made.traced.lack) == (
        made.forecast.fits,
        made.forecast.lack,
    ) and not made.traced.fits


@pytest.mark.parametrize("asked", [{}, {"cpus_per_node": 24}, {"mem": "256G"}, {"nodes": "1-4"}])
def test_a_plan_of_a_cluster_is_the_one_that_is_submitted(
    asked: dict[str, Any], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the login node has says nothing of the nodes."""
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(3, 1 << 33)))
    wanted = changed(job, cluster={"gpu": "a100-40gb", "gpus_per_node": 4} | asked)
    shown, submitted = preview_job(wanted).plan, plan_job(wanted, None, local=False)
    assert shown == submitted
    assert shown.mesh.threads_per_rank == asked.get("cpus_per_node", 32) // 4


def test_without_gpus_the_way_to_plan_for_some_is_said(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(2, 1 << 34)))
    with pytest.raises(
        ConfigurationError,
        match=r"0 seen on this machine; write 0 .*`launcher plan --gpu NAME`, or cluster\.gpu",
    ):
        plan_job(changed(job, cluster={"nodes": 2}), None)


def test_gpus_that_nobody_named_are_planned_for_and_it_is_said(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(2, 1 << 34)))
    wanted = changed(job, cluster={"nodes": 2})
    shown = preview_job(wanted)
    assert shown.plan == plan_job(wanted, None, local=False)
    assert "name them: cluster.gpu" in str(shown.plan.blind())
    assert shown.forecast is not None and shown.forecast.target.memory_bytes == 0


def test_of_a_cpu_the_rate_is_its_own_and_hours_are_of_ranks(tmp_path: Path) -> None:
    on_cpu = plan_for(tmp_path, mesh__device="cpu", precision="fp32", batch__micro_batch_size=1)
    for plan in (on_cpu, plan_for(tmp_path, batch__micro_batch_size=1)):
        made = forecast_of(plan, Target(80 << 30, gpu_type("h100-80gb")))
        assert made is not None and made.speed is not None
        lines = speed_lines(made)
        cpu = plan is on_cpu
        assert ("of the processors' measured rate" in lines, "rank-hours" in lines) == (cpu, cpu)
        assert ("of the GPUs' peak (MFU)" in lines, "GPU-hours" in lines) == (not cpu, not cpu)


def test_a_scale_without_a_gpu_asks_for_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(2, 1 << 34)))
    with pytest.raises(ConfigurationError, match="add --gpu"):
        scale(job, "8..16", None)


def test_the_nearest_that_fit_do_fit(tmp_path: Path) -> None:
    plan = plan_for(
        tmp_path,
        data__max_length=8192,
        batch__global_batch_size=1024,
        batch__accumulation_steps=128,
        batch__micro_batch_size=1,
    )
    made = forecast_of(plan, Target(24 << 30, gpu_type("rtx4090")))
    assert made is not None and not made.fits
    found = nearest_that_fit(made)
    assert found and all(other.fits for _, other in found)
    assert "The nearest plans that fit" in nearest(nearest_that_fit(made))
    assert "does NOT fit" in bars(made) and "MFU" in speed_lines(made)
    assert picture(made).startswith("<svg") and "optimizer state" in picture(made)
    drawn = [
        line for line in picture(made).splitlines() if "all there is" in line or "memory of a rank" in line
    ]
    assert "memory of a rank on rtx4090, by phase" in drawn[0] and "24.0 GiB, all there is" in drawn[1]
    small = forecast_of(plan_for(tmp_path, batch__micro_batch_size=1), Target(1 << 50))
    assert small is not None and "enlarged: it has 1048576.0 GiB" in picture(small)
    assert "(the longest bar is " in bars(small) and "█" in bars(small)
    for width in (40, 60, 80):
        lines = folded(bars(made, width), width).splitlines()
        assert all(len(line) <= width for line in lines), lines
        rows = [
            line for line in lines if line.startswith(tuple(f"  {p.name} " for p in made.footprint.phases))
        ]
        assert len(rows) == len(made.footprint.phases) and all(" GiB" in row for row in rows)
    hopeless = forecast_of(plan, Target(1 << 20))
    assert hopeless is not None and "Nothing near it fits" in nearest(nearest_that_fit(hopeless))


def test_why_an_epoch_is_not_known_is_said_in_its_place(tmp_path: Path) -> None:
    kind, plan = gpu_type("h100-80gb"), plan_for(tmp_path, batch__micro_batch_size=1)
    lines = []
    for path in (tmp_path / "none.jsonl", tmp_path / "rows.jsonl"):
        (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n' * 100)
        data = plan.data.model_copy(update={"train": Sources(path=str(path))})
        made = forecast_of(plan.model_copy(update={"data": data}), Target(kind.memory_bytes, kind))
        assert made is not None
        lines.append(
            next(
                line
                for line in speed_lines(made, DatasetSizes.of(made.plan).why_unknown).splitlines()
                if line.startswith("  an epoch ")
            )
        )
        assert (DatasetSizes.of(made.plan).why_unknown is None) is (path.name == "rows.jsonl")
    assert "100 samples of 100 rows" in lines[1]
    assert "is not known: " in lines[0] and "none.jsonl" in lines[0]


def test_scaling_is_drawn(job: Job) -> None:
    drawn = scaling_plots(scale(job, "8..64", "h100-80gb")[0])
    assert "tokens/s over GPUs" in drawn and "GiB of a GPU over GPUs" in drawn
    assert len([line for line in drawn.splitlines() if {"8", "16", "32", "64"} <= set(line.split())]) == 2, (
        drawn
    )
    assert scaling_plots(scale(job, "8..8", "h100-80gb")[0]) == ""


def test_another_micro_batch_keeps_the_global_batch(tmp_path: Path) -> None:
    plan = with_batch(plan_for(tmp_path, batch__micro_batch_size=8, batch__accumulation_steps=2), 4)
    assert (plan.batch.micro_batch_size, plan.batch.accumulation_steps) == (4, 4)


def test_explained_and_not(job: Job) -> None:
    plan = preview_job(job, gpu="h100-80gb").plan
    assert "part of PyTorch" in explained(plan, "parallel.engine")
    with pytest.raises(ConfigurationError, match=r"parallel\.engine"):
        explained(plan, "parallel.engin", job)
    assert explained(plan, "batch.global_batch_size", job).endswith(": the job sets it")
    rate = explained(plan, "training.weight_decay", job)
    assert (
        rate
        == f"training.weight_decay = {job.training.weight_decay}: the default, as the job does not set it"
    )
    with pytest.raises(ConfigurationError, match="there is no such key"):
        explained(plan, "trainings", job)


def test_a_model_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert locate("org/name") == str(snapshot) and locate("org/other") == "org/other"
