"""Each rendered file is accepted by its owner: DeepSpeed's parser, Accelerate's loader and launcher, sbatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.planner.plan import Plan
from launcher.render import accelerate, deepspeed, presets
from launcher.render.files import files, json_text, yaml_text
from launcher.render.launch_paths import Place
from launcher.render.write import write
from tests.ports import free_port
from tests.unit.test_render import CASES, plan_of

ZERO = sorted(case for case in CASES if case.startswith("zero"))
PRESETS = Path(__file__).parents[2] / "ds_configs"


def parsed_by_deepspeed(path: Path, world_size: int) -> Any:
    config = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is not installed")
    fake = SimpleNamespace(get_data_parallel_world_size=lambda: world_size)
    # Outside of a process group DeepSpeed takes one rank for the world, and asserts the batch by it.
    original = config.dist.get_rank
    config.dist.get_rank = lambda: 0
    try:
        return config.DeepSpeedConfig(str(path), mpu=fake)
    finally:
        config.dist.get_rank = original


@pytest.mark.parametrize("case", ZERO)
def test_deepspeed_reads_what_the_plan_says(case: str, tmp_path: Path) -> None:
    plan = plan_of(CASES[case])
    path = tmp_path / "ds_config.json"
    path.write_text(json_text(deepspeed.config(plan)))
    read = parsed_by_deepspeed(path, plan.mesh.world_size)
    assert plan.zero is not None
    assert read.train_batch_size == plan.batch.global_batch_size
    assert read.gradient_accumulation_steps == plan.batch.accumulation_steps
    assert read.gradient_clipping == plan.training.clip_norm
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (
        plan.precision == "bf16",
        plan.precision == "fp16",
    )
    zero = read.zero_config
    assert zero.stage == plan.zero.stage
    assert zero.reduce_bucket_size == plan.zero.reduce_bucket_size
    assert zero.overlap_comm == (plan.mesh.device == "cuda")
    if plan.zero.stage == 3:
        assert zero.prefetch_bucket_size == plan.zero.prefetch_bucket_size
        assert zero.param_persistence_threshold == plan.zero.persistence_threshold
        assert zero.max_live_parameters == plan.zero.max_live_parameters
        assert zero.sub_group_size == plan.zero.sub_group_size
    device = "none" if plan.offload == "none" else "cpu" if plan.offload_to == "cpu" else "nvme"
    assert device == (
        getattr(zero.offload_optimizer.device, "value", zero.offload_optimizer.device)
        if zero.offload_optimizer
        else "none"
    )
    if device == "nvme":
        assert str(zero.offload_param.nvme_path) == plan.offload_to


@pytest.mark.parametrize("case", ZERO)
def test_deepspeed_knows_every_key(case: str) -> None:
    """Its sections forbid unknown keys, its top level does not."""
    constants = pytest.importorskip("deepspeed.runtime.constants", reason="DeepSpeed is not installed")
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    known |= {"zero_optimization", "bf16", "fp16", "aio", "wall_clock_breakdown", "gradient_clipping"}
    assert deepspeed.config(plan_of(CASES[case])).keys() <= known


@pytest.mark.parametrize("name", sorted(name for name in presets.JOBS if name.endswith(".json")))
def test_deepspeed_reads_every_preset(name: str) -> None:
    plan = presets.plan(presets.JOBS[name])
    read = parsed_by_deepspeed(PRESETS / name, plan.mesh.world_size)
    assert plan.zero is not None
    assert (read.zero_config.stage, read.zero_config.zero_hpz_partition_size) == (
        plan.zero.stage,
        plan.zero.secondary_shard,
    )
    assert read.zero_config.zero_quantized_weights == plan.zero.quantized_weights


def loaded_by_accelerate(path: Path) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(str(path))


@pytest.mark.parametrize("case", sorted(CASES))
def test_accelerate_loads_every_file(case: str, tmp_path: Path) -> None:
    plan = plan_of(CASES[case])
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml_text(accelerate.config(plan)))
    loaded = loaded_by_accelerate(path)
    assert loaded.num_processes == plan.mesh.world_size
    assert loaded.num_machines == plan.mesh.nodes
    assert loaded.distributed_type.value == accelerate.distributed_type(plan)
    assert loaded.use_cpu == (plan.mesh.device == "cpu")


@pytest.mark.parametrize("name", sorted(name for name in presets.JOBS if name.endswith(".yaml")))
def test_accelerate_loads_every_preset(name: str) -> None:
    assert (
        loaded_by_accelerate(PRESETS / name).num_processes == presets.plan(presets.JOBS[name]).mesh.world_size
    )


def environment_of(path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` would give the ranks."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch.launch_command_parser().parse_args(
        ["--config_file", str(path), "--main_process_ip", "127.0.0.1", "train.py"]
    )
    arguments, _, mp = launch._validate_launch_command(arguments)
    arguments.main_process_port = free_port()
    if plan.engine == "deepspeed":
        arguments.deepspeed_fields_from_accelerate_config = "deepspeed_config_file" + (
            ",mixed_precision" if mp else ""
        )
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(
    "case",
    sorted(
        case for case in CASES if case.startswith("fsdp-") and case not in ("fsdp-cpu", "fsdp-none-compile")
    ),
)
def test_accelerates_own_plugin_takes_the_fsdp_files(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

    plan = plan_of(CASES[case])
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml_text(accelerate.config(plan)))
    for name, value in environment_of(path, plan, monkeypatch).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward == plan.mesh.reshard_after_forward
    assert type(plugin.cpu_offload).__name__ == (
        "CPUOffloadPolicy" if plan.offload == "parameters" else "OffloadPolicy"
    )
    assert plugin.activation_checkpointing
    if plan.mesh.dp_replicate > 1:
        sizes = ParallelismConfig()
        assert (sizes.dp_replicate_size, sizes.dp_shard_size, sizes.total_size) == (
            plan.mesh.dp_replicate,
            plan.mesh.dp_shard,
            plan.mesh.world_size,
        )


@pytest.mark.parametrize("case", ZERO)
def test_accelerates_own_plugin_takes_the_deepspeed_files(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from accelerate.utils import DeepSpeedPlugin

    plan = plan_of(CASES[case])
    place = Place(str(tmp_path / "run"), str(tmp_path / "a 'rendered' one"))
    write(Path(place.rendered), files(plan, place))
    for name, value in environment_of(Path(place.rendered) / "accelerate.yaml", plan, monkeypatch).items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plan.zero is not None
    assert plugin.zero_stage == plan.zero.stage
    assert plugin.zero3_init_flag == (plan.zero.stage == 3)
    assert plugin.gradient_accumulation_steps == plan.batch.accumulation_steps
    assert plugin.deepspeed_config["train_batch_size"] == plan.batch.global_batch_size
    plugin.deepspeed_config_process(must_match=True, gradient_clipping=plan.training.clip_norm)


@pytest.mark.slow
@pytest.mark.very_slow
def test_accelerates_own_test_script_runs_on_two_cpu_ranks(tmp_path: Path) -> None:
    plan = plan_of({**CASES["fsdp-cpu"], "precision": "fp32", "cluster.threads_per_rank": 1})
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml_text(accelerate.config(plan)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--config_file", str(path)]
    command += ["--main_process_port", str(free_port()), "-m", "accelerate.test_utils.scripts.test_script"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Num processes: 2" in done.stdout


def test_json_has_no_number_that_only_python_reads() -> None:
    for case in ZERO:
        json.loads(
            json_text(deepspeed.config(plan_of(CASES[case]))), parse_constant=lambda name: pytest.fail(name)
        )
