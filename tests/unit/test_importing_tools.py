"""Files of LLaMA-Factory, axolotl, TRL and alignment-handbook: what they say, what they leave out, and what
launcher cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import ConfigurationError
from launcher.importing import axolotl, foreign_files, llama_factory, sft, trainer, trainer_keys
from launcher.importing.job import Imported, import_files
from launcher.importing.merge import job_content, merge


def imported(folder: Path, content: dict[str, Any], name: str = "a.yaml") -> Imported:
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return import_files([path])


def said(made: Imported, kind: str) -> set[str]:
    """The keys that are named under one heading."""
    return {name for remark in made.remarks if remark.kind == kind for name in remark.said.split(", ")}


LLAMA_FACTORY = {
    "model_name_or_path": "org/small", "stage": "sft", "do_train": True, "finetuning_type": "lora",
    "lora_rank": 12, "lora_target": "all",
    "dataset": "chats", "template": "qwen", "cutoff_len": 1536, "max_samples": 500, "output_dir": "out",
    "learning_rate": 2.0e-4,
    "lr_scheduler_type": "cosine", "bf16": True, "val_size": 0.1,
}  # fmt: skip
AXOLOTL = {
    "base_model": "org/small", "load_in_8bit": False,
    "datasets": [{"path": "data/c.jsonl", "type": "chat_template"}], "val_set_size": 0,
    "sequence_len": 4096, "sample_packing": True, "adapter": "lora", "lora_r": 32, "lora_alpha": 16,
    "lora_target_linear": True,
    "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 4, "learning_rate": 2.0e-4,
    "optimizer": "adamw_torch",
    "bf16": "auto", "tf32": False, "output_dir": "out", "weight_decay": 0.1,
    "lora_modules_to_save": ["embed_tokens", "lm_head"],
}  # fmt: skip
RECIPE = {
    "model_name_or_path": "org/base", "torch_dtype": "bfloat16", "use_peft": True, "lora_r": 32,
    "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"], "dataset_mixer": {"org/chats": 1.0},
    "dataset_splits": ["train_sft", "test_sft"],
    "bf16": True, "max_seq_length": 2048, "max_steps": -1, "num_train_epochs": 1, "output_dir": "out",
    "packing": True,
    "assistant_only_loss": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "warmup_ratio": 0.1,
}  # fmt: skip


def test_llama_factory(tmp_path: Path) -> None:
    made = imported(tmp_path, LLAMA_FACTORY)
    assert made.content["model"]["adapter"] == {
        "rank": 12,
        "alpha": 24.0,
        "targets": "all-linear",
        "dropout": 0.0,
    }
    assert made.content["data"] == {"max_length": 1536, "train": {"limit": 500, "path": "FILL-IN.jsonl"}}
    assert made.content["training"] == {
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup": 0.0,
        "epochs": 3.0,
        "seed": 42,
    }
    assert made.content["batch"] == {"micro_batch_size": 8, "global_batch_size": 8}
    assert said(made, "cannot be said") == {"template", "val_size", "cutoff_len"}
    assert said(made, "ignored") == {"do_train", "output_dir"}
    assert "dataset" in said(made, "fill in")


def test_of_an_adapter_nothing_is_made_up(tmp_path: Path) -> None:
    made = imported(tmp_path, {"output_dir": "o", "lora_r": 4, "lora_target_modules": "q_proj"})
    assert made.content["model"]["adapter"] == {"rank": 4, "dropout": 0.0, "targets": ["q_proj"]}
    assert "lora_alpha" in said(made, "fill in")


def test_llama_factory_trains_an_adapter_unless_told(tmp_path: Path) -> None:
    made = imported(
        tmp_path, {"model_name_or_path": "m", "dataset": "a", "template": "qwen", "output_dir": "o"}
    )
    assert made.content["model"]["adapter"] == {
        "rank": 8,
        "alpha": 16.0,
        "targets": "all-linear",
        "dropout": 0.0,
    }
    assert made.content["data"]["max_length"] == 2048
    made = imported(tmp_path, LLAMA_FACTORY | {"finetuning_type": "full"})
    assert "adapter" not in made.content["model"]
    assert {"lora_rank", "lora_target"} <= said(made, "ignored")


def test_axolotl(tmp_path: Path) -> None:
    made = imported(tmp_path, AXOLOTL)
    assert made.content["model"] == {
        "name": "org/small",
        "adapter": {
            "rank": 32,
            "alpha": 16.0,
            "dropout": 0.0,
            "targets": "all-linear",
            "train_also": ["*embed_tokens.*", "*lm_head.*"],
        },
    }
    assert made.content["data"] == {
        "train": {"path": "data/c.jsonl"},
        "messages": "messages",
        "packing": True,
        "max_length": 4096,
        "too_long": "drop",
    }
    assert made.content["training"] == {
        "learning_rate": 2e-4, "weight_decay": 0.1, "epochs": 4.0, "optimizer": "adamw", "seed": 42,
    }  # fmt: skip
    assert made.content["batch"] == {"micro_batch_size": 2, "global_batch_size": 8}
    assert "precision" not in made.content
    assert said(made, "cannot be said") == set()
    # 3% of the steps: launcher's, but for its first step
    assert {"warmup_steps", "warmup_ratio"} <= said(made, "changes meaning")


def test_a_recipe_of_alignment_handbook(tmp_path: Path) -> None:
    made = imported(tmp_path, RECIPE)
    assert made.content["model"]["adapter"] == {
        "rank": 32,
        "alpha": 16.0,
        "dropout": 0.05,
        "targets": ["q_proj", "v_proj"],
    }
    assert made.content["data"] == {
        "train": {"name": "org/chats", "split": "train_sft"},
        "evaluation": {"name": "org/chats", "split": "test_sft"},
        "messages": "messages",
        "packing": True,
        "max_length": 2048,
    }
    assert said(made, "cannot be said") == set() and "warmup_ratio" in said(made, "changes meaning")
    assert said(made, "ignored") == {"output_dir", "torch_dtype"}


def test_what_trl_leaves_out_is_trls(tmp_path: Path) -> None:
    made = imported(
        tmp_path,
        {
            "model_name_or_path": "m",
            "dataset_name": "org/d",
            "use_peft": True,
            "packing": False,
            "output_dir": "o",
        },
    )
    assert made.content["model"]["adapter"] == {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "targets": ["q_proj", "v_proj"],
    }
    assert made.content["precision"] == "bf16"
    assert made.content["training"] == {
        "schedule": "linear",
        "warmup": 0.0,
        "epochs": 3.0,
        "seed": 42,
    }  # 2e-5 is launcher's too
    assert "lora_target_modules" in said(made, "fill in")


def test_a_batch_of_one_rank_is_marked_in_the_file(tmp_path: Path) -> None:
    text = imported(tmp_path, {"output_dir": "out", "per_device_train_batch_size": 4}, "a.json").text
    assert (
        "  global_batch_size: 4   # fill in: 4 x 1 of one rank: multiply it by the number of ranks\n" in text
    )


def test_what_the_trainer_leaves_out_is_the_trainers(tmp_path: Path) -> None:
    made = imported(tmp_path, {"output_dir": "out", "per_device_train_batch_size": 4, "bf16": True}, "a.json")
    expected = {"learning_rate": 5e-05, "schedule": "linear", "warmup": 0.0, "epochs": 3.0, "seed": 42}
    assert made.content["training"] == expected
    assert said(made, "default") == {
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "seed",
    }
    made = imported(tmp_path, {"output_dir": "out", "max_steps": 10}, "a.json")
    assert made.content["training"] == {key: value for key, value in expected.items() if key != "epochs"} | {
        "max_steps": 10
    }
    assert made.content["precision"] == "fp32"


def test_a_default_gives_way_to_whatever_another_file_says(tmp_path: Path) -> None:
    arguments, zero = tmp_path / "a.json", tmp_path / "ds.json"
    arguments.write_text('{"output_dir": "o", "max_grad_norm": 0.5}')
    zero.write_text(
        '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "optimizer": {"type": "AdamW", '
        '"params": {"lr": 1e-4}}}'
    )
    made = import_files([arguments, zero])
    assert made.content["training"]["learning_rate"] == 1e-4 and made.content["precision"] == "bf16"
    assert (
        made.content["training"]["schedule"] == "linear"
    )  # the Trainer's own, where DeepSpeed's file has no scheduler
    assert "clip_norm" not in made.content["training"]  # DeepSpeed's 1.0 is launcher's too
    assert "max_grad_norm" in said(made, "conflict")
    assert "gradient_clipping" in said(made, "default")  # older versions of DeepSpeed had another


def test_what_axolotl_leaves_open_and_holds_out_is_said(tmp_path: Path) -> None:
    content = AXOLOTL | {"val_set_size": 0.05, "bf16": "auto", "tf32": "auto", "warmup_steps": 2}
    content["datasets"] = [{"path": "chats.jsonl", "type": "chat_template"}]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    made = import_files([tmp_path / "a.yaml"])
    texts = {remark.said: remark.text for remark in made.remarks}
    command = "launcher data split chats.jsonl --hold-out 5%"
    assert texts["val_set_size"] == f"`{command}` writes the two files that the job names"
    assert made.commands == (command,) and "val_set_size" in said(made, "changes meaning")
    data = made.content["data"]
    assert (data["train"], data["evaluation"]) == (
        {"path": "chats-train.jsonl"},
        {"path": "chats-evaluation.jsonl"},
    )
    assert "bf16" in said(made, "chosen") and "tf32" in said(made, "changes meaning")
    assert "  warmup: 2   # steps\n" in made.text and "precision" not in made.content


def test_a_model_wholly_in_bf16_computes_in_bf16(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(AXOLOTL | {"bf16": "full"}))
    made = import_files([tmp_path / "a.yaml"])
    assert made.content["precision"] == "bf16" and "bf16" not in said(made, "chosen")


CANNOT: list[tuple[dict[str, Any], str]] = [
    (LLAMA_FACTORY | {"use_dora": True}, "use_dora"),
    (LLAMA_FACTORY | {"pissa_init": True}, "pissa_init"),
    (LLAMA_FACTORY | {"quantization_bit": 4}, "quantization_bit"),
    (LLAMA_FACTORY | {"packing": True}, "packing"),
    (LLAMA_FACTORY | {"mask_history": True}, "mask_history"),
    (LLAMA_FACTORY | {"train_on_prompt": True}, "train_on_prompt"),
    (LLAMA_FACTORY | {"dataset": "a,b", "mix_strategy": "interleave_under"}, "mix_strategy"),
    (LLAMA_FACTORY | {"finetuning_type": "freeze"}, "finetuning_type"),
    (LLAMA_FACTORY | {"use_galore": True}, "use_galore"),
    (LLAMA_FACTORY | {"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
    (LLAMA_FACTORY | {"a_key_of_next_year": 1}, "a_key_of_next_year"),
    (AXOLOTL | {"adapter": "qlora", "load_in_4bit": True}, "load_in_4bit"),
    (AXOLOTL | {"datasets": [{"path": "a/b", "type": "alpaca"}]}, "datasets.type"),
    (AXOLOTL | {"datasets": [{"path": "a/b", "type": "chat_template", "roles_to_train": ["user"]}]},
    "datasets.roles_to_train"),
    (AXOLOTL | {"datasets": [{"path": "a/b", "type": "chat_template"}, {"path": "a/c", "type": "alpaca"}]},
    "datasets.1.type"),
    (AXOLOTL | {"chat_template": "chatml"}, "chat_template"),
    (AXOLOTL | {"special_tokens": {"eos_token": "<|im_end|>"}}, "special_tokens"),
    (AXOLOTL | {"val_set_size": 0.05, "datasets": [{"path": "a/b", "type": "chat_template"}]}, "val_set_size"),
    (AXOLOTL | {"val_set_size": 50}, "val_set_size"),
    (AXOLOTL | {"train_on_inputs": True}, "train_on_inputs"),
    (AXOLOTL | {"optimizer": "lion_8bit"}, "optimizer"),
    (AXOLOTL | {"adapter": None}, "bf16"),
    (AXOLOTL | {"tf32": True}, "tf32"),
    (AXOLOTL | {"peft_use_dora": True}, "peft_use_dora"),
    (RECIPE | {"assistant_only_loss": False}, "assistant_only_loss"),
    (RECIPE | {"completion_only_loss": False}, "completion_only_loss"),
    (RECIPE | {"loss_type": "dft"}, "loss_type"),
    (RECIPE | {"packing_strategy": "wrapped"}, "packing_strategy"),
    (RECIPE | {"chat_template": "{{ messages }}"}, "chat_template"),
    (RECIPE | {"dataset_mixer": {"org/a": 0.5, "org/b": 1.0}}, "dataset_mixer.weight"),
    (RECIPE | {"dataset_mixer": {"org/a": 0.5}}, "dataset_mixer.weight"),
    (RECIPE | {"use_peft": False}, "torch_dtype"),
    (RECIPE | {"eos_token": "<|im_end|>"}, "eos_token"),
    (RECIPE | {"max_length": None, "max_seq_length": None}, "max_length"),
    ({"output_dir": "o", "group_by_length": True}, "group_by_length"),
    ({"output_dir": "o", "lr_scheduler_type": "greedy"}, "lr_scheduler_type"),
    ({"output_dir": "o", "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "square"}}, "lr_scheduler_kwargs.decay_type"),
    ({"output_dir": "o", "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 5, "warmup_type": "cosine"}}, "lr_scheduler_kwargs.warmup_type"),
    ({"output_dir": "o", "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2.5}}, "lr_scheduler_kwargs.num_cycles"),
    ({"output_dir": "o", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "lr_scheduler_kwargs.num_cycles"),
    ({"output_dir": "o", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ({"output_dir": "o", "accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches"),
    ({"output_dir": "o", "resume_from_checkpoint": "x"}, "resume_from_checkpoint"),
    ({"output_dir": "o", "block_size": 512}, "block_size"),
    ({"output_dir": "o", "my_own": 0.5}, "my_own"),
    ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}},
    "optimizer.params.weight_decay"),
    ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR", "params": {}}},
    "scheduler.params.warmup_type"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "key"), CANNOT, ids=[f"{index}-{key}" for index, (_, key) in enumerate(CANNOT)]
)
def test_what_would_change_the_numbers_is_named(content: dict[str, Any], key: str, tmp_path: Path) -> None:
    made = imported(tmp_path, content)
    assert key in said(made, "cannot be said")
    assert key not in said(made, "ignored")
    text = next(
        remark.text for remark in made.remarks if remark.said == key and remark.kind == "cannot be said"
    )
    assert len(text) > 20  # the nearest way, or why there is none


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (AXOLOTL | {"warmup_steps": 10}, "warmup_steps"),
        ({"output_dir": "o", "warmup_ratio": 0.1}, "warmup_ratio"),
    ],
)
def test_a_warm_up_is_taken_over_and_its_first_step_told(
    content: dict[str, Any], key: str, tmp_path: Path
) -> None:
    made = imported(tmp_path, content)
    assert made.content["training"]["warmup"] == content[key]
    [text] = [one.text for one in made.remarks if one.said == key and one.kind == "changes meaning"]
    assert text.startswith("taken over; ") and "(k + 1)/W here" in text


@pytest.mark.parametrize(
    ("data_set", "share"),
    [
        ({"path": "rows-*.jsonl"}, 0.1),
        ({"path": "json", "data_files": ["a.jsonl", "b.jsonl"]}, 0.1),
        ({"path": "rows.parquet"}, 0.1),
        ({"path": "rows.jsonl", "split": "train[:50]"}, 0.1),
        ({"path": "rows.jsonl"}, 1.0),
    ],
)
def test_a_share_that_no_split_of_one_file_holds_out_is_left_to_people(
    data_set: dict[str, Any], share: float, tmp_path: Path
) -> None:
    entry = {"type": "completion", **data_set}
    made = imported(tmp_path, AXOLOTL | {"val_set_size": share, "datasets": [entry]})
    assert made.commands == () and "evaluation" not in made.content["data"]
    assert "val_set_size" in said(made, "cannot be said")


SAID: list[tuple[dict[str, Any], tuple[str, ...], Any]] = [
    (LLAMA_FACTORY | {"neat_packing": True}, ("data", "packing"), True),
    # LLaMA-Factory takes one off then
    (LLAMA_FACTORY | {"neat_packing": True}, ("data", "max_length"), 1535),
    (LLAMA_FACTORY | {"lora_target": "q_proj,v_proj"}, ("model", "adapter", "targets"), ["q_proj", "v_proj"]),
    (LLAMA_FACTORY | {"additional_target": "embed_tokens"}, ("model", "adapter", "train_also"),
    ["*embed_tokens.*"]),
    (LLAMA_FACTORY | {"lora_rank": 16, "use_rslora": True}, ("model", "adapter", "alpha"), 128.0),
    (LLAMA_FACTORY | {"learning_rate": 1e-4, "loraplus_lr_ratio": 16.0}, ("training", "groups"),
    [{"parameters": ["*.lora_B.weight"], "learning_rate": pytest.approx(1.6e-3)}]),
    (LLAMA_FACTORY | {"flash_attn": "fa2"}, ("model", "attention"), "flash_attention_2"),
    (LLAMA_FACTORY | {"trust_remote_code": True}, ("model", "trust_remote_code"), True),
    (AXOLOTL | {"sdp_attention": True}, ("model", "attention"), "sdpa"),
    (AXOLOTL | {"cosine_min_lr_ratio": 0.1}, ("training", "minimum_learning_rate"), 2e-5),
    (AXOLOTL | {"datasets": [{"path": "org/d", "type": "completion", "field": "body", "split": "part"}]},
    ("data", "text"), "body"),
    (AXOLOTL | {"excess_length_strategy": "truncate"}, ("data", "too_long"), "cut"),
    (AXOLOTL | {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}}, ("parallel", "shard"),
    "gradients"),
    (AXOLOTL | {"wandb_project": "p"}, ("trackers",), ["wandb"]),
    (AXOLOTL | {"wandb_project": "p"}, ("tracking", "project"), "p"),
    (AXOLOTL | {"bf16": False}, ("precision",), "fp32"),
    (RECIPE | {"lora_target_modules": "all-linear"}, ("model", "adapter", "targets"), "all-linear"),
    (RECIPE | {"bf16": False}, ("precision",), "bf16"),  # computed in what the weights are kept in
    (RECIPE | {"bf16": False, "torch_dtype": "float32"}, ("precision",), "fp32"),
    (
        {"output_dir": "o", "use_lora": True, "lora_r": 4, "lora_alpha": 8,
        "lora_target_modules": "q_proj v_proj"},
        ("model", "adapter", "rank"),
        4,
    ),
    ({"output_dir": "o", "optim": "sgd"}, ("training", "momentum"), 0.0),
    ({"output_dir": "o", "lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
    ("training", "restarts"), 3),
    ({"output_dir": "o", "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
    ("training", "power"), 2.0),
    ({"output_dir": "o", "lr_scheduler_type": "polynomial"}, ("training", "minimum_learning_rate"), 1e-7),
    ({"output_dir": "o", "lr_scheduler_type": "constant", "warmup_steps": 9}, ("training", "warmup"), 0.0),
    ({"output_dir": "o", "model_max_length": 2048}, ("data", "max_length"), 2048),
    ({"output_dir": "o", "max_train_samples": 90}, ("data", "train", "limit"), 90),
    (AXOLOTL | {"saves_per_epoch": 1}, ("checkpoint", "every"), "epoch"),
    (
        {"packing": False, "dataset_name": "org/d", "dataset_config": "main", "eval_strategy": "steps",
        "output_dir": "o"},
        ("data", "evaluation"),
        {"name": "org/d", "subset": "main", "split": "test"},
    ),
    (
        {"output_dir": "o",
        "dataset_mixture": {"datasets": [{"id": "org/d", "config": "c", "split": "s",
        "columns": ["messages"]}]}},
        ("data", "train"),
        {"name": "org/d", "subset": "c", "split": "s"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "path", "value"),
    SAID,
    ids=[f"{index}-{'.'.join(path)}" for index, (_, path, _) in enumerate(SAID)],
)
def test_what_can_be_said(content: dict[str, Any], path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    found: Any = imported(tmp_path, content).content
    for key in path:
        found = found[key]
    assert found == pytest.approx(value) if isinstance(value, float) else found == value


REFUSED: list[tuple[dict[str, Any], str]] = [
    (LLAMA_FACTORY | {"stage": "dpo"}, "the nearest is sft"),
    (AXOLOTL | {"rl": "orpo"}, "another loss"),
    (RECIPE | {"beta": 0.1}, "another loss"),
    (AXOLOTL | {"excess_length_strategy": "shrink"}, "drop, truncate or raise"),
    (AXOLOTL | {"lora_r": "many"}, "lora_r = 'many'"),
    (AXOLOTL | {"micro_batch_size": 0}, "micro_batch_size"),  # by the name that the file has for it
]


@pytest.mark.parametrize(("content", "text"), REFUSED)
def test_another_loss_and_what_is_no_value_are_refused(
    content: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        imported(tmp_path, content)
    assert text in str(caught.value)


def test_epochs_go_before_the_length_of_deepspeeds_schedule(tmp_path: Path) -> None:
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 100, "warmup_num_steps": 10, "warmup_type": "linear"},
    }
    made = imported(
        tmp_path, {"output_dir": "o", "num_train_epochs": 2, "deepspeed": {"scheduler": scheduler}}
    )
    assert made.content["training"]["epochs"] == 2.0 and "max_steps" not in made.content["training"]
    assert "scheduler.params.total_num_steps" in said(made, "cannot be said")


KEYS = sorted({
    *axolotl.MARKS, *axolotl.ADAPTER.all(), *llama_factory.MARKS, *llama_factory.ADAPTER.all(), *sft.MARKS,
    *sft.ADAPTER.all(),
    *trainer.READ, *trainer_keys.NEUTRAL, "datasets", "test_datasets", "dataset_name", "rl", "path", "type",
    "id", "weight", "columns", "mix_strategy", "interleave_probs", "dataset_dir", "dataset_configs", "shards",
    "split", "name", "field_messages", "data_files", "min_lr", "power", "accelerator_config", "chat_template",
    "loss_type",
})  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        [
            "auto",
            "lora",
            "qlora",
            "chat_template",
            "cosine",
            "constant",
            "1e-4",
            "all",
            "bfloat16",
            "epoch",
            "a,b",
            "interleave_over",
            "0.5,0.5",
            "train[:5]",
        ]
    ),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
MARKED = st.sampled_from(
    [
        {"base_model": "m", "adapter": "lora"},
        {"finetuning_type": "lora"},
        {"use_peft": True},
        {"output_dir": "o"},
    ]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), NESTED, max_size=12), MARKED)
def test_no_content_ends_in_a_traceback(content: dict[str, Any], marked: dict[str, Any]) -> None:
    merged = merge([foreign_files.read_content(content | marked, "fuzz.yaml")])
    if not merged.problems:
        assert job_content(merged, ["fuzz.yaml"])["name"]


def test_no_key_is_told_in_two_ways() -> None:
    tables = [trainer_keys.REPORTS, trainer_keys.PLACES, set(trainer_keys.NEUTRAL), trainer.READ]
    assert sum(len(table) for table in tables) == len(set().union(*tables))
    assert not sft.MARKS & (trainer_keys.REPORTS | trainer.READ) - {"dataset_text_field"}


def test_nothing_said_of_a_training_is_named(tmp_path: Path) -> None:
    made = imported(tmp_path, {"distributed_type": "FSDP", "num_processes": 2})
    remark = next(remark for remark in made.remarks if remark.said == "training")
    assert remark.kind == "fill in" and "2e-05" in remark.value and "epochs 1" in remark.value
