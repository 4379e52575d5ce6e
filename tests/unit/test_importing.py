"""Foreign files become jobs: equal in meaning where that can be, and with a word about every key where it
cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.importing import foreign_files
from launcher.importing.compare import compare, differences
from launcher.importing.job import Imported, import_files
from launcher.importing.merge import MODEL, merge
from launcher.job.load import validate
from launcher.job.schema import Job
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job as decide
from launcher.render import accelerate, deepspeed, presets
from launcher.render.files import json_text, yaml_text

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "tests" / "data" / "accelerate"
HARDWARE = Hardware(64, 1 << 40)

CHOSEN = (
    "zero.reduce_",
    "zero.allgather_",
    "zero.prefetch_",
    "zero.persistence_",
    "zero.max_live_",
    "zero.sub_group_",
)
"""Sizes: chosen from the model, which no file names."""
HANDED_OVER = (
    "training.optimizer",
    "training.schedule",
    "training.learning_rate",
    "training.weight_decay",
    "training.warmup",
)
"""No rendered file has an optimizer; these stand in the job."""
FILLED_IN = {"examples/slurm/fsdp_config.yaml": {"gpus_per_node": 8}}
"""What the import says is to be filled in: this file leaves the number of GPUs to the command line."""
MAY_DIFFER: dict[str, dict[str, str]] = {
    "tests/deepspeed/ds_config_zero3_model_only.json": {
        "mesh.world_size": "one rank is assumed where no file says how many"
    }
}
TENSOR_PARALLEL = SHIPPED / "examples/torch_native_parallelism/configs/tp_hsdp.yaml"
"""2 copies x 2 shards x 2 tensor-parallel ranks: that third axis is one launcher lacks."""
ENGINES = [
    path
    for path in sorted(SHIPPED.rglob("*"))
    if path.suffix in (".json", ".yaml", ".yml")
    and any(word in str(path.relative_to(SHIPPED)) for word in ("deepspeed", "fsdp", "alst", "native"))
    and path != TENSOR_PARALLEL
]


def imported(path: Path) -> Imported:
    return import_files([path])


def job_of(made: Imported, **cluster: Any) -> Job:
    content = {**made.content, "trackers": [], "data": {**made.content["data"], "text": "text"}}
    content["cluster"] = {**content.get("cluster", {}), **cluster}
    job, problems = validate(content)
    assert problems == []
    assert job is not None
    return job


def meaning(plan: Plan, kind: str) -> dict[str, Any]:
    """What the rendered file of one kind says."""
    content = deepspeed.config(plan) if kind == "deepspeed" else accelerate.config(plan)
    return merge([foreign_files.read_content(content, "rendered")]).values()


def said_by(path: Path) -> dict[str, Any]:
    reading = foreign_files.read(path)
    return merge([reading]).values()


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "ds_configs").glob("*.[jy]*")), *ENGINES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_it_comes_out_equal_in_meaning(path: Path) -> None:
    name = str(path.relative_to(SHIPPED)) if path.is_relative_to(SHIPPED) else ""
    plan = decide(job_of(imported(path), **FILLED_IN.get(name, {})), hardware=HARDWARE, local=False)
    kind = "deepspeed" if path.suffix == ".json" else "accelerate"
    said, again = said_by(path), meaning(plan, kind)
    allowed = dict(MAY_DIFFER.get(name, {}))
    if {"batch.global_batch_size", "batch.micro_batch_size"}.isdisjoint(said):
        allowed["batch.accumulation_steps"] = (
            "batch and passes are `auto`: nothing says of what these are the steps, and the import says so"
        )
    different = {
        found.key: (found.a, found.b)
        for found in differences(said, again)
        if found.key in said
        and not found.key.startswith((*CHOSEN, *HANDED_OVER))
        and found.key not in allowed
    }
    assert different == {}
    assert said["engine"] == plan.engine and said.get("sharding", plan.sharding) == plan.sharding


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_a_preset_comes_back_byte_for_byte_but_for_its_sizes(path: Path) -> None:
    """With the sizes of the example model put back in, and its 16 GPUs on 2 nodes, it is the very file."""
    plan = decide(job_of(imported(path)), hardware=HARDWARE, local=False)
    assert plan.zero is not None
    example = presets.plan(presets.JOBS[path.name])
    sized = plan.model_copy(update={"zero": example.zero})
    assert json_text(deepspeed.config(sized)) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("fsdp*.yaml")), ids=lambda path: path.name)
def test_an_fsdp_preset_comes_back_byte_for_byte(path: Path) -> None:
    plan = decide(job_of(imported(path)), hardware=HARDWARE, local=False)
    assert yaml_text(accelerate.config(plan)) == path.read_text(encoding="utf-8")


def test_tensor_parallelism_is_said_to_be_lacking() -> None:
    made = imported(TENSOR_PARALLEL)
    assert any(
        remark.kind == "cannot be said" and "tensor parallelism" in remark.text for remark in made.remarks
    )
    assert made.content["parallel"]["replicate"] == 2


@pytest.mark.parametrize(
    "path",
    sorted(path for path in SHIPPED.rglob("*.*") if path.name != "README.md"),
    ids=lambda path: path.name,
)
def test_everything_that_accelerate_ships_is_read_or_refused_in_a_line(path: Path) -> None:
    try:
        made = imported(path)
    except ConfigurationError as error:
        assert path.name == "0_30_0_sagemaker.yaml"
        assert "debug is written twice" in str(error)
    else:
        assert made.content["model"]["name"] == MODEL


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def kinds(made: Imported) -> dict[str, str]:
    return {remark.said: remark.kind for remark in made.remarks}


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 1}, {"shard": "optimizer"}),
        (
            {"stage": 2, "cpu_offload": True},
            {"shard": "gradients", "offload": "optimizer", "offload_to": "cpu"},
        ),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, {"shard": "full", "offload": "parameters"}),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {"shard": "gradients", "offload": "none"}),
        (
            {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"},
                "offload_param": {"device": "none"},
            },
            {"offload": "optimizer", "offload_to": "/disk"},
        ),
        (
            {"stage": 3, "zero_hpz_partition_size": 8, "zero_quantized_weights": True},
            {"secondary_shard": 8, "quantized_weights": True},
        ),
        ({"stage": 0}, {"shard": "none"}),
        ({"stage": "3"}, {"shard": "full"}),
    ],
)
def test_stages_and_offload(zero: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    made = imported(write(tmp_path, "ds.json", {"zero_optimization": zero}))
    found = {**made.content["parallel"], **made.content["memory"]}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("fsdp", "shard", "replicate"),
    [
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, "full", None),
        ({"fsdp_sharding_strategy": 1}, "full", None),
        ({"fsdp_sharding_strategy": "2"}, "gradients", None),
        ({"fsdp_sharding_strategy": 3}, "none", None),
        ({"fsdp_sharding_strategy": 4}, "full", 2),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2"}, "gradients", 2),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, "gradients", None),
        ({"fsdp_version": 2}, "full", None),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, "gradients", None),
        (
            {"fsdp_version": 2, "fsdp_reshard_after_forward": "true", "fsdp_sharding_strategy": 3},
            "full",
            None,
        ),
        ({"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, "gradients", None),
        ({}, "full", None),
    ],
)
def test_words_of_fsdp(fsdp: dict[str, Any], shard: str, replicate: int | None, tmp_path: Path) -> None:
    content = {"distributed_type": "FSDP", "num_machines": 2, "num_processes": 8, "fsdp_config": fsdp}
    made = imported(write(tmp_path, "a.yaml", yaml.safe_dump(content)))
    assert made.content["parallel"]["shard"] == shard
    assert made.content["parallel"].get("replicate") == replicate
    assert made.content["cluster"] == {"nodes": 2, "gpus_per_node": 4}


TRAINER = {
    "output_dir": "out",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-05,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.5,
    "bf16": True,
    "fp16": False,
    "gradient_checkpointing": True,
    "seed": 42,
    "optim": "adamw_torch_fused",
    "save_strategy": "epoch",
    "save_total_limit": 3,
    "report_to": ["wandb"],
    "fsdp": "hybrid_shard auto_wrap offload",
    "hub_token": "hf_abcdefghij0123456789",
    "logging_steps": 10,
    "label_smoothing_factor": 0.1,
    "dataset_name": "org/data",
    "max_seq_length": 512,
}


def test_training_arguments(tmp_path: Path) -> None:
    made = imported(write(tmp_path, "args.json", TRAINER))
    assert made.content["training"] == {
        "learning_rate": 5e-05, "weight_decay": 0.01, "clip_norm": 0.5, "seed": 42, "epochs": 3.0,
        "warmup": 0.1, "schedule": "cosine",
        "optimizer": "adamw", "betas": [0.9, 0.95],
    }  # fmt: skip
    assert made.content["batch"] == {"micro_batch_size": 4, "global_batch_size": 32}
    assert made.content["memory"] == {"activation_checkpointing": "full", "offload": "parameters"} | {
        key: value for key, value in made.content["memory"].items() if key == "offload_to"
    }
    assert made.content["precision"] == "bf16"
    assert made.content["checkpoint"] == {"keep_last": 3, "every": "epoch"}
    assert made.content["data"] == {"train": {"name": "org/data"}, "max_length": 512}
    assert kinds(made)["label_smoothing_factor"] == "cannot be said"
    assert "hf_abc" not in made.text + repr(made.remarks)


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ({"max_steps": 100, "num_train_epochs": 3}, "max_steps", 100),
        ({"warmup_steps": 50, "warmup_ratio": 0.1}, "warmup", 50),
        ({"warmup_steps": 0.06}, "warmup", 0.06),
        ({"lr_scheduler_type": "SchedulerType.INVERSE_SQRT", "warmup_steps": 10}, "schedule", "inverse-sqrt"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "schedule", "inverse-sqrt"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "schedule", "constant"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "schedule", "cosine"),
        ({"optim": "lion_8bit"}, "optimizer", "adamw"),
        ({"optim": "paged_adamw_8bit"}, "optimizer", "adamw"),
        ({"optim": "paged_adamw_8bit"}, "moments", "8bit"),
        ({"optim": "OptimizerNames.ADAMW_TORCH_8BIT"}, "moments", "8bit"),
        ({"optim": "sgd"}, "optimizer", "sgd"),
        ({"adafactor": True}, "optimizer", "adafactor"),
    ],
)
def test_names_and_precedence_of_the_trainer(
    arguments: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    made = imported(write(tmp_path, "args.json", {"output_dir": "a", **arguments}))
    assert made.content["training"][key] == value


@pytest.mark.parametrize(("name", "of_embeddings"), [("adamw_bnb_8bit", True), ("adamw_torch_8bit", False)])
def test_moments_in_8_bits_are_taken_over_with_what_differs(
    name: str, of_embeddings: bool, tmp_path: Path
) -> None:
    made = imported(write(tmp_path, "args.json", {"output_dir": "a", "optim": name}))
    assert (made.content["training"]["optimizer"], made.content["training"]["moments"]) == ("adamw", "8bit")
    told = next(remark for remark in made.remarks if remark.said == "optim")
    assert told.kind == "changes meaning" and "blocks of 256 end with a row" in told.text
    assert ("embeddings in fp32 with bitsandbytes" in told.text) == of_embeddings
    job_of(made)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ds.json", {"zero_optimization": {"stage": 2}}),
        (
            "fsdp.yaml",
            {
                "distributed_type": "FSDP",
                "num_processes": 4,
                "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
            },
        ),
    ],
    ids=["deepspeed", "offloading"],
)
def test_moments_in_8_bits_stay_in_fp32_where_the_engine_has_none(
    name: str, content: dict[str, Any], tmp_path: Path
) -> None:
    arguments = write(tmp_path, "args.json", {"output_dir": "a", "optim": "adamw_bnb_8bit"})
    made = import_files([arguments, write(tmp_path, name, content)])
    assert made.content["training"]["optimizer"] == "adamw" and "moments" not in made.content["training"]
    told = [(remark.kind, remark.text) for remark in made.remarks if remark.said == "optim"]
    assert any(kind == "cannot be said" and "under FSDP alone" in text for kind, text in told)
    job_of(made)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "Adam", "params": {"lr": 1e-4}}, {"optimizer": "adamw", "learning_rate": 1e-4}),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, {"optimizer": "adam", "learning_rate": 0.001}),
        (
            {"type": "OneBitAdam", "params": {"betas": [0.8, 0.99], "eps": 1e-6}},
            {"optimizer": "adamw", "betas": [0.8, 0.99], "epsilon": 1e-6, "learning_rate": 0.001},
        ),
    ],
)
def test_deepspeeds_optimizers(optimizer: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}}
    made = imported(
        write(tmp_path, "ds.json", {"train_batch_size": 8, "optimizer": optimizer, "scheduler": scheduler})
    )
    assert made.content["training"] == {**expected, "schedule": "linear", "warmup": 10, "max_steps": 100}


def test_a_conflict_names_both_values_and_the_reason(tmp_path: Path) -> None:
    ds = write(
        tmp_path,
        "ds.json",
        {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "bf16": {"enabled": True}},
    )
    args = write(tmp_path, "args.json", {"output_dir": "a", "max_grad_norm": 0.5, "fp16": True})
    made = import_files([args, ds])
    assert made.content["training"]["clip_norm"] == 1.0
    assert made.content["precision"] == "bf16"
    conflict = next(remark for remark in made.remarks if remark.said == "max_grad_norm")
    assert (conflict.kind, conflict.value) == ("conflict", 0.5)
    assert "1.0" in conflict.text and "gradient_clipping" in conflict.text and "its own file" in conflict.text


def test_what_belongs_to_the_engine_that_lost_is_left_out(tmp_path: Path) -> None:
    ds = write(tmp_path, "ds.json", {"zero_optimization": {"stage": 2}})
    made = import_files([ROOT / "ds_configs" / "fsdp2-hybrid.yaml", ds])
    assert made.content["parallel"] == {"engine": "deepspeed", "shard": "gradients"}
    job_of(made)


def test_a_file_that_a_file_names_is_read_too_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        "ds.json",
        {
            "zero_optimization": {"stage": 1},
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
        },
    )
    content = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 4,
        "deepspeed_config": {"deepspeed_config_file": "ds.json", "zero_stage": 3},
    }
    path = write(tmp_path, "a.yaml", yaml.safe_dump(content))
    made = import_files([path])
    assert made.content["parallel"]["shard"] == "optimizer"
    assert made.content["batch"] == {"micro_batch_size": 2, "global_batch_size": 16}
    assert kinds(made)["deepspeed_config.zero_stage"] == "ignored"
    (tmp_path / "ds.json").unlink()
    assert any(
        remark.kind == "fill in" and remark.value == "ds.json" for remark in import_files([path]).remarks
    )


def test_deepspeed_without_a_file(tmp_path: Path) -> None:
    section = {
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "none",
        "gradient_accumulation_steps": 2,
    }
    content = {
        "distributed_type": "DEEPSPEED",
        "num_processes": 4,
        "mixed_precision": "bf16",
        "deepspeed_config": section,
    }
    made = imported(write(tmp_path, "a.yaml", yaml.safe_dump(content)))
    assert made.content["parallel"] == {"engine": "deepspeed", "shard": "full"}
    assert made.content["memory"] == {"offload": "optimizer", "offload_to": "cpu"}
    assert made.content["precision"] == "bf16"


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            {"gpus_per_node": 8},
        ),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, {}),
    ],
)
def test_ranks_follow_from_the_batch(batch: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    made = imported(write(tmp_path, "ds.json", batch))
    assert made.content.get("cluster", {}) == expected
    assert made.content["batch"]["global_batch_size"] == batch.get("train_batch_size", 8)


def test_a_batch_that_contradicts_the_ranks_is_a_conflict(tmp_path: Path) -> None:
    ds = write(
        tmp_path,
        "ds.json",
        {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4},
    )
    with pytest.raises(ConfigurationError, match="no multiple"):
        import_files([ds])
    made = import_files([ds], ["torchrun", "--nproc_per_node=8", "t.py"])
    assert made.content["batch"] == {"global_batch_size": 64}
    assert kinds(made)["train_batch_size"] == "conflict"


COMMANDS = [
    (
        "accelerate launch --use_fsdp --fsdp_version=2 --num_processes 8 --mixed_precision bf16 "
        "train.py --learning_rate 3e-5",
        {
            "parallel": {"engine": "fsdp", "shard": "full"},
            "precision": "bf16",
            "training": {"learning_rate": 3e-5},
        },
    ),
    (
        "CUDA_VISIBLE_DEVICES=0 torchrun --nnodes 2 --nproc_per_node 4 -m pkg.train --bf16 True "
        "--warmup_steps 10",
        {"cluster": {"nodes": 2, "gpus_per_node": 4}, "precision": "bf16", "training": {"warmup": 10}},
    ),
    (
        "srun python3.11 -m torch.distributed.run --nproc-per-node=2 t.py --max-steps=5",
        {"cluster": {"gpus_per_node": 2}, "training": {"max_steps": 5}},
    ),
    (
        "deepspeed --num_gpus 4 t.py --gradient_checkpointing --seed 3",
        {"cluster": {"gpus_per_node": 4}, "training": {"seed": 3}},
    ),
    (
        "python t.py --report_to wandb tensorboard --run_name 'a b'",
        {"trackers": ["wandb", "tensorboard"], "name": "a-b"},
    ),
    (
        "python t.py --report_to trackio --project mine --wandb_project other",
        {"trackers": ["trackio"], "tracking": {"project": "mine"}},
    ),
    (
        "python t.py --report_to wandb --project mine --wandb_project other",
        {"trackers": ["wandb"], "tracking": {"project": "other"}},
    ),
    (
        "accelerate launch --cpu --num_processes 2 t.py",
        {"cluster": {"gpus_per_node": 0, "ranks_per_node": 2}},
    ),
    (
        "accelerate launch --use_deepspeed --zero_stage 3 --offload_param_device cpu t.py",
        {"parallel": {"engine": "deepspeed", "shard": "full"}},
    ),
    (
        "torchrun --nnodes=1:4 --nproc_per_node=gpu t.py --fsdp 'shard_grad_op auto_wrap'",
        {"parallel": {"engine": "fsdp", "shard": "gradients"}},
    ),
]


@pytest.mark.parametrize(
    ("line", "expected"),
    COMMANDS,
    ids=[line.split()[0] + str(index) for index, (line, _) in enumerate(COMMANDS)],
)
def test_command_lines(line: str, expected: dict[str, Any], tmp_path: Path) -> None:
    continued = line.replace(" --", " \\\n  --", 1)
    script = f"#!/bin/bash\n# a comment\nexport A='1'\necho start\n{continued}\n"
    made = imported(write(tmp_path, "train.sh", script))
    assert {key: made.content[key] for key in expected} == expected


def test_nothing_of_a_script_is_executed_or_filled_in(tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    made = imported(
        write(
            tmp_path,
            "t.sh",
            f"python t.py --learning_rate $LR --seed $(touch {marker}) --run_name `touch {marker}`\n",
        )
    )
    assert not marker.exists()
    assert {remark.said for remark in made.remarks if remark.kind == "fill in"} >= {"--learning_rate"}


BAD: list[tuple[str, Any, str]] = [
    ("a.json", "", "is empty"),
    ("a.json", "{", "not JSON"),
    ("a.json", "[1, 2]", "no mapping"),
    ("a.json", '{"a": 1}', "of another kind"),
    ("a.yaml", "- a\n- b\n", "no mapping"),
    ("a.yaml", "a: [", "line"),
    ("a.yaml", "!!python/object/apply:os.system ['true']", "could not determine"),
    ("a.json", '{"train_batch_size": ' + "9" * 5000 + "}", "not JSON"),
    ("a.json", '{"train_batch_size": 1e999}', "at most"),
    ("a.json", {"train_batch_size": "many"}, "train_batch_size = 'many'"),
    ("a.json", {"train_batch_size": True}, "write a number"),
    ("a.json", {"train_batch_size": 2.5}, "whole number"),
    ("a.json", {"train_batch_size": -4}, "at least 1"),
    ("a.json", {"zero_optimization": 3}, "a section"),
    ("a.json", {"zero_optimization": {"stage": 4}}, "the nearest is 3"),
    ("a.json", {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "none, cpu or nvme"),
    ("a.json", {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path"),
    (
        "a.json",
        {"train_batch_size": 8, "bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "computes in one",
    ),
    ("a.json", {"train_batch_size": 8, "bf16": {"enabled": "perhaps"}}, "true or false"),
    (
        "a.json",
        {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
        "two numbers",
    ),
    ("a.json", {"train_batch_size": 8, "optimizer": {"type": ["Adam"]}}, "where a word stands"),
    ("a.json", {"output_dir": "a", "learning_rate": 0}, "learning_rate"),
    ("a.json", {"output_dir": "a", "warmup_ratio": 3}, "below 1"),
    ("a.json", {"output_dir": "a", "fsdp": "everything"}, "full_shard"),
    ("a.json", {"output_dir": "a", "bf16": True, "fp16": True}, "computes in one"),
    ("a.yaml", "distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: SOME}\n", "HYBRID_SHARD"),
    ("a.yaml", "distributed_type: FSDP\nfsdp_config: {fsdp_version: 3}\n", "1 or 2"),
    ("a.yaml", "distributed_type: FSDP\nmixed_precision: fp12\n", "no, fp16 or bf16"),
    ("a.yaml", "distributed_type: FSDP\nnum_machines: 3\nnum_processes: 8\n", "does not divide over 3"),
    ("a.sh", "echo hello\n", "no line here starts a training"),
    ("a.sh", "python train.py --a 'unfinished\n", "cannot be split"),
    ("a.json", {"name": "a", "model": {}, "data": {}}, "launcher's own job"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD, ids=[str(index) for index in range(len(BAD))])
def test_bad_input_is_one_clear_line(name: str, content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        import_files([write(tmp_path, name, content)])
    assert said in str(caught.value)


def test_every_problem_at_once(tmp_path: Path) -> None:
    one = write(
        tmp_path,
        "ds.json",
        {"train_batch_size": "x", "gradient_clipping": [], "zero_optimization": {"stage": 9}},
    )
    two = write(tmp_path, "a.yaml", "distributed_type: FSDP\nnum_processes: none\n")
    with pytest.raises(ConfigurationError) as caught:
        import_files([one, two, tmp_path / "missing.json"])
    said = str(caught.value)
    assert all(
        word in said
        for word in ("train_batch_size", "gradient_clipping", "stage", "num_processes", "missing.json")
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    (tmp_path / "large.json").write_bytes(b" " * ((4 << 20) + 1))
    for path, said in (
        (tmp_path, "a directory"),
        (tmp_path / "bytes.json", "UTF-8"),
        (tmp_path / "large.json", "4 MiB"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            import_files([path])
    with pytest.raises(ConfigurationError, match="is missing"):
        import_files([])


def test_deep_nesting_and_aliases_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        import_files([write(tmp_path, "deep.json", "[" * 100_000)])
    lines = [
        "a0: &a0 [1, 1]",
        *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)),
        "distributed_type: FSDP",
        "fp: *a39",
    ]
    with pytest.raises(ConfigurationError, match=r"bomb.yaml.*line 13, column 6: more than 10,000 values"):
        import_files([write(tmp_path, "bomb.yaml", "\n".join(lines))])


KEYS = st.sampled_from(
    ["zero_optimization", "stage", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "gradient_clipping",
     "bf16", "fp16", "enabled", "optimizer", "params", "type", "lr", "betas", "scheduler", "offload_param",
     "offload_optimizer", "device",
     "nvme_path", "cpu_offload", "distributed_type", "fsdp_config", "fsdp_sharding_strategy", "fsdp_version",
     "deepspeed_config",
     "num_machines", "num_processes", "mixed_precision", "parallelism_config", "dynamo_config", "output_dir",
     "learning_rate", "max_steps",
     "num_train_epochs", "warmup_steps", "fsdp", "deepspeed", "report_to", "save_strategy", "save_steps",
     "lr_scheduler_type", "optim",
     "adam_beta1", "seed", "model_name_or_path", "zero_hpz_partition_size", "reduce_bucket_size", "use_cpu",
     "compute_environment"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "nvme", "cpu", "FSDP", "DEEPSPEED", "3", "-1", "1e9"]),
)
CONTENT = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    ),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONTENT)
def test_no_content_ends_in_a_traceback(content: dict[str, Any]) -> None:
    try:
        merge([foreign_files.read_content(content, "fuzz.json")])
    except ConfigurationError as error:
        assert str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=CONTENT)
def test_a_job_is_made_or_every_reason_is_given(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"), "ds.json", content)
    try:
        made = import_files([path])
    except ConfigurationError as error:
        assert str(error)
    else:
        assert yaml.safe_load(made.text) == made.content


def test_plans_jobs_and_configurations_are_compared_in_one_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero2, zero3 = ROOT / "ds_configs" / "zero2.json", ROOT / "ds_configs" / "zero3.json"
    assert {difference.key: (difference.a, difference.b) for difference in compare(zero2, zero3).differences}[
        "sharding"
    ] == ("gradients", "full")
    plan = presets.plan(presets.JOBS["zero2.json"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.json").write_text(plan.to_json())
    assert compare(folder, zero2).differences == []
    other = tmp_path / "other.json"
    other.write_text(presets.plan(presets.JOBS["fsdp2-full.yaml"]).to_json())
    assert compare(other, ROOT / "ds_configs" / "fsdp2-full.yaml").differences == []
    both = {difference.key for difference in compare(folder, other).differences}
    assert {"engine", "sharding", "zero.stage"} <= both
    assert compare(folder / "plan.json", folder).differences == []
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "runs" / "named")
    assert compare(Path("named"), folder).differences == [], "a run by its name, as every command takes it"


def test_a_job_file_is_planned_and_compared(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    text = (
        "name: a\nmodel: {name: org/m}\ndata: {train: {path: train.txt}, text: text}\ncluster: "
        "{gpus_per_node: 8}\ntrackers: []\n"
    )
    one = write(tmp_path, "a.yaml", text)
    two = write(tmp_path, "b.yaml", text + "training: {learning_rate: 1.0e-3}\n")
    assert [(found.key, found.b) for found in compare(one, two).differences] == [
        ("training.learning_rate", 0.001)
    ]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no plan that launcher wrote"):
        compare(
            write(tmp_path, "plan.json", {"mesh": 1, "batch": 2, "length": 3}),
            ROOT / "ds_configs" / "zero2.json",
        )
    with pytest.raises(ConfigurationError, match="stage"):
        compare(
            write(tmp_path, "ds.json", {"zero_optimization": {"stage": 7}}),
            ROOT / "ds_configs" / "zero2.json",
        )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main([*arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "job.yaml"
    code, said, _ = run(capsys, "import", str(ROOT / "ds_configs" / "zero3.json"), "--out", str(out))
    assert code == 0 and "chosen:" in said and "launcher validate" in said
    code, _, err = run(capsys, "validate", str(out))
    assert code == 2 and "FILL-IN" in err and "exactly one of text" in err
    code, _, err = run(capsys, "import", str(ROOT / "ds_configs" / "zero2.json"), "--out", str(out))
    assert code == 2 and "is there already" in err
    code, said, _ = run(
        capsys,
        "import",
        "--json",
        "--",
        "accelerate",
        "launch",
        "--num_processes",
        "4",
        "t.py",
        "--seed",
        "5",
    )
    assert code == 0 and json.loads(said)["job"]["training"]["seed"] == 5
    code, said, err = run(capsys, "import", str(ROOT / "ds_configs" / "zero2.json"))
    assert err.endswith("\nprinted only; --out job.yaml writes it\n")
    assert code == 0 and yaml.safe_load(said)["parallel"]["shard"] == "gradients" and "fill in" in err
    recipe = tmp_path / "axo.yml"
    recipe.write_text(
        "base_model: org/small\nmicro_batch_size: 1\nsequence_len: 64\nval_set_size: 0.1\n"
        "datasets: [{path: a b.jsonl, type: completion}]\n"
    )
    code, said, _ = run(capsys, "import", str(recipe), "--out", str(out), "--force")
    command = "launcher data split 'a b.jsonl' --hold-out 10%"
    assert code == 0 and said.endswith(f"wrote {out}; next:\n  {command}\n  launcher validate {out}\n")
    for bad, words in ((tmp_path / "no" / "job.yaml", "is not there"), (tmp_path, "is a directory")):
        code, _, err = run(capsys, "import", str(ROOT / "ds_configs" / "zero2.json"), "--out", str(bad))
        assert code == 2 and words in err


def test_diff_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    zero2, zero3 = str(ROOT / "ds_configs" / "zero2.json"), str(ROOT / "ds_configs" / "zero3.json")
    assert run(capsys, "diff", zero2, zero2)[:2] == (0, "equal\n")
    code, said, _ = run(capsys, "diff", zero2, zero3)
    assert code == 0 and "sharding" in said and "gradients" in said
    code, said, _ = run(capsys, "diff", zero2, zero3, "--json")
    assert code == 0 and not json.loads(said)["equal"]
    assert run(capsys, "diff", zero2, "missing.json")[0] == 2


def test_render_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("a\n")
    text = (
        "name: a\nmodel: {name: org/m}\ndata: {train: {path: train.txt}, text: text}\ncluster: "
        "{gpus_per_node: 8, nodes: 2}\ntrackers: []\n"
    )
    job = str(write(tmp_path, "job.yaml", text))
    code, said, _ = run(capsys, "render", job, "--out", "out", "--engine", "deepspeed")
    assert code == 0 and "ds_config.json" in said and "zero.reduce_bucket_size" in said
    code, said, _ = run(capsys, "render", job, "--out", "out", "--json", "--set", "training.seed=3")
    assert code == 0 and json.loads(said)["engine"] == "fsdp"
    assert not (tmp_path / "out" / "ds_config.json").exists()
    assert Plan.read(tmp_path / "out" / "plan.json").training.seed == 3
    assert f"run={tmp_path}/runs/a" in (tmp_path / "out" / "submit.sbatch").read_text()
    for arguments, words in ((["--engine", "megatron"], "fsdp or deepspeed"), (["--out", job], "is a file")):
        code, _, err = run(capsys, "render", job, "--out", "x", *arguments)
        assert code == 2 and words in err
