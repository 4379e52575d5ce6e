"""Plans for GPUs that are not here: the table, what is chosen, what is compared, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.forecast import advice, bars, picture, speed_lines
from launcher.cli.plan import explained, scaling_plots
from launcher.errors import ConfigurationError
from launcher.job.schema import Job, Source
from launcher.planning.fitting import nearest_that_fit, with_batch
from launcher.planning.forecast import forecast
from launcher.planning.gpus import TABLE, gpu_type, seen
from launcher.planning.hardware import Gpu, Hardware
from launcher.planning.model_config import locate
from launcher.planning.outlook import compare, in_time, look, priced, scaled
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
    return job.model_copy(update={name: getattr(job, name).model_copy(update=values) for name, values in sections.items()})


def test_every_gpu_has_a_source_and_sound_figures() -> None:
    for gpu in TABLE:
        assert gpu.source and gpu.half_rate > gpu.full_rate and gpu.memory_bytes > 20 << 30 and gpu.link >= gpu.network


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
    made = look(job, gpu="h100-80gb")
    assert made.forecast is not None and made.forecast.fits and made.forecast.speed is not None
    batch = made.plan.batch
    assert batch.global_batch_size == batch.micro_batch_size * batch.accumulation_steps * 8 == 64
    assert 0.1 < made.forecast.speed.utilisation < 0.7
    assert made.forecast.to_dict()["speed"]["step_seconds"] == made.forecast.speed.step


def test_less_memory_means_smaller_passes_or_more_recomputation(job: Job) -> None:
    large, small = (look(job, gpu=name).plan for name in ("h200", "a100-40gb"))
    order = ["none", "selective", "full"]
    key = [(order.index(plan.activation_checkpointing), -plan.batch.micro_batch_size) for plan in (large, small)]
    assert key[0] < key[1]


def test_several_gpus_and_several_numbers_of_them(job: Job) -> None:
    rows = compare(job, "h100-80gb,a100-80gb")
    assert [row.gpu for row in rows] == ["h100-80gb", "a100-80gb"]
    assert rows[0].forecast and rows[1].forecast and rows[0].forecast.speed and rows[1].forecast.speed
    assert rows[0].forecast.speed.step < rows[1].forecast.speed.step
    grown = scaled(job, "8..64", "h100-80gb")
    assert [row.plan.mesh.world_size for row in grown] == [8, 16, 32, 64]
    sizes = [row.forecast.footprint.phase("loading").peak for row in grown if row.forecast]
    assert sizes == sorted(sizes, reverse=True)
    assert all(len(row.cells()) == 11 for row in [*rows, *grown]) and rows[0].to_dict()["gpus"] == 8


@pytest.mark.parametrize(
    ("span", "gpu", "network", "text"),
    [
        ("eight", "h100-80gb", None, "write 8..1024"),
        ("8..4", "h100-80gb", None, "write 8..1024"),
        ("128..256", "h100-80gb", None, "the most is 64 GPUs"),
        ("8..16", "h100-80gb", "carrier-pigeon", "there are ib400"),
    ],
)
def test_spans_and_networks_that_are_none(job: Job, span: str, gpu: str, network: str | None, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        scaled(job, span, gpu, network)


def test_the_fewest_gpus_that_end_in_time_and_what_they_cost(job: Job) -> None:
    slow = in_time(job, "30d", 64, "h100-80gb")[0]
    assert slow.hours is not None
    [fast] = in_time(job, f"{slow.hours * 3600 / 3:.0f}s", 64, "h100-80gb")
    assert fast.hours is not None and fast.plan.mesh.world_size > slow.plan.mesh.world_size and fast.hours <= slow.hours / 3
    [row] = priced([fast], ["h100-80gb=2.5"])
    assert row.cost == pytest.approx(2.5 * fast.hours * fast.plan.mesh.world_size)


@pytest.mark.parametrize(
    ("deadline", "changes", "text"),
    [
        ("soon", {}, "write 90min, 24h or 2d"),
        ("1s", {}, "the nearest is .* h on 64 x h100-80gb"),
        ("24h", {"training": {"max_steps": None, "epochs": 1.0}}, "needs training.max_steps"),
        ("24h", {"data": {"max_length": 10_000_000}}, "nothing fits on so few"),
    ],
)
def test_deadlines_that_cannot_be_kept(job: Job, deadline: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        in_time(changed(job, **changes), deadline, 64, "h100-80gb")


def test_a_deadline_of_epochs_whose_data_are_here(job: Job, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words"}\n' * 64_000)
    epochs = changed(job, training={"max_steps": None, "epochs": 1.0}, data={"train": Source(path=str(rows))})
    [row] = in_time(epochs, "24h", 64, "h100-80gb")
    assert row.hours is not None and row.forecast is not None and row.forecast.duration is not None
    assert row.forecast.duration.num_steps == 1000 and 0 < row.hours < 24


def test_prices_that_are_none(job: Job) -> None:
    with pytest.raises(ConfigurationError, match="write NAME=AMOUNT"):
        priced([], ["h100-80gb"])


def test_a_scale_without_a_gpu_asks_for_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(2, 1 << 34)))
    with pytest.raises(ConfigurationError, match="add --gpu"):
        scaled(job, "8..16", None)


def test_the_nearest_that_fit_do_fit(tmp_path: Path) -> None:
    plan = plan_for(
        tmp_path, data__max_length=8192, batch__global_batch_size=1024, batch__accumulation_steps=128, batch__micro_batch_size=1
    )
    made = forecast(plan, 24 << 30, gpu_type("rtx4090"))
    assert made is not None and not made.fits
    found = nearest_that_fit(made, gpu_type("rtx4090"))
    assert found and all(other.fits for _, other in found)
    assert "The nearest plans that fit" in advice(made)
    assert "does NOT fit" in bars(made) and "MFU" in speed_lines(made)
    assert picture(made).startswith("<svg") and "optimizer state" in picture(made)
    hopeless = forecast(plan, 1 << 20)
    assert hopeless is not None and "Nothing near it fits" in advice(hopeless)


def test_scaling_is_drawn(job: Job) -> None:
    drawn = scaling_plots(scaled(job, "8..64", "h100-80gb"))
    assert "tokens/s over GPUs" in drawn and "GiB of a GPU over GPUs" in drawn
    assert len([line for line in drawn.splitlines() if {"8", "16", "32", "64"} <= set(line.split())]) == 2, drawn
    assert scaling_plots(scaled(job, "8..8", "h100-80gb")) == ""


def test_another_micro_batch_keeps_the_global_batch(tmp_path: Path) -> None:
    plan = with_batch(plan_for(tmp_path, batch__micro_batch_size=8, batch__accumulation_steps=2), 4)
    assert (plan.batch.micro_batch_size, plan.batch.accumulation_steps) == (4, 4)


def test_explained_and_not(job: Job) -> None:
    plan = look(job, gpu="h100-80gb").plan
    assert "part of PyTorch" in explained(plan, "parallel.engine")
    with pytest.raises(ConfigurationError, match=r"parallel\.engine"):
        explained(plan, "parallel.engin")


def test_a_model_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert locate("org/name") == str(snapshot) and locate("org/other") == "org/other"
